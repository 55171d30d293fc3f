"""Whose calls are recorded: the recordings that are open in the current context.

A context is a thread's or an asyncio task's own (`contextvars`). Hooks sit on a module that other threads use too, so
each hook asks whether its recording is open *here*. Threads start with an empty context (before Python 3.14), so their
calls are not recorded; child tasks and `asyncio.to_thread` inherit the context and are.
"""

from __future__ import annotations

from contextvars import ContextVar
from typing import Protocol


class Owner(Protocol):
    """What hooks belong to."""

    @property
    def is_open(self) -> bool:
        """Whether its block has not been left yet."""
        ...


_open: ContextVar[tuple[Owner, ...]] = ContextVar("activation_extractor_open", default=())

open_here = _open.get


def enter(owner: Owner) -> None:
    """Record `owner`'s calls in this context, until `leave`."""
    _open.set((*(other for other in _open.get() if other.is_open), owner))


def leave(owner: Owner) -> None:
    """Stop recording `owner` here. Harmless in another context than it was entered in, and twice."""
    # No reset(token): blocks may end in any order, and a generator may be closed in another context.
    _open.set(tuple(other for other in _open.get() if other is not owner and other.is_open))
