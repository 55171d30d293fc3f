"""Making compiled models run eagerly while anything is captured, so that hooks fire."""

from __future__ import annotations

import sys
import threading
import warnings
from collections.abc import Callable, Iterable
from functools import cache, partial, wraps
from typing import Any, ParamSpec, TypeVar
from weakref import WeakSet

import torch
from torch import nn

from activation_extractor._private_compiler import (
    current_stance,
    is_compiled_call,
    is_compiled_caller,
    is_compiler_loaded,
    refuse_inlining,
    skip_as_frame,
)
from activation_extractor._private_torch import CALL, children_of

Function = TypeVar("Function", bound=Callable[..., Any])

Given = ParamSpec("Given")
Returned = TypeVar("Returned")

_told: WeakSet[nn.Module] = WeakSet()
_WRAPPED = "_orig_mod"  # under which `torch.compile` keeps the module that it wraps


class EagerStance:
    """The users of ``torch.compiler.set_stance("force_eager")``.

    The stance is process-wide and its own context manager restores wrongly when uses overlap: here the first user
    sets it and the last one out restores what the first one found. Where others have set theirs meanwhile, theirs
    stays; and what they take for the one to go back to, ours, becomes the one that was found.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._users: set[int] = set()
        self._set: Any = None
        self._frames: list[Any] = []

    def enter(self, user: object) -> None:
        """Hold the stance. Does nothing in a process that has compiled nothing: importing dynamo takes a second."""
        with self._lock:
            self._users.add(id(user))
        self.catch_up()

    def catch_up(self) -> bool:
        """Take the stance if dynamo was imported after the first user came; returns whether it was just taken."""
        if self._set is not None or not is_compiler_loaded():
            return False
        with self._lock:
            if self._set is not None or not self._users:
                return False
            self._set = _run_outside()(lambda: torch.compiler.set_stance("force_eager"))
            skip_as_frame(*self._frames)
            return True

    def leave(self, user: object) -> None:
        """Let go of the stance; a second time nothing happens."""
        with self._lock:
            self._users.discard(id(user))
            if not self._users and self._set is not None and not sys.is_finalizing():  # then torch imports no more
                ours = self._set  # until all is done: who is interrupted leaves again
                if current_stance() is ours.stance:
                    _run_outside()(partial(ours.__exit__, None, None, None))
                vars(ours.stance).update(vars(ours.prev))
                self._set = None

    def skip(self, function: Function) -> Function:
        """A decorator: while the stance is held, the compiler does not take a call of the function for one to compile.

        Others may set a stance in which it would.
        """
        self._frames.append(function)
        return function

    @property
    def is_lost(self) -> bool:
        """Whether others have set another stance since it was taken, so that compiled code may run."""
        held = self._set
        return held is not None and current_stance() is not held.stance


def is_compiled_around(root: nn.Module, layer: str) -> bool:
    """Whether a layer, or a module that it is in, is known to be compiled: in place, or by a wrapper in the model."""
    module: nn.Module | None = root
    for segment in ("", *layer.split(".")):
        module = children_of(module).get(segment) if segment and module is not None else module
        if module is None:
            return False
        call = module.__dict__.get(CALL)
        if _WRAPPED in children_of(module) or getattr(call, "previous", call) is not None:  # ours stands in for another
            return True
    return False


def tell_once(root: nn.Module, layers: Iterable[str]) -> None:
    """Warn, once for a model, that it would run compiled, as a call of it or of a part of it shows."""
    if root in _told or not (is_compiled_call() or any(is_compiled_around(root, layer) for layer in layers)):
        return
    _told.add(root)
    warnings.warn(
        f"{type(root).__name__} is compiled, and runs eagerly while a block of capture is open, as all compiled code "
        "of the process does. instrument(model, layers) lets blocks record inside of its graphs.",
        stacklevel=2,
    )


def outside_compilation(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, run eagerly with all that it calls, also when a compiled call is what calls it.

    torch refuses to change the stance within a compiled call, and that may be where dynamo is seen for the first time.
    """
    disabled: Callable[..., Any] = torch.compiler.disable(function)  # type: ignore[no-untyped-call]
    return disabled


def untraced(function: Callable[Given, Returned]) -> Callable[Given, Returned]:
    """A decorator: inside of a compiled function this one is not traced, and runs as it is with all that it calls."""
    outside: list[Callable[..., Returned]] = []

    @wraps(function)
    def run(*args: Given.args, **kwargs: Given.kwargs) -> Returned:
        if not is_compiled_caller():
            return function(*args, **kwargs)
        if not outside:
            outside.append(outside_compilation(function))
        return outside[0](*args, **kwargs)

    refuse_inlining(run, "activation_extractor begins or ends a block here")
    return run


@cache
def _run_outside() -> Callable[..., Any]:
    """What runs a function outside compilation; made once, since making it costs more than what it is used for."""
    return outside_compilation(lambda function: function())


eager_stance = EagerStance()

eager_stance.skip(outside_compilation)
