"""How what is run grows with the size of what it is run on: counted, since times vary."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any


def steps(function: Callable[[], Any]) -> int:
    """How many lines and calls of Python run; what runs inside functions written in C is not seen."""
    count, before = 0, sys.gettrace()

    def trace(frame: Any, event: str, argument: Any) -> Any:
        nonlocal count
        count += 1
        return trace

    sys.settrace(trace)
    try:
        function()
    finally:
        sys.settrace(before)
    return count


def is_linear(make: Callable[[int], Callable[[], Any]], *, small: int = 100, factor: int = 4) -> bool:
    """Whether `factor` times as much takes at most a little more than `factor` times as many steps."""
    for size in (small, small * factor):  # what is imported or cached by the first run
        make(size)()
    few, many = (steps(make(size)) for size in (small, small * factor))
    return many < 1.5 * factor * few
