"""Tensors in what a layer takes and returns: finding them, selecting a part, copying."""

from __future__ import annotations

import copy
import dataclasses
from collections import UserDict
from collections.abc import Callable, Iterator, Mapping
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pad_packed_sequence

from activation_extractor._display import examples
from activation_extractor._tensors import ordinary, snapshot
from activation_extractor.errors import ArgumentError
from activation_extractor.layers._structure_state import StructureState


def main_tensor(value: Any) -> Tensor | None:
    """The first tensor of a structure (tuple, list, mapping, dataclass, nested), or None when it holds none."""
    return next(_tensors(value), None)


def tensors_in(value: Any) -> list[Tensor]:
    """All tensors of a structure."""
    return list(_tensors(value))


def unpacked(value: Any) -> Tensor | None:
    """The rows of the packed sequence that comes first in a structure, a nested tensor; None where something else does.

    They are in the order of the batch, each with its own length.
    """
    while isinstance(value, tuple | list | Mapping) and not isinstance(value, PackedSequence):
        value = next(iter(value.values() if isinstance(value, Mapping) else value), None)
    if not isinstance(value, PackedSequence):
        return None
    padded, lengths = pad_packed_sequence(value, batch_first=True)
    rows = [row[:length] for row, length in zip(padded, lengths.tolist(), strict=True)]
    return torch.nested.as_nested_tensor(rows, layout=torch.jagged)


def select_part(value: Any, select: int | str | Callable[[Any], Any], *, is_trusted: bool = False) -> Any:
    """The part of a structured value that a user's ``select=`` means; None when there is no such part.

    With `is_trusted` a callable is one that has written to no tensor through ``.data`` or numpy before.

    Raises:
        ArgumentError: a callable wrote to a tensor of the value, which is the model's, or to what holds it.
    """
    if callable(select):
        return _selected(value, select, is_trusted=is_trusted)
    if isinstance(value, Mapping):
        members = list(value.values())
        if isinstance(select, int) and select not in value:
            return members[select] if -len(members) <= select < len(members) else None
        return value.get(select)
    if isinstance(select, str):
        return getattr(value, select, None)
    if isinstance(value, tuple | list):
        return value[select] if -len(value) <= select < len(value) else None
    return None


def why_no_tensor(value: Any, select: Any, part: Any, layer: str) -> tuple[str, str]:
    """Why the selected part of a layer's value holds no tensor, and what to do; empty where no part was selected.

    `layer` is the layer's name and class, of which it is guessed whether it is an attention.
    """
    kind = type(value).__name__
    if select is None:
        return "", ""
    if part is not None:
        return f"the selected part of its {kind} is of type {type(part).__name__}", ""
    if not _has_part(value, select):
        parts = f" with {examples(value)}" if isinstance(value, Mapping) else ""
        parts = f" of {len(value)}" if isinstance(value, tuple | list) else parts
        return f"its value is a {kind}{parts}, which has no such part", ""
    advice = "Choose another part, or leave the layer out."
    if "att" in f"{layer} {select}".lower():
        advice = (
            "Attention weights are computed with attn_implementation='eager' when transformers loads the model, with "
            "need_weights=True in a call of nn.MultiheadAttention, and where a model has an option output_attentions."
        )
    return f"the selected part of its {kind} is None", advice


def copied(value: Any) -> Any:
    """The same structure with each tensor copied and free of its graph; members that are no tensors are shared."""
    return _rebuilt(value, lambda tensor: ordinary(snapshot(tensor)))


def _selected(value: Any, select: Callable[[Any], Any], *, is_trusted: bool) -> Any:
    """What a callable returns for a structure of its own, with the value's tensors, or copies of those of inference.

    Objects of other types in it, such as a cache, are the model's.
    """
    state = StructureState(value, has_contents=not is_trusted)
    part = select(_rebuilt(value, lambda tensor: ordinary(snapshot(tensor)) if tensor.is_inference() else tensor))
    if not state.is_kept():
        advice = "Let it work on a copy: value.clone()."
        raise ArgumentError("a callable for select=", "leave the model's tensors as they are", select, advice)
    return part


def _rebuilt(value: Any, make: Callable[[Tensor], Tensor]) -> Any:
    """The same structure with what `make` returns in place of each tensor; other members are shared."""
    if isinstance(value, Tensor):
        return make(value)
    try:
        if isinstance(value, Mapping):
            return _rebuilt_mapping(value, make)
        if isinstance(value, tuple | list):
            return _rebuilt_sequence(value, make)
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            twin = copy.copy(value)
            for name, member in _fields_of(value):
                object.__setattr__(twin, name, _rebuilt(member, make))
            return twin
    except Exception:  # a type whose constructor, or copy, asks for something of its own
        return _deeply_rebuilt(value, make)
    return value


def _has_part(value: Any, select: int | str | Callable[[Any], Any]) -> bool:
    if callable(select):
        return True
    if isinstance(select, str):
        return hasattr(value, select) or (isinstance(value, Mapping) and select in value)
    if isinstance(value, Mapping) and select in value:
        return True
    return isinstance(value, tuple | list | Mapping) and -len(value) <= select < len(value)


def _rebuilt_mapping(value: Mapping[Any, Any], make: Callable[[Tensor], Tensor]) -> Any:
    if not isinstance(value, dict | UserDict):  # only of these does a shallow copy share no members with the original
        return _deeply_rebuilt(value, make)
    twin = copy.copy(value)
    for key, member in value.items():
        twin[key] = _rebuilt(member, make)
    return twin


def _rebuilt_sequence(value: Any, make: Callable[[Tensor], Tensor]) -> Any:
    members = [_rebuilt(member, make) for member in value]
    if isinstance(value, list):
        twin: Any = copy.copy(value)
        twin[:] = members
    elif all(new is old for new, old in zip(members, value, strict=True)):
        return value  # nobody can write to it
    else:
        try:  # not by the constructor of its type, which may take other arguments
            twin = tuple.__new__(type(value), members)
        except TypeError:
            twin = type(value)(members)  # one of those that torch itself returns
    for name, member in getattr(value, "__dict__", {}).items():
        vars(twin)[name] = _rebuilt(member, make)
    return twin


def _deeply_rebuilt(value: Any, make: Callable[[Tensor], Tensor]) -> Any:
    """What `_rebuilt` gives, of other types: a deep copy, or without its type what has no copy.

    Where `make` gives the tensors themselves, what has no copy is handed out as it is.
    """
    tensors = list(_tensors_within(value, set()))
    made = [make(tensor) for tensor in tensors]
    try:
        return copy.deepcopy(value, {id(old): new for old, new in zip(tensors, made, strict=True)})
    except Exception:
        if all(new is old for new, old in zip(made, tensors, strict=True)):
            return value
        if isinstance(value, Mapping):
            return {key: _rebuilt(member, make) for key, member in value.items()}
        if isinstance(value, tuple | list):
            return [_rebuilt(member, make) for member in value]
        return SimpleNamespace(**{name: _rebuilt(member, make) for name, member in _fields_of(value)})


def _fields_of(value: Any) -> Iterator[tuple[str, Any]]:
    """The fields of a dataclass that are set."""
    for field in dataclasses.fields(value):
        if hasattr(value, field.name):
            yield field.name, getattr(value, field.name)


def _tensors_within(value: Any, seen: set[int]) -> Iterator[Tensor]:
    """The tensors of a structure, and those that its members of other types, such as a cache, have as attributes."""
    if id(value) in seen or isinstance(value, type | nn.Module):
        return
    seen.add(id(value))
    if isinstance(value, Tensor):
        yield value
        return
    members = list(value.values()) if isinstance(value, Mapping) else []
    members += value if isinstance(value, tuple | list) else []
    members += (member for _, member in _fields_of(value)) if dataclasses.is_dataclass(value) else ()
    for member in (*members, *getattr(value, "__dict__", {}).values()):
        yield from _tensors_within(member, seen)


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for member in value.values():
            yield from _tensors(member)
    elif isinstance(value, tuple | list):
        for member in value:
            yield from _tensors(member)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for _, member in _fields_of(value):
            yield from _tensors(member)
