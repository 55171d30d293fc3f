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

    ``*args`` stay one tuple under their name, ``**kwargs`` are spread out.
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
    """Where in a call the arguments of these names stand that may be given without them."""
    named = (inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.VAR_KEYWORD)
    parameters = signature.parameters.values() if signature else ()
    return {one.name: index for index, one in enumerate(parameters) if one.kind not in named}
