"""The calls of a module, by the names of its forward's arguments."""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn


def signature_of(module: nn.Module) -> inspect.Signature | None:
    """The signature of a module's forward; None when it has none that can be read."""
    try:
        return inspect.signature(module.forward)
    except (TypeError, ValueError):
        return None


def bind(signature: inspect.Signature | None, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call by name, in the signature's order; empty when they do not fit it.

    ``*args`` stay one tuple under their name, ``**kwargs`` are spread out. Without a signature the positional
    arguments are named by their numbers.
    """
    if signature is None:
        return {**{str(index): value for index, value in enumerate(args)}, **kwargs}
    try:
        arguments = signature.bind(*args, **kwargs).arguments
    except TypeError:
        return {}  # the call itself is about to raise
    bound: dict[str, Any] = {}
    for name, value in arguments.items():
        if signature.parameters[name].kind is inspect.Parameter.VAR_KEYWORD:
            bound.update(value)
        else:
            bound[name] = value
    return bound


def positions_of(signature: inspect.Signature | None) -> dict[str, int]:
    """The positions of the parameters that may be passed by position."""
    named = (inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.VAR_KEYWORD)
    parameters = signature.parameters.items() if signature else ()
    return {name: index for index, (name, parameter) in enumerate(parameters) if parameter.kind not in named}
