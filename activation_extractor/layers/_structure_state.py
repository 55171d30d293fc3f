"""The tensors in a structure at one moment: whether a user's callable has written to one, moved or replaced it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from activation_extractor._private_torch import is_placeholder, version_of
from activation_extractor._tensors import is_special, parts_of


class StructureState:
    """What a structure holds when this is made: in lists, dicts, dataclasses and attributes of other objects.

    Writes through ``.data`` or numpy are counted by no version counter: they are seen with `has_contents` alone, which
    copies each tensor.
    """

    def __init__(self, value: Any, *, has_contents: bool) -> None:
        self._places: list[_Place] = []  # of tensors, of what holds them, and of numbers beside them
        self._sizes: list[tuple[Any, int]] = []
        self._tensors: dict[int, Tensor] = {}
        self._visit(value, {})
        self._marks = {key: _marks(tensor) for key, tensor in self._tensors.items()}
        self._contents = (
            {key: _contents(tensor, copy=True) for key, tensor in self._tensors.items()} if has_contents else {}
        )

    def is_kept(self) -> bool:
        """Whether all of it is as it was. An object may have got new attributes, in which it keeps what it computed."""
        return (
            all(len(container) == size for container, size in self._sizes)
            and all(place.is_kept() for place in self._places)
            and all(_marks(self._tensors[key]) == marks for key, marks in self._marks.items())
            and all(_are_equal(kept, _contents(self._tensors[key])) for key, kept in self._contents.items())
        )

    def _visit(self, value: Any, seen: dict[int, Any]) -> bool:
        """Add the tensors in a value; returns whether there are any. `seen` has what was visited, by id."""
        if isinstance(value, Tensor):
            self._tensors[id(value)] = value
            return True
        if id(value) in seen or isinstance(value, type | nn.Module):
            return False
        seen[id(value)] = value
        found, numbers = False, []
        for place in _places(value):
            if type(place.member) is int and place.is_attribute:
                numbers.append(place)
            elif self._visit(place.member, seen):
                found = True
                self._places.append(place)
        if found:
            self._places += numbers
            self._sizes += [(value, len(value))] if isinstance(value, dict | list) else []
        return found


class _Place(NamedTuple):
    """Where a member of a structure is: under a key of a list, tuple or dict, or as an attribute."""

    container: Any
    key: Any
    is_attribute: bool
    member: Any

    def is_kept(self) -> bool:
        """Whether the same member is still there."""
        container, key = self.container, self.key
        if self.is_attribute:
            members = getattr(container, "__dict__", None)
            return (getattr(container, key, None) if members is None else members.get(key)) is self.member
        if isinstance(container, dict):
            return dict.get(container, key) is self.member
        if isinstance(container, list | tuple):
            return key < len(container) and container[key] is self.member
        return True  # another mapping makes its members when they are asked for, or has them as attributes


def _places(value: Any) -> Iterator[_Place]:
    if isinstance(value, list | tuple):
        yield from (_Place(value, index, False, member) for index, member in enumerate(value))
    elif isinstance(value, Mapping):
        items = dict.items(value) if isinstance(value, dict) else value.items()
        yield from [_Place(value, key, False, member) for key, member in items]
    elif dataclasses.is_dataclass(value) and not hasattr(value, "__dict__"):  # it has slots
        names = [field.name for field in dataclasses.fields(value) if hasattr(value, field.name)]
        yield from (_Place(value, name, True, getattr(value, name)) for name in names)
    yield from [_Place(value, name, True, member) for name, member in getattr(value, "__dict__", {}).items()]


def _marks(tensor: Tensor) -> Any:
    """What changes when a tensor is written to as torch counts it, or is given other memory or another shape."""
    version = None if tensor.is_inference() else version_of(tensor)
    if type(tensor) not in (Tensor, nn.Parameter) or is_special(tensor):
        return version
    return version, tensor.shape, tensor.stride(), tensor.storage_offset(), tensor.data_ptr()


def _contents(tensor: Tensor, *, copy: bool = False) -> list[Tensor]:
    """The bytes of a tensor of any kind, or copies of them; none where there are none that can be read."""
    if is_placeholder(tensor) or tensor.is_meta:
        return []
    parts: Iterable[Tensor] | None = parts_of(tensor)
    if tensor.is_nested:
        parts = tensor.unbind()
    elif tensor.is_quantized:
        parts = [tensor.int_repr()]
    if parts is not None:
        return [content for part in parts for content in _contents(part, copy=copy)]
    try:
        plain = tensor.detach().resolve_conj().resolve_neg()
        plain = plain.clone(memory_format=torch.contiguous_format) if copy else plain.contiguous()
        return [plain.flatten().view(torch.uint8)]
    except (RuntimeError, NotImplementedError, TypeError):  # of a kind that few operations know
        return []


def _are_equal(kept: list[Tensor], found: list[Tensor]) -> bool:
    return len(kept) == len(found) and all(map(torch.equal, kept, found))
