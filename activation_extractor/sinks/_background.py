"""Jobs on a thread of their own, in order, behind a queue that is bounded in bytes."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable

Job = Callable[[], None]

IDLE_SECONDS = 1.0  # after which a thread without jobs ends, so that one is never left behind
MOST_JOBS = 10_000  # that wait, however small they are: each has memory mapped, and a process 65,530 maps by default
_LOOK_SECONDS = 1.0  # between two looks of a caller that waits, whether the thread is alive


class Background:
    """Does jobs one after the other while the caller goes on.

    One thread does them. It ends with `finish`, or when there was no job for a while; the interpreter waits for it
    before it ends. Once a job has failed the ones behind it are dropped, and every call raises the failure until
    `finish` has. So does a failure of the thread itself, which no memory may be left for.

    The unfinished jobs hold up to `queue_bytes` together; a larger job waits until it is alone.

    ``ThreadPoolExecutor(1)`` with a count of bytes was tried. It refuses jobs once the main thread has ended, so that a
    block in another thread loses its last units; and it reports a job as done before it drops what the job holds, so
    that memory holds one unit more than `queue_bytes`.
    """

    def __init__(self, queue_bytes: int) -> None:
        self._queue_bytes = queue_bytes
        self._jobs: deque[tuple[Job, int]] = deque()
        self._held_bytes = 0
        self._thread: threading.Thread | None = None
        self._is_ending = False
        self._error: BaseException | None = None
        self._changed = threading.Condition()

    def check(self) -> None:
        """Raise what a job raised."""
        if self._error is not None:
            raise self._error

    def submit(self, job: Job, nbytes: int, reserved_bytes: int = 0) -> None:
        """Queue a job that holds `nbytes`, as soon as there is room for it and for `reserved_bytes` of the caller's."""
        most_held = max(self._queue_bytes - nbytes - reserved_bytes, 0)
        with self._changed:
            self._wait(lambda: bool(self._error) or (self._held_bytes <= most_held and len(self._jobs) < MOST_JOBS))
            self.check()
            if self._thread is None:
                thread = threading.Thread(target=self._work, name="activation_extractor writer")
                thread.start()  # it waits until this block is left
                self._thread = thread
            self._jobs.append((job, nbytes))
            self._held_bytes += nbytes
            self._changed.notify_all()

    def finish(self) -> None:
        """Wait until all jobs are done, and raise what the first one that failed raised; later jobs begin anew."""
        with self._changed:
            self._is_ending = True
            self._changed.notify_all()
            try:
                self._wait(lambda: self._thread is None)
            finally:
                self._is_ending = False
            error, self._error = self._error, None
            if error is not None:
                raise error

    def _wait(self, is_ready: Callable[[], bool]) -> None:
        """Wait until something is so, or the thread has died: it is looked at from time to time."""
        while not self._changed.wait_for(is_ready, _LOOK_SECONDS):
            if self._thread is not None and not self._thread.is_alive():
                self._drop(RuntimeError("the thread that writes ended before its work was done"))
                self._held_bytes, self._thread = 0, None

    def _work(self) -> None:
        done_bytes = 0
        while True:
            job = None  # and what it holds, before its bytes count as free
            try:
                with self._changed:
                    self._held_bytes, done_bytes = self._held_bytes - done_bytes, 0
                    self._changed.notify_all()
                    self._changed.wait_for(lambda: self._jobs or self._is_ending, IDLE_SECONDS)
                    if not self._jobs:
                        self._thread = None
                        self._changed.notify_all()
                        return
                    job, done_bytes = self._jobs.popleft()
                job()
            except BaseException as error:  # the caller's thread raises it, KeyboardInterrupt too
                with self._changed:
                    self._drop(error)
                    self._held_bytes = done_bytes

    def _drop(self, error: BaseException) -> None:
        """Drop the jobs that wait, since something failed."""
        self._error = self._error or error
        self._jobs.clear()
