"""Requests to a bucket: few and large ones, many of them under way at a time, in bounded memory."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from typing import Any, TypeVar

REQUEST_BYTES = 1 << 23  # the most bytes of one request
AHEAD_BYTES = 1 << 26  # the most bytes that are under way, or wait to be taken, of one reader
GAP_BYTES = 1 << 18  # between two spans of an object that are read with them: another request takes longer
_FIRST_BYTES = 1 << 24  # of these before the first result is taken: a loop that is left early reads little
_REQUESTS = 64  # at a time, of one reader; a server that gets a thousand answers some too late

_From = TypeVar("_From")
_To = TypeVar("_To")
Place = tuple[Any, int]  # a buffer of bytes, and the position in an object from which on it is filled


def concurrently(call: Callable[[_From], _To], arguments: Sequence[_From]) -> list[_To]:
    """The results of several calls that wait for requests, a few at a time."""
    if len(arguments) < 2:
        return [call(argument) for argument in arguments]
    with ThreadPoolExecutor(min(_REQUESTS, len(arguments))) as pool:
        return list(pool.map(call, arguments))


def ahead(calls: Iterable[tuple[Callable[[], _To], int]]) -> Iterator[_To]:
    """The results of calls in their order, of which some are under way before they are asked for.

    Each call comes with the bytes of its result. As many are under way, or wait to be taken, as have `AHEAD_BYTES`
    together, but at least two and at most 64. Whoever stops early does not wait for the others.
    """
    with _own_pool() as pool:
        yield from _in_order(calls, pool)


def run(calls: Sequence[tuple[Callable[[], None], int]]) -> None:
    """Make requests, each given with the bytes that it reads, in the way of `ahead`; they wait for no other ones."""
    if len(calls) == 1:
        calls[0][0]()
        return
    for _ in _in_order(calls, _shared_pool()):
        pass


@contextmanager
def _own_pool() -> Iterator[ThreadPoolExecutor]:
    pool = ThreadPoolExecutor(_REQUESTS)
    try:
        yield pool
    finally:
        pool.shutdown(wait=False)


@cache
def _shared_pool() -> ThreadPoolExecutor:
    """Threads of this process that stay, since it takes as long to start one as to make a request."""
    return ThreadPoolExecutor(_REQUESTS, thread_name_prefix="activation_extractor requests")


os.register_at_fork(after_in_child=_shared_pool.cache_clear)  # a child process has none of its parent's threads


def _in_order(calls: Iterable[tuple[Callable[[], _To], int]], pool: ThreadPoolExecutor) -> Iterator[_To]:
    waiting = deque[tuple[Future[_To], int]]()
    held = taken = 0
    try:
        for call, nbytes in calls:
            while len(waiting) >= _REQUESTS or (
                len(waiting) > 1 and held + nbytes > min(AHEAD_BYTES, _FIRST_BYTES + 2 * taken)
            ):
                future, size = waiting.popleft()
                yield future.result()
                held, taken = held - size, taken + size
            waiting.append((pool.submit(call), nbytes))
            held += nbytes
        while waiting:
            yield waiting.popleft()[0].result()
    finally:
        for future, _ in waiting:
            future.cancel()


def joined(places: Iterable[Place], gap: int = GAP_BYTES) -> Iterator[tuple[list[Place], int]]:
    """What is filled by one request each, and how many bytes that reads.

    Places that lie near each other are filled by one request, and large ones by several.
    """
    group, first, last = list[Place](), 0, 0
    for data, position in sorted(_cut(places), key=_position):
        stop = position + len(data)
        if group and (position - last > gap or max(stop, last) - first > REQUEST_BYTES):
            yield group, last - first
            group = []
        if not group:
            first = last = position
        group.append((data, position))
        last = max(last, stop)
    if group:
        yield group, last - first


def _cut(places: Iterable[Place]) -> Iterator[Place]:
    """Places of at most the bytes of a request."""
    for data, position in places:
        if len(data) <= REQUEST_BYTES:
            yield data, position
        else:
            for start in range(0, len(data), REQUEST_BYTES):
                yield data[start : start + REQUEST_BYTES], position + start


def _position(place: Place) -> int:
    return place[1]
