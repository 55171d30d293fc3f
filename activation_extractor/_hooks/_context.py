"""Whose calls are recorded: the blocks that are open in the current context.

A context is a thread's or an asyncio task's own (`contextvars`). Hooks sit on a module that other threads use too, so
each hook asks whether its block is open *here*. Threads start with an empty context (before Python 3.14), so their
calls are not recorded; child tasks and `asyncio.to_thread` inherit the context and are.
"""

from __future__ import annotations

from contextvars import ContextVar
from typing import Literal

from activation_extractor._private_torch import backward_task
from activation_extractor.layers._selections import Target

# Why a call of a layer was not recorded, as `LayerNotRunError` says it.
ELSEWHERE = "called in another thread or task than the one that entered the block, which is to be entered there"
RECOMPUTED = "called in backward, as a checkpoint does that computes again: enter a block there to record it"


class Owner:
    """The block that hooks belong to: its targets, and whether a forward is to end once all of them have run.

    Attributes:
        is_open: whether the block has not been left yet.
        was_cut: whether a forward of its model has ended early, so that the model's call returned None.
        backward: the backward in which the block was entered, as in a gradient hook; -1 outside of any.
        missed: why calls of layers were not recorded.
    """

    __slots__ = ("backward", "is_open", "missed", "stops_early", "targets", "was_cut")

    def __init__(self, targets: tuple[Target, ...] = (), *, stops_early: bool = False) -> None:
        self.targets, self.stops_early = targets, stops_early
        self.is_open, self.was_cut = True, False
        self.backward, self.missed = backward_task(), dict[str, str]()

    def misses(self, layer: str) -> Literal[True]:
        """A call of the layer is not to be recorded: in another context, in a backward of the body, or by hand."""
        if self not in open_here():
            self.missed[layer] = ELSEWHERE
        elif backward_task() != self.backward:
            self.missed[layer] = RECOMPUTED
        return True


_open: ContextVar[tuple[Owner, ...]] = ContextVar("activation_extractor_open", default=())

open_here = _open.get


def enter(owner: Owner) -> None:
    """Record `owner`'s calls in this context, until `leave`."""
    _open.set((*(other for other in _open.get() if other.is_open), owner))


def leave(owner: Owner) -> None:
    """Stop recording `owner` here. Does nothing in another context than the one it was entered in."""
    # No reset(token): blocks may end in any order, and a generator may be closed in another context.
    _open.set(tuple(other for other in _open.get() if other is not owner and other.is_open))
