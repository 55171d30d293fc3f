"""Whose calls are recorded: the blocks that are open in the current context.

A context is a thread's or an asyncio task's own (`contextvars`). Hooks sit on a module that other threads use too, so
each hook asks whether its block is open *here*. Threads start with an empty context (before Python 3.14), so their
calls are not recorded; child tasks and `asyncio.to_thread` inherit the context and are.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from types import FrameType
from typing import Any, Literal, NamedTuple, TypeVar

from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction

from activation_extractor._display import examples
from activation_extractor._private_torch import backward_task, forward_hooks, forward_pre_hooks, hook_counter
from activation_extractor.layers._selections import Target

# Why a call of a layer was not recorded, as `LayerNotRunError` says it.
ELSEWHERE = "called in another thread or task than the one that entered the block, which is to be entered there"
RECOMPUTED = "called in backward, as a checkpoint does that computes again: enter a block there to record it"


class Listener(NamedTuple):
    """What a block does with the values of a tap."""

    target: Target
    record: Callable[[Tensor], None]


class CallListener(NamedTuple):
    """What a block does when calls of a module, the model or one in it, begin, with their arguments, and end."""

    begin: Callable[[tuple[Any, ...], dict[str, Any]], None]
    end: Callable[[], None]
    is_root: bool


class Owner:
    """The block that hooks belong to: its targets, and whether a forward is to end once all of them have run.

    Attributes:
        is_open: whether the block has not been left yet.
        was_cut: whether a forward of its model has ended early, so that the model's call returned None.
        backwards: -1, for outside of any backward, and the one in which the block was entered, as in a gradient hook;
            what calls a layer in another one may be a checkpoint that computes again.
        missed: why calls of layers were not recorded.
        hooks_made: how many hooks had been registered, on anything, when ours were put last.
        picked_of: by recorded name, of how many tensors of a structure the recorded one is the first.
        parts: by recorded name, which part of a value that is spread over processes is recorded in place of it.
        put_last: moves our hooks behind those that were registered later; returns the ids of the dictionaries of hooks
            in which these may replace what a layer takes or returns.
        taps, calls: what is done with values of taps, and with calls of modules, by their numbers in graphs.
        has_lost_taps: whether taps of these were taken off while it was open.
        untapped: the layers that are hooked beside taps, which a compiled graph would not let run.
        unpacks: whether a packed sequence is recorded as its rows: where it is reduced, joined or stored.
    """

    __slots__ = (
        "backwards",
        "calls",
        "has_lost_taps",
        "hooks_made",
        "is_open",
        "missed",
        "parts",
        "picked_of",
        "put_last",
        "stops_early",
        "taps",
        "targets",
        "unpacks",
        "untapped",
        "was_cut",
    )

    def __init__(self, targets: tuple[Target, ...] = (), *, stops_early: bool = False) -> None:
        self.targets, self.stops_early = targets, stops_early
        self.is_open, self.was_cut, self.unpacks, self.has_lost_taps = True, False, False, False
        self.backwards = -1, backward_task()
        self.missed: dict[str, str] = {}
        self.picked_of: dict[str, int] = {}
        self.parts: dict[str, str] = {}
        self.taps: Mapping[int, Sequence[Listener]] = {}
        self.calls: Mapping[int, CallListener] = {}
        self.untapped: tuple[str, ...] = ()
        self.hooks_made = hook_counter.next_id
        self.put_last: Callable[[], set[int]] = set

    def misses(self, layer: str) -> Literal[True]:
        """A call of the layer is not to be recorded: in another context, in a backward of the body, or by hand."""
        if self not in open_here():
            self.missed[layer] = ELSEWHERE
        elif backward_task() not in self.backwards:
            self.missed[layer] = RECOMPUTED
        return True

    def reorder(self, *ran: nn.Module) -> None:
        """Put our hooks last, so that they see what others make of a value; for modules that ran it may be too late.

        Warns where a hook that may replace a value was added to one of these modules since ours were put last.
        """
        self.hooks_made = hook_counter.next_id
        overtaken = self.put_last()
        modules = {id(module) for module in ran if not overtaken.isdisjoint(_hook_ids(module))}
        late = dict.fromkeys(target.layer for target in self.targets if id(target.module) in modules)
        if late:
            warnings.warn(
                f"A hook was added to layer {examples(late)} inside of the block, too late for this call of it: the "
                "value from before that hook is recorded. Add hooks before the block, or between forwards.",
                stacklevel=3,
            )


def _hook_ids(module: nn.Module) -> set[int]:
    return {id(forward_hooks(module)), id(forward_pre_hooks(module)[0])}


T = TypeVar("T")

_open: ContextVar[tuple[Owner, ...]] = ContextVar("activation_extractor_open", default=())

open_here = _open.get


def enter(owner: Owner) -> None:
    """Record `owner`'s calls in this context, until `leave`."""
    _open.set((*(other for other in _open.get() if other.is_open), owner))


def leave(owner: Owner) -> None:
    """Stop recording `owner` here. Does nothing in another context than the one it was entered in."""
    # No reset(token): blocks may end in any order, and a generator may be closed in another context.
    _open.set(tuple(other for other in _open.get() if other is not owner and other.is_open))


def unrecorded(function: Callable[..., T], *args: Any) -> T:
    """Call a user's function in a hook: what it calls is by hand, and no block records it."""
    token = _open.set(())
    try:
        return function(*args)
    finally:
        _open.reset(token)


def outermost_function() -> int | None:
    """The identity of the outermost autograd function of Python that is under way; None outside of any.

    It is the same one in the function's forward and its backward, where a re-entrant checkpoint runs its part again.
    """
    frame: FrameType | None = sys._getframe()
    found = None
    while frame is not None:
        if frame.f_code.co_argcount:
            first = frame.f_locals.get(frame.f_code.co_varnames[0])
            found = id(first) if isinstance(first, BackwardCFunction) else found
        frame = frame.f_back
    return found
