"""Units on their way to a bucket, several at a time: one connection is slower than most networks."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait

_MOST = 8  # at a time


class Uploads:
    """Makes calls on threads of their own; those under way hold up to `most_bytes`, but for one that is alone.

    Once a call has failed, `put` and `finish` raise what it raised, until `finish` has.
    """

    def __init__(self, most_bytes: int) -> None:
        self._most_bytes = most_bytes
        self._pool: ThreadPoolExecutor | None = None
        self._under_way: dict[Future[None], int] = {}

    def put(self, call: Callable[[], None], nbytes: int) -> None:
        """Begin a call that holds so many bytes, as soon as there is room for it."""
        self._take(lambda: len(self._under_way) < _MOST and self._held + nbytes <= self._most_bytes)
        try:
            self._pool = self._pool or ThreadPoolExecutor(_MOST, thread_name_prefix="activation_extractor upload")
            self._under_way[self._pool.submit(call)] = nbytes
        except RuntimeError:  # the main thread has ended, or the system refuses a thread
            call()

    def finish(self) -> None:
        """Wait for all calls, and end their threads."""
        try:
            self._take(lambda: False)
        finally:
            pool, self._pool, self._under_way = self._pool, None, {}
            if pool is not None:
                pool.shutdown()

    @property
    def _held(self) -> int:
        return sum(self._under_way.values())

    def _take(self, is_enough: Callable[[], bool]) -> None:
        """Wait for calls to end until it is enough, or none is left; raise what one raised."""
        while self._under_way:
            done, _ = wait(self._under_way, 0 if is_enough() else None, FIRST_COMPLETED)
            for future in done:
                del self._under_way[future]
                future.result()
            if not done and is_enough():
                return
