"""The model's own call: where a forward of the whole model begins and ends, and where `stop_early` is caught.

Hooks cannot do this: they neither see every way out of a call nor can they swallow an exception. What can is `CALL` in
the module's ``__dict__``.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from contextvars import ContextVar
from functools import cached_property, partial
from typing import Any

from torch import nn

from activation_extractor._hooks._compiled_models import eager_stance, outside_compilation, tell_once
from activation_extractor._hooks._context import Owner, open_here
from activation_extractor._private_compiler import is_compiled_caller, is_compiler_loaded
from activation_extractor._private_torch import CALL, active_tracer, backward_task, own_call
from activation_extractor.errors import TransformedCallError

# Runs one forward: takes what calls the model, and its arguments; returns what the call returns.
RunForward = Callable[..., Any]

_lock = threading.Lock()


class StopForward(BaseException):
    """Ends a forward in which everything wanted has run; not an Exception, lest a model's ``except`` swallow it."""


class Cut:
    """What a forward that is to be cut short still has to run."""

    def __init__(self, awaited: dict[Owner, set[str]]) -> None:
        self._awaited = awaited

    def ran(self, owner: Owner, name: str) -> None:
        """A layer has run: end the forward if it was the last one that any block waits for."""
        names = self._awaited.get(owner)
        if names is None or name not in names:
            return
        names.discard(name)
        if not any(self._awaited.values()):
            raise StopForward


_cut: ContextVar[Cut | None] = ContextVar("activation_extractor_cut", default=None)

current_cut = _cut.get

# The cuts of all contexts: while it is empty, a hook need not ask for the cut of its own context.
cuts: list[Cut] = []


def watch(root: nn.Module, owner: Owner, run: RunForward) -> None:
    """Hand each forward of `root` in `owner`'s context to `run`, until `unwatch`."""
    with _lock:
        call = root.__dict__.get(CALL)
        if not isinstance(call, _RootCall):
            call = root.__dict__[CALL] = _RootCall(root, call, CALL in root.__dict__)
        call.watchers = {**call.watchers, owner: run}


def unwatch(root: nn.Module, owner: Owner) -> None:
    """Undo `watch`. When no block watches any more, the model's call is as the first `watch` found it."""
    with _lock:
        call = root.__dict__.get(CALL)
        if not isinstance(call, _RootCall):
            return  # the model was compiled in place inside the block: that call stays
        call.watchers = {other: run for other, run in call.watchers.items() if other is not owner}
        if not call.watchers:
            call.restore()


def is_watched(root: nn.Module) -> bool:
    """Whether forwards of `root` are seen: no longer when it was compiled in place since `watch`."""
    return isinstance(root.__dict__.get(CALL), _RootCall)


class _RootCall:
    """Stands in for a model's own call while captures are open on it.

    Attributes:
        previous: what was in its place, a compiled call or None.
    """

    def __init__(self, root: nn.Module, previous: Any, was_set: bool) -> None:
        self._root, self.previous, self._was_set = root, previous, was_set
        self._own = own_call(root)
        self.watchers: dict[Owner, RunForward] = {}

    @cached_property
    def _members(self) -> frozenset[int]:
        return frozenset(map(id, self._root.modules()))

    def restore(self) -> None:
        del self._root.__dict__[CALL]
        if self._was_set:
            self._root.__dict__[CALL] = self.previous

    @eager_stance.skip
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if eager_stance.catch_up() or is_compiled_caller():  # in a stance that others have set meanwhile
            return outside_compilation(self._call)(*args, **kwargs)
        return self._call(*args, **kwargs)

    def _call(self, *args: Any, **kwargs: Any) -> Any:
        call = self._own if eager_stance.is_lost else self.previous or self._own
        opened, task = open_here(), backward_task()
        # Neither a stranger's call nor a checkpoint's, which runs in a backward that began after the block.
        watchers = {it: run for it, run in self.watchers.items() if it in opened and task in it.backwards}
        if not watchers:
            return call(*args, **kwargs)
        if tracer := active_tracer():
            raise TransformedCallError("", tracer)
        if is_compiler_loaded():
            tell_once(self._root, (target.layer for owner in watchers for target in owner.targets[:1]))
        if current_cut() is None and any(owner.stops_early for owner in watchers):
            call = partial(self._cut_short, call, opened, watchers)
        for run in reversed(watchers.values()):
            call = partial(run, call)
        return call(*args, **kwargs)

    def _cut_short(
        self, call: Any, opened: tuple[Owner, ...], watchers: Iterable[Owner], /, *args: Any, **kwargs: Any
    ) -> Any:
        # Every block that is open in this context is served, whether or not it wants to stop early itself.
        members = self._members
        cut = Cut({owner: {it.name for it in owner.targets if id(it.module) in members} for owner in opened})
        token = _cut.set(cut)
        cuts.append(cut)
        try:
            return call(*args, **kwargs)
        except StopForward:
            for owner in watchers:
                owner.was_cut = owner.stops_early
            return None
        finally:
            cuts.remove(cut)
            _cut.reset(token)
