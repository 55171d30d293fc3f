"""Making compiled models run eagerly while anything is captured, so that hooks fire."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch

from activation_extractor._private_torch import is_compiler_loaded


class EagerStance:
    """The users of ``torch.compiler.set_stance("force_eager")``.

    The stance is process-wide and its own context manager restores wrongly when uses overlap: here the first user
    sets it and the last one out restores what the first one found.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._users: set[int] = set()
        self._set: Any = None

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
            return True

    def leave(self, user: object) -> None:
        """Let go of the stance; a second time nothing happens."""
        with self._lock:
            self._users.discard(id(user))
            if not self._users and self._set is not None and not sys.is_finalizing():  # then torch imports no more
                _run_outside()(partial(self._set.__exit__, None, None, None))
                self._set = None


def outside_compilation(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, run eagerly with all that it calls, also when a compiled call is what calls it.

    torch refuses to change the stance within a compiled call, and that may be where dynamo is seen for the first time.
    """
    disabled: Callable[..., Any] = torch.compiler.disable(function)  # type: ignore[no-untyped-call]
    return disabled


@cache
def _run_outside() -> Callable[..., Any]:
    """What runs a function outside compilation; made once, since making it costs more than what it is used for."""
    return outside_compilation(lambda function: function())


eager_stance = EagerStance()
