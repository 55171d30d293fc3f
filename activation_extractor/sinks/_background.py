"""Jobs on a thread of their own, in order, behind a queue that is bounded in bytes."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable

Job = Callable[[], None]


class Background:
    """Does jobs one after the other while the caller goes on.

    The thread lives only while there are jobs, so it is never left behind; the interpreter waits for it before it ends.
    Once a job has failed the ones behind it are dropped, and every call raises the failure until `finish` has.

    The unfinished jobs hold up to `queue_bytes` together; a larger job waits until it is alone.

    ``ThreadPoolExecutor(1)`` with a count of bytes was tried. It refuses jobs once the main thread has ended, so that a
    block in another thread loses its last units; and it reports a job as done before it drops what the job holds, so
    that memory holds one unit more than `queue_bytes`.
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

    def submit(self, job: Job, nbytes: int, reserved_bytes: int = 0) -> None:
        """Queue a job that holds `nbytes`, as soon as there is room for it and for `reserved_bytes` of the caller's."""
        most_held = max(self._queue_bytes - nbytes - reserved_bytes, 0)
        with self._changed:
            self._changed.wait_for(lambda: self._error or self._held_bytes <= most_held)
            self.check()
            if not self._is_running:
                threading.Thread(target=self._work, name="activation_extractor writer").start()
            self._is_running = True
            self._jobs.append((job, nbytes))
            self._held_bytes += nbytes

    def finish(self) -> None:
        """Wait until all jobs are done, and raise what the first one that failed raised; later jobs begin anew."""
        with self._changed:
            self._changed.wait_for(lambda: not self._is_running)
            error, self._error = self._error, None
            if error is not None:
                raise error

    def _work(self) -> None:
        done_bytes = 0
        while True:
            with self._changed:
                self._held_bytes -= done_bytes
                self._is_running = bool(self._jobs)
                self._changed.notify_all()
                if not self._is_running:
                    return
                job, done_bytes = self._jobs.popleft()
            try:
                job()
            except BaseException as error:  # the caller's thread raises it, KeyboardInterrupt too
                with self._changed:
                    self._error = error
                    self._jobs.clear()
                    self._held_bytes = done_bytes
            del job  # and what it holds, before its bytes count as free
