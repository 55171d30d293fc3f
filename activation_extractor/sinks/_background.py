"""Work on a thread of its own, in order, behind a queue that is bounded in bytes."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable

Job = Callable[[], None]


class Background:
    """Does jobs one after the other while the caller goes on.

    The thread lives only while there are jobs, so nothing is left behind when they are done; the interpreter waits for
    it before it ends. Once a job has failed the ones behind it are not begun, and every call raises the failure until
    `finish` has.

    Args:
        queue_bytes: how many bytes the jobs that are not done may hold together; one that is larger waits until it is
            alone.
    """

    def __init__(self, queue_bytes: int) -> None:
        self._queue_bytes = queue_bytes
        self._jobs: deque[tuple[Job, int]] = deque()
        self._held_bytes = 0
        self._is_running = False
        self._error: BaseException | None = None
        self._changed = threading.Condition()

    def check(self) -> None:
        """Raise what a job raised."""
        if self._error is not None:
            raise self._error

    def submit(self, job: Job, nbytes: int, beside: int = 0) -> None:
        """Queue a job that holds `nbytes`; waits while there is no room for it and for what the caller holds `beside`.

        Raises:
            BaseException: what an earlier job raised.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._error or self._has_room(nbytes + beside))
            self.check()
            if not self._is_running:
                threading.Thread(target=self._work, name="activation_extractor writer").start()
            self._is_running = True
            self._jobs.append((job, nbytes))
            self._held_bytes += nbytes

    def finish(self) -> None:
        """Wait until all jobs are done.

        Raises:
            BaseException: what the first job that failed raised; the next jobs begin anew.
        """
        with self._changed:
            self._changed.wait_for(lambda: not self._is_running)
            error, self._error = self._error, None
            if error is not None:
                raise error

    def _has_room(self, nbytes: int) -> bool:
        return not self._held_bytes or self._held_bytes + nbytes <= self._queue_bytes

    def _work(self) -> None:
        while True:
            with self._changed:
                if not self._jobs:
                    self._is_running = False
                    self._changed.notify_all()
                    return
                job, nbytes = self._jobs.popleft()
            try:
                job()
            except BaseException as error:  # it is the caller's, whatever it is
                with self._changed:
                    self._error = error
                    self._jobs.clear()
                    self._held_bytes = nbytes
            del job  # and what it holds, before there is room for the next
            with self._changed:
                self._held_bytes -= nbytes
                self._changed.notify_all()
