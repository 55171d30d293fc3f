"""What taps take of the calls of modules, written so that the compiler can trace it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from activation_extractor.layers._caches import CACHE_ARGUMENTS, SeenCache, filled
from activation_extractor.layers._signatures import signature_of

_SEQUENCES = (tuple, list)  # not their union, which older releases do not trace
_EMPTY = torch.empty(0)  # in place of how full a cache is that does not say so
_CACHE = "cache "  # before the name of an argument that is a cache


class Tap(NamedTuple):
    """One tap: the part that it takes of what a layer is given or returns, and its number, also as ``()`` int64."""

    select: Any
    key: int
    number: Tensor


class Parameters(NamedTuple):
    """The parameters of a forward.

    Attributes:
        names: in order; those that may be given by position come first.
        positional: how many of them may be.
        rest: under which name further positional arguments go.
    """

    names: tuple[str, ...]
    positional: int
    rest: str

    @classmethod
    def of(cls, module: nn.Module) -> Parameters:
        """Those of a module's forward; none where its signature cannot be read."""
        signature = signature_of(module)
        parameters = list(signature.parameters.values()) if signature else []
        by_position = [it.name for it in parameters if it.kind in (it.POSITIONAL_ONLY, it.POSITIONAL_OR_KEYWORD)]
        by_keyword = [it.name for it in parameters if it.kind is it.KEYWORD_ONLY]
        rest = next((it.name for it in parameters if it.kind is it.VAR_POSITIONAL), "")
        return cls((*by_position, *by_keyword), len(by_position), rest)


def given(parameters: Parameters, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[list[Tensor], list[str]]:
    """The tensors among the arguments of a call, and where each stands: ``0``, ``mask``, ``0 ids`` in a dict."""
    values: list[Tensor] = []
    names: list[str] = []
    named = parameters.names[: parameters.positional]
    places = [(str(index), value) for index, value in enumerate(args)]
    caches = [str(index) for index, name in enumerate(named[: len(args)]) if name in CACHE_ARGUMENTS]
    for place, value in places + list(kwargs.items()):
        if isinstance(value, Tensor):
            values.append(without_complex(value))
            names.append(place)
        elif isinstance(value, Mapping):
            for key, member in value.items():
                if isinstance(member, Tensor) and isinstance(key, str):
                    values.append(without_complex(member))
                    names.append(place + " " + key)
        elif value is not None and (place in CACHE_ARGUMENTS or place in caches):
            length = filled(value)
            values.append(_EMPTY if length is None else length if isinstance(length, Tensor) else torch.tensor(length))
            names.append(_CACHE + place)
    return values, names


def without_complex(tensor: Tensor) -> Tensor:
    """A tensor of complex numbers as one of their parts: inductor has no operators like ours that take the others."""
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


def by_name(parameters: Parameters, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call by name, in the order of the signature."""
    given = {}
    for index, value in enumerate(args[: parameters.positional]):
        given[parameters.names[index]] = value
    if len(args) > parameters.positional:
        given[parameters.rest] = args[parameters.positional :]
    for name in parameters.names:
        if name in kwargs:
            given[name] = kwargs[name]
    for name, value in kwargs.items():
        if name not in given:
            given[name] = value
    return given


def as_taken(value: Any, select: Any, number: Tensor) -> tuple[Tensor, Tensor] | None:
    """The tensor that `select` means in a value, as a tap takes it, and the tap's number: ``(1,)`` if complex."""
    tensor = part_of(value, select)
    if tensor is None:
        return None
    return without_complex(tensor), number.unsqueeze(0) if tensor.is_complex() else number


def as_returned(tensor: Tensor, number: Tensor) -> Tensor:
    """The tensor that `as_taken` was given."""
    return torch.complex(tensor[..., 0], tensor[..., 1]) if number.dim() else tensor


def part_of(value: Any, select: Any) -> Tensor | None:
    """The tensor that `select` means in a value, traced; the first one without it."""
    if callable(select):
        return _first(select(_copy(value)))
    if isinstance(select, str) and not isinstance(value, Mapping):
        return _first(getattr(value, select, None))
    if isinstance(select, int) and isinstance(value, Mapping) and select not in value:
        value = list(value.values())
    if select is not None and isinstance(value, Mapping):
        return _first(value.get(select))
    if isinstance(select, int):
        is_there = isinstance(value, _SEQUENCES) and -len(value) <= select < len(value)
        return _first(value[select]) if is_there else None
    return _first(value)


def _first(value: Any) -> Tensor | None:
    """The first tensor of a structure; written as the compiler can trace it."""
    if isinstance(value, Tensor):
        return value
    members: Any = ()
    if isinstance(value, _SEQUENCES):
        members = value
    elif isinstance(value, Mapping):
        members = value.values()
    elif dataclasses.is_dataclass(value):
        members = [getattr(value, field.name) for field in dataclasses.fields(value)]
    for member in members:
        found = _first(member)
        if found is not None:
            return found
    return None


def _copy(value: Any) -> Any:
    """The same structure with copies of its tensors, which a user's callable may write to."""
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, _SEQUENCES):
        members = [_copy(member) for member in value]
        kind = type(value)
        return kind(*members) if hasattr(kind, "_fields") else kind(members)
    if dataclasses.is_dataclass(value):
        fields = {field.name: _copy(getattr(value, field.name)) for field in dataclasses.fields(value)}
        return type(value)(**fields)  # type: ignore[misc]
    if isinstance(value, Mapping):
        return {key: _copy(member) for key, member in value.items()}
    return value


def as_given(values: list[Tensor], names: list[str]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments as `given` has found them; what is no tensor is None."""
    args: dict[int, Any] = {}
    kwargs: dict[str, Any] = {}
    for name, value in zip(names, values, strict=True):
        place, _, key = name.removeprefix(_CACHE).partition(" ")
        given: Any = value
        if name.startswith(_CACHE):
            given = SeenCache(value.clone() if value.dim() == 0 else None)
        within: Any = args if place.isdigit() else kwargs
        index: Any = int(place) if place.isdigit() else place
        if key:
            within.setdefault(index, {})[key] = given
        else:
            within[index] = given
    return tuple(args.get(index) for index in range(max(args, default=-1) + 1)), kwargs
