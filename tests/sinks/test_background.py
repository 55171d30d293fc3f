"""Jobs on a thread of their own: their order, their bound, their errors, and what they leave behind."""

from __future__ import annotations

import gc
import signal
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Iterator

import pytest
from threads import PATIENCE_SECONDS, ends, is_blocked, on_a_thread, waiting_for, writers

from activation_extractor.sinks._background import Background


@pytest.fixture
def gate() -> Iterator[threading.Event]:
    event = threading.Event()
    yield event
    event.set()


def fail(error: BaseException) -> Callable[[], None]:
    def job() -> None:
        raise error

    return job


def test_jobs_are_done_in_order_on_one_other_thread():
    background, done = Background(5), []
    for number in range(50):
        background.submit(lambda number=number: done.append((number, threading.current_thread().name)), 1)
    background.finish()
    assert done == [(number, "activation_extractor writer") for number in range(50)]


def test_submit_does_not_wait_while_there_is_room(gate):
    background, done = Background(10), []
    background.submit(waiting_for(gate), 4)
    background.submit(lambda: done.append(1), 6)
    assert done == []
    gate.set()
    background.finish()
    assert done == [1]


@pytest.mark.parametrize("nbytes", [7, 1000])
def test_submit_waits_while_the_queue_is_full_and_goes_on_when_there_is_room(gate, nbytes):
    background, done = Background(10), []
    background.submit(waiting_for(gate), 4)
    waiting = on_a_thread(lambda: background.submit(lambda: done.append(1), nbytes))
    assert is_blocked(waiting)
    gate.set()
    assert ends(waiting)
    background.finish()
    assert done == [1]


@pytest.mark.parametrize(("reserved_bytes", "waits"), [(3, False), (4, True)])
def test_what_the_caller_holds_needs_room_too(gate, reserved_bytes, waits):
    background = Background(10)
    background.submit(waiting_for(gate), 4)
    submitting = on_a_thread(lambda: background.submit(lambda: None, 3, reserved_bytes))
    assert is_blocked(submitting) == waits
    gate.set()
    assert ends(submitting)


def test_the_job_that_is_being_done_counts(gate):
    background = Background(10)
    begun = threading.Event()

    def job() -> None:
        begun.set()
        gate.wait(PATIENCE_SECONDS)

    background.submit(job, 10)
    assert begun.wait(PATIENCE_SECONDS)
    waiting = on_a_thread(lambda: background.submit(lambda: None, 1))
    assert is_blocked(waiting)
    gate.set()
    assert ends(waiting)


def test_a_job_larger_than_the_queue_is_done_alone(gate):
    background = Background(10)
    background.submit(waiting_for(gate), 1000)
    waiting = on_a_thread(lambda: background.submit(lambda: None, 0))
    assert is_blocked(waiting)
    gate.set()
    assert ends(waiting)
    background.finish()


@pytest.mark.parametrize("error", [OSError("full"), KeyboardInterrupt(), SystemExit()], ids=repr)
def test_the_first_error_comes_back_from_every_call_until_finish_has_raised_it(gate, error):
    background, done = Background(1000), []
    background.check()
    background.submit(lambda: done.append(1), 1)
    background.submit(waiting_for(gate), 1)
    background.submit(fail(error), 1)
    background.submit(lambda: done.append(2), 1)
    background.submit(fail(ValueError("second")), 1)
    gate.set()
    with pytest.raises(type(error)) as caught:
        background.finish()
    assert caught.value is error
    assert done == [1]
    background.check()
    background.finish()


def test_submit_and_check_raise_the_error_and_queue_nothing():
    background, done, error = Background(1000), [], OSError("full")
    background.submit(fail(error), 1)
    while background._error is None:
        threading.Event().wait(0.001)
    for call in (background.check, lambda: background.submit(lambda: done.append(1), 1), background.check):
        with pytest.raises(OSError, match="full"):
            call()
    with pytest.raises(OSError, match="full"):
        background.finish()
    assert done == []


def test_a_submit_that_waits_gets_the_error(gate):
    background, found = Background(10), []

    def submit() -> None:
        try:
            background.submit(lambda: found.append("done"), 10)
        except OSError as error:
            found.append(error)

    error = OSError("full")
    background.submit(lambda: gate.wait(PATIENCE_SECONDS) and fail(error)(), 10)
    waiting = on_a_thread(submit)
    assert is_blocked(waiting)
    gate.set()
    assert ends(waiting)
    assert found == [error]


def test_after_an_error_there_is_all_the_room_again(gate):
    background, done = Background(10), []
    background.submit(waiting_for(gate), 2)
    background.submit(fail(OSError("full")), 3)
    background.submit(lambda: None, 5)
    gate.set()
    with pytest.raises(OSError, match="full"):
        background.finish()
    gate.clear()
    background.submit(waiting_for(gate), 4)
    submitted = on_a_thread(lambda: background.submit(lambda: done.append(1), 6))
    assert ends(submitted)
    waiting = on_a_thread(lambda: background.submit(lambda: done.append(2), 1))
    assert is_blocked(waiting)
    gate.set()
    assert ends(waiting)
    background.finish()
    assert done == [1, 2]


@pytest.mark.parametrize("fails", [False, True])
def test_no_thread_is_left_after_finish(fails):
    background = Background(10)
    background.submit(fail(OSError()) if fails else lambda: None, 1)
    thread = background._thread
    assert thread in writers()
    try:
        background.finish()
    except OSError:
        assert fails
    assert ends(thread)
    assert background._thread is None


def test_the_interpreter_waits_for_the_jobs(gate):
    background = Background(10)
    background.submit(waiting_for(gate), 1)
    assert not background._thread.daemon
    gate.set()
    background.finish()


@pytest.mark.skipif(
    (3, 12) <= sys.version_info < (3, 12, 3), reason="starts no thread once the main one has ended (CPython #113964)"
)
def test_a_thread_that_outlives_the_main_thread_may_submit():
    program = """if True:
        import threading
        from activation_extractor.sinks._background import Background

        def submit_all():
            threading.main_thread().join()
            for number in range(3):
                background.submit(lambda number=number: print(number), 1)

        background = Background(2)
        threading.Thread(target=submit_all).start()
    """
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert (ended.stdout.split(), ended.stderr) == (["0", "1", "2"], "")


@pytest.mark.parametrize("call", ["submit", "finish"])
def test_an_interrupt_while_waiting_leaves_the_queue_usable(gate, call):
    background, done = Background(10), []
    main = threading.main_thread()
    assert threading.current_thread() is main

    def interrupt() -> None:
        while not background._changed._waiters:  # until the main thread waits
            threading.Event().wait(0.01)
        signal.pthread_kill(main.ident, signal.SIGINT)
        gate.wait(PATIENCE_SECONDS)
        done.append(1)

    background.submit(interrupt, 10)
    with pytest.raises(KeyboardInterrupt):
        background.finish() if call == "finish" else background.submit(lambda: done.append(2), 1)
    assert done == []
    gate.set()
    background.submit(lambda: done.append(3), 10)
    background.finish()
    assert done == [1, 3]


def test_a_thread_that_cannot_be_started_is_an_error_and_no_deadlock(monkeypatch):
    background, done = Background(10), []

    def start(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", start)
        with pytest.raises(RuntimeError, match="can't start"):
            background.submit(lambda: done.append(1), 10)
    assert ends(on_a_thread(background.finish))
    assert ends(on_a_thread(lambda: background.submit(lambda: done.append(2), 10)))
    assert ends(on_a_thread(background.finish))
    assert 2 in done


def test_many_threads_may_submit():
    background, done = Background(8), []

    def submit_all(name: int) -> None:
        for number in range(100):
            background.submit(lambda: done.append(name), 1 + number % 3)

    threads = [on_a_thread(lambda name=name: submit_all(name)) for name in range(4)]
    assert all(map(ends, threads))
    background.finish()
    assert sorted(done) == sorted([0, 1, 2, 3] * 100)
    assert background._held_bytes == 0


class Held:
    def do(self) -> None: ...

    def fail(self) -> None:
        raise OSError("full")


def test_what_a_job_holds_is_released_before_there_is_room_for_the_next(gate):
    background, held, found = Background(10), Held(), []
    gone = weakref.ref(held, lambda _: found.append(background._held_bytes))
    background.submit(held.do, 7)
    del held
    background.submit(waiting_for(gate), 10)
    assert gone() is None
    assert found == [7]
    gate.set()
    background.finish()


def test_what_jobs_hold_that_were_not_begun_is_released(gate):
    background, held = Background(10), Held()
    gone = weakref.ref(held)
    background.submit(lambda: gate.wait(PATIENCE_SECONDS) and Held().fail(), 1)
    background.submit(held.do, 1)
    del held
    gate.set()
    with pytest.raises(OSError, match="full"):
        background.finish()
    gc.collect()
    assert gone() is None
