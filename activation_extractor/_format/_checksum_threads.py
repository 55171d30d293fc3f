"""Threads that take the checksums of a shard while it is written."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from activation_extractor._format._headers import Entries

_Result = TypeVar("_Result")

_SMALL_BYTES = 2**18  # of a shard whose checksums take less time than to ask another thread for them


@functools.cache
def _threads() -> ThreadPoolExecutor:
    """The threads that take checksums in this process; they start when they are needed, and are few."""
    return ThreadPoolExecutor(2, thread_name_prefix="activation_extractor checksums")


os.register_at_fork(after_in_child=_threads.cache_clear)  # a child process has none of its parent's threads


def beside(job: Callable[[], _Result], entries: Entries) -> Callable[[], _Result]:
    """Begin a job on another thread, unless it is small or there can be no thread; returns what gives its result."""
    if sum(chunk.nbytes for chunks in entries.values() for chunk in chunks) <= _SMALL_BYTES:
        return job
    try:
        return _threads().submit(job).result
    except RuntimeError:  # the main thread has ended, or the system refuses a thread
        return job
