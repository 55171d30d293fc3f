"""Making things on a thread of their own, a few ahead of whoever takes them."""

from __future__ import annotations

import atexit
import os
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, Generic, TypeVar

_Made = TypeVar("_Made")


class Prefetch(Generic[_Made]):
    """Takes what an iterator gives on a thread, up to `ahead` things before they are asked for.

    The thread ends when the iterator does or raises, with `close`, when the last reference to this object is gone, and
    before the interpreter ends; it holds no reference to this object. In a process that was forked there is no such
    thread: there, ask `is_here`.

    Args:
        make: called on the thread, makes the iterator.
        ahead: how many things are made before they are asked for.
    """

    def __init__(self, make: Callable[[], Iterator[_Made]], ahead: int) -> None:
        self._handover = _Handover(ahead)
        self._thread = threading.Thread(
            target=_work, args=(make, self._handover), name="activation_extractor reader", daemon=True
        )
        weakref.finalize(self, self._handover.end).atexit = False
        self._thread.start()

    @property
    def is_here(self) -> bool:
        """Whether the thread was started in this process."""
        return self._handover.is_here

    def take(self) -> _Made:
        """The next thing; waits for it.

        Raises:
            StopIteration: the iterator has ended.
            BaseException: what it raised.
        """
        made: _Made = self._handover.take()
        return made

    def close(self) -> None:
        """End the thread, and wait until it has ended; what was made ahead is dropped."""
        self._handover.end()
        if self.is_here and self._thread is not threading.current_thread():
            self._thread.join()


class _Handover:
    """Things on their way from the thread that makes them to the one that takes them."""

    def __init__(self, ahead: int) -> None:
        self._ahead, self._process = ahead, os.getpid()
        self._made: deque[Any] = deque()
        self._changed = threading.Condition()
        self._is_over = self._is_unwanted = False
        self._error: BaseException | None = None

    @property
    def is_here(self) -> bool:
        return self._process == os.getpid()

    def put(self, made: Any) -> bool:
        """Hand over, as soon as there is room; returns whether more is wanted."""
        with self._changed:
            self._changed.wait_for(lambda: self._is_unwanted or len(self._made) < self._ahead)
            if not self._is_unwanted:
                self._made.append(made)
                self._changed.notify_all()
            return not self._is_unwanted

    def finish(self, error: BaseException | None) -> None:
        """Say that nothing follows."""
        with self._changed:
            self._is_over, self._error = True, error
            self._changed.notify_all()

    def take(self) -> Any:
        with self._changed:
            self._changed.wait_for(lambda: self._made or self._is_over or self._is_unwanted)
            if self._made:
                self._changed.notify_all()
                return self._made.popleft()
            if self._error is not None:
                raise self._error
            raise StopIteration

    def end(self) -> None:
        """Say that nothing more is wanted."""
        if self.is_here:  # elsewhere the lock may be held for ever, by a thread that was not forked with it
            with self._changed:
                self._is_unwanted = True
                self._made.clear()
                self._changed.notify_all()


_running: dict[_Handover, threading.Thread] = {}


def _work(make: Callable[[], Iterator[Any]], handover: _Handover) -> None:
    _running[handover] = threading.current_thread()
    error = None
    try:
        for made in make():
            if not handover.put(made):
                break
            del made  # not to hold one more while the next is made
    except BaseException as raised:  # whoever takes the next thing raises it
        error = raised
    finally:
        handover.finish(error)
        del make, error
        _running.pop(handover, None)


@atexit.register
def _end_all() -> None:
    """A thread that is at work in torch while the interpreter goes down may take the process down with an abort."""
    for handover, thread in [*_running.items()]:
        if handover.is_here:
            handover.end()
            thread.join()
