"""The writer's thread when there is no memory or no thread, and how many threads there are."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections import deque

import pytest
from threads import ends, is_blocked, on_a_thread, waiting_for, writers

from activation_extractor.sinks import _background
from activation_extractor.sinks._background import Background


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    names: list[str] = []
    start = threading.Thread.start

    def note(thread: threading.Thread) -> None:
        names.append(thread.name)
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", note)
    return names


def test_one_thread_does_the_jobs_of_many_bursts(started):
    background, done = Background(10), []
    for number in range(20):
        background.submit(lambda number=number: done.append(number), 1)
        while len(done) <= number:
            time.sleep(0.001)
    background.finish()
    assert started == ["activation_extractor writer"]
    assert done == list(range(20))


def test_a_thread_without_jobs_ends_and_a_later_job_has_another(monkeypatch, started):
    monkeypatch.setattr(_background, "IDLE_SECONDS", 0.01)
    background, done = Background(10), []
    for number in range(2):
        background.submit(lambda number=number: done.append(number), 1)
        for thread in writers():
            assert ends(thread)
        assert background._thread is None
    background.finish()
    assert done == [0, 1]
    assert len(started) == 2


def test_a_program_that_forgets_to_finish_ends_all_the_same():
    program = "from activation_extractor.sinks._background import Background as B; B(9).submit(lambda: print(1), 1)"
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert (ended.stdout, ended.stderr, ended.returncode) == ("1\n", "", 0)


class NoMemory(deque):
    """A queue that fails when a job is taken out of it, as where no memory is left."""

    def popleft(self):
        raise MemoryError("no memory left")


@pytest.mark.parametrize("call", ["finish", "submit"])
def test_an_error_of_the_thread_itself_is_raised_and_nothing_waits_for_ever(call):
    background, found = Background(10), []
    background._jobs = NoMemory()

    def run() -> None:
        try:
            background.submit(lambda: None, 10)
            background.finish() if call == "finish" else background.submit(lambda: None, 10)
        except MemoryError as error:
            found.append(str(error))

    assert ends(on_a_thread(run))
    assert found == ["no memory left"]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("call", ["finish", "submit"])
def test_a_thread_that_dies_without_a_word_is_an_error_of_who_waits_for_it(monkeypatch, call):
    monkeypatch.setattr(_background, "_LOOK_SECONDS", 0.05)
    background, found, done = Background(10), [], []
    background._jobs = NoMemory()
    with monkeypatch.context() as patch:
        patch.setattr(Background, "_drop", lambda self, error: (_ for _ in ()).throw(error))  # no memory here either
        background.submit(lambda: None, 10)
        assert ends(background._thread)

    def run() -> None:
        try:
            background.finish() if call == "finish" else background.submit(lambda: None, 10)
        except RuntimeError as error:
            found.append(str(error))

    assert ends(on_a_thread(run))
    assert found == ["the thread that writes ended before its work was done"]
    background._jobs = deque()
    if call == "submit":
        with pytest.raises(RuntimeError, match="ended before its work"):
            background.finish()
    background.submit(lambda: done.append(1), 10)
    background.finish()
    assert done == [1]


def test_jobs_that_hold_nothing_do_not_wait_without_limit(monkeypatch):
    monkeypatch.setattr(_background, "MOST_JOBS", 3)
    gate, background, done = threading.Event(), Background(10), []
    background.submit(waiting_for(gate), 0)

    def submit_all() -> None:
        for number in range(9):
            background.submit(lambda number=number: done.append(number), 0)

    waiting = on_a_thread(submit_all)
    assert is_blocked(waiting)
    assert len(background._jobs) <= 3
    gate.set()
    assert ends(waiting)
    background.finish()
    assert done == list(range(9))
