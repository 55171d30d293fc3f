"""The model's own call: where a forward of the whole model begins and ends, and where `stop_early` is caught.

Hooks cannot do this: they neither see every way out of a call nor can they swallow an exception. What can is `CALL` in
the module's ``__dict__``.
"""

from __future__ import annotations

import threading
from contextlib import AbstractContextManager, ExitStack
from contextvars import ContextVar
from functools import cached_property, partial
from typing import Any, Protocol

from torch import nn

from activation_extractor._hooks._context import Owner, open_here
from activation_extractor._hooks._stance import eager_stance, outside_compilation
from activation_extractor._private_torch import CALL, backward_task, own_call

_lock = threading.Lock()


class Watcher(Owner, Protocol):
    """What is told of a model's forwards."""

    @property
    def stops_early(self) -> bool:
        """Whether it wants the forward to be cut short once everything has run."""
        ...

    def forward(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> AbstractContextManager[None]:
        """A context that spans one forward; `StopForward` passing through it is no failure."""
        ...

    def note_cut(self) -> None:
        """Told when a forward was cut short, so that the call returned None."""
        ...

    def awaited(self, members: frozenset[int]) -> set[str]:
        """The names of what it wants from the modules with these ids."""
        ...


class Spanning(Protocol):
    """What a forward begins and ends for."""

    def begin_forward(self, call: Any) -> AbstractContextManager[None] | None:
        """The forward that was given `call` begins; returns its step, if it is one."""
        ...

    def end_forward(self) -> None:
        """It has ended, however it did."""
        ...


class Forward:
    """One forward of the model. Not a generator: its frame would cost as much as a captured call."""

    __slots__ = ("_call", "_step", "_watcher")

    def __init__(self, watcher: Spanning, call: Any) -> None:
        self._watcher, self._call = watcher, call

    def __enter__(self) -> None:
        try:
            self._step = self._watcher.begin_forward(self._call)
            if self._step is not None:
                self._step.__enter__()
        except BaseException:
            self._watcher.end_forward()
            raise

    def __exit__(self, *error: Any) -> bool | None:  # noqa: PYI036
        try:
            return None if self._step is None else self._step.__exit__(*error)
        finally:
            self._watcher.end_forward()


class StopForward(BaseException):
    """Ends a forward in which everything wanted has run; not an Exception, lest a model's ``except`` swallow it."""


class Cut:
    """What a forward that is to be cut short still has to run."""

    def __init__(self, awaited: dict[Owner, set[str]]) -> None:
        self._awaited = awaited

    def ran(self, owner: Owner, name: str) -> None:
        """Note that a layer has run, and end the forward if it was the last one that anyone waits for."""
        names = self._awaited.get(owner)
        if names is None or name not in names:
            return
        names.discard(name)
        if not any(self._awaited.values()):
            raise StopForward


_cut: ContextVar[Cut | None] = ContextVar("activation_extractor_cut", default=None)

current_cut = _cut.get

# The cuts of all contexts: while there is none, a hook need not ask for the one of its own.
cuts: list[Cut] = []


def watch(root: nn.Module, watcher: Watcher) -> None:
    """Tell `watcher` of each forward of `root` in its context, until `unwatch`."""
    with _lock:
        call = root.__dict__.get(CALL)
        if not isinstance(call, _RootCall):
            call = root.__dict__[CALL] = _RootCall(root, call, CALL in root.__dict__)
        call.watchers = (*call.watchers, watcher)


def unwatch(root: nn.Module, watcher: Watcher) -> None:
    """Undo `watch`; the last one out puts back what the first one found."""
    with _lock:
        call = root.__dict__.get(CALL)
        if not isinstance(call, _RootCall):
            return  # someone compiled the model in place meanwhile: theirs stays
        call.watchers = tuple(other for other in call.watchers if other is not watcher)
        if not call.watchers:
            call.restore()


class _RootCall:
    """Stands in for a model's own call while captures are open on it."""

    def __init__(self, root: nn.Module, previous: Any, was_set: bool) -> None:
        self._root, self._previous, self._was_set = root, previous, was_set
        self._own = own_call(root)
        self.watchers: tuple[Watcher, ...] = ()

    @cached_property
    def _members(self) -> frozenset[int]:
        return frozenset(map(id, self._root.modules()))

    def restore(self) -> None:
        del self._root.__dict__[CALL]
        if self._was_set:
            self._root.__dict__[CALL] = self._previous

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if eager_stance.catch_up():
            return outside_compilation(self._call)(*args, **kwargs)
        return self._call(*args, **kwargs)

    def _call(self, *args: Any, **kwargs: Any) -> Any:
        call = self._previous or self._own
        opened = open_here()
        watchers = [watcher for watcher in self.watchers if watcher in opened]
        if not watchers or backward_task() != -1:  # a stranger's call, or checkpointing's recomputation
            return call(*args, **kwargs)
        if current_cut() is None and any(watcher.stops_early for watcher in watchers):
            call = partial(self._cut_short, call, opened, watchers)
        with watchers[0].forward(args, kwargs) if len(watchers) == 1 else _all_of(watchers, args, kwargs):
            return call(*args, **kwargs)

    def _cut_short(
        self, call: Any, opened: tuple[Owner, ...], watchers: list[Watcher], /, *args: Any, **kwargs: Any
    ) -> Any:
        # Every capture open in this context is served, whether or not it wants to stop early itself.
        cut = Cut({owner: owner.awaited(self._members) for owner in opened if hasattr(owner, "awaited")})
        token = _cut.set(cut)
        cuts.append(cut)
        try:
            return call(*args, **kwargs)
        except StopForward:
            for watcher in watchers:
                watcher.note_cut()
            return None
        finally:
            cuts.remove(cut)
            _cut.reset(token)


def _all_of(watchers: list[Watcher], args: tuple[Any, ...], kwargs: dict[str, Any]) -> ExitStack:
    """A context that spans one forward for several watchers."""
    with ExitStack() as stack:
        for watcher in watchers:
            stack.enter_context(watcher.forward(args, kwargs))
        return stack.pop_all()
