"""What hooks of others do, as far as their code tells: whether they may replace a value, or register hooks."""

from __future__ import annotations

import dis
from collections.abc import Iterator
from functools import lru_cache
from types import CodeType, FunctionType, MethodType
from typing import Any


def code_of(hook: Any) -> CodeType | None:
    """The code of a hook, or of the function of a partial one; None where it is not in Python."""
    code = getattr(getattr(hook, "func", hook), "__code__", None)
    return code if isinstance(code, CodeType) else None


def may_replace(hook: Any) -> bool:
    """Whether the code of a hook returns anything but None, and with that what a layer takes or returns."""
    code = code_of(hook)
    return code is None or _returns_values(code)


@lru_cache(maxsize=128)  # reading code takes a hundred times as long as a forward of a small layer
def _returns_values(code: CodeType) -> bool:
    before = None
    for step in dis.get_instructions(code):
        if step.opname in ("RETURN_VALUE", "RETURN_CONST"):
            constant = step if step.opname == "RETURN_CONST" else before
            if constant is None or "CONST" not in constant.opname or constant.argval is not None:
                return True
        before = step
    return False


def registers_hooks(hook: Any) -> bool:
    """Whether the code of a hook, or of what it calls by name, registers a hook around a forward."""
    function = getattr(hook, "func", hook)
    codes = [it.__code__ for it in (function, *_called_by(function)) if code_of(it)]
    names = {name for code in codes for name in code.co_names}
    return not names.isdisjoint(("register_forward_hook", "register_forward_pre_hook"))


def _called_by(function: Any) -> Iterator[FunctionType | MethodType]:
    """Functions and methods that a function may call: of its object, of its module and of its closure."""
    code, owner = code_of(function), getattr(function, "__self__", None)
    for name in () if code is None else code.co_names:
        found = getattr(type(owner), name, None) or getattr(function, "__globals__", {}).get(name)
        if isinstance(found, FunctionType | MethodType):
            yield found
    for cell in getattr(function, "__closure__", None) or ():
        try:
            if isinstance(cell.cell_contents, FunctionType | MethodType):
                yield cell.cell_contents
        except ValueError:  # an empty one
            continue
