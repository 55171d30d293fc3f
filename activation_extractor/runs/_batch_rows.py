"""The rows of a batch: how many there are, some of them alone, and a digest of each."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from enum import Enum
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from activation_extractor._format._digests import multipliers, parts_of
from activation_extractor._format._fingerprints import inputs_crc32

Digests: TypeAlias = "np.ndarray[Any, np.dtype[np.uint64]]"  # one for each row or batch, ``(items,)``

_SAMPLED_ELEMENTS = 1 << 14  # of a row; more are sampled at equal distances
_SAMPLED_FEATURES = 1 << 10  # of a position
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_OF_ALL_ROWS = (str, bytes, int, float, complex, Enum, torch.dtype, torch.device, np.generic)
_UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


def count_rows(arguments: Any) -> int | None:
    """The length that all tensors, arrays and lists of text among a call's arguments have; None where they differ."""
    members = arguments.values() if isinstance(arguments, Mapping) else _members(arguments)
    sizes = {size for value in members for size in _sizes(value)}
    return sizes.pop() if len(sizes) == 1 else None


def take_rows(value: Any, rows: int, chosen: Sequence[int]) -> Any:
    """The chosen rows of whatever in a value has a length of `rows`; anything else as it is.

    Raises:
        ValueError: what has rows cannot be told, as in a list of tensors that all have that length too.
    """
    if isinstance(value, Mapping):
        return {name: take_rows(member, rows, chosen) for name, member in value.items()}
    if isinstance(value, Tensor):
        if value.is_nested or value.layout is not torch.strided:
            raise ValueError(f"a tensor that is {'nested' if value.is_nested else 'sparse'}")
        return value[torch.as_tensor(chosen, device=value.device)] if _has_rows(value, rows) else value
    if isinstance(value, np.ndarray):
        return value[list(chosen)] if _has_rows(value, rows) else value
    if isinstance(value, list | tuple):
        return _take_members(value, rows, chosen)
    if isinstance(value, _OF_ALL_ROWS) or value is None or callable(value):
        return value
    raise ValueError(f"a value of type {type(value).__name__}")


def _take_members(value: list[Any] | tuple[Any, ...], rows: int, chosen: Sequence[int]) -> Any:
    members = [member for member in value if isinstance(member, Tensor | np.ndarray | Mapping | list | tuple)]
    is_row_each = len(value) == rows and not (members and count_rows(members) == rows)
    if is_row_each and members and isinstance(value, tuple):
        raise ValueError("a tuple of as many values as there are rows")
    if len(value) == rows and members and not is_row_each:
        raise ValueError("a list of as many tensors as each of them has rows")
    if is_row_each:
        return [value[row] for row in chosen]
    taken = [take_rows(member, rows, chosen) for member in value]
    return type(value)(*taken) if hasattr(value, "_fields") else type(value)(taken)


def row_digests(arguments: Mapping[str, Any], rows: int, mask: Any = None) -> Digests:
    """A 64-bit digest of each row of a call's arguments, ``(rows,)``, which the other rows of the batch do not change.

    Args:
        arguments: by name; a row of a value is a member of its first axis, where that has a length of `rows`. Other
            values count for each row.
        rows: how many there are.
        mask: ``(rows, seq)``, where positions are real. Values of that shape and more axes count there alone, wherever
            the first of these positions is, so that padding and its side do not matter.
    """
    if not rows:
        return np.zeros(0, np.uint64)
    is_real = _as_mask(mask, rows)
    sums, shared = np.zeros(rows, np.uint64), 0
    for name, value in _leaves("", arguments, rows):
        digests = _digests_of(value, rows, is_real)
        if digests is None:
            shared = inputs_crc32(value, inputs_crc32(name, shared))
        else:
            kind = inputs_crc32([name, *_kind(value, is_real)], 0)
            sums += _mixed(digests) * np.uint64(2 * kind + 1)
    return _mixed(sums + np.uint64(shared))


def combined(digests: Digests, places: Sequence[int]) -> int:
    """One 64-bit digest of items at their places in a unit; those of parts of a unit add up, modulo 2**64."""
    at = np.asarray(places, dtype=np.uint64) + np.uint64(1)
    return int(_mixed(digests + at * _GOLDEN).sum())


def _members(arguments: Any) -> Sequence[Any]:
    return arguments if isinstance(arguments, tuple | list) else [arguments]


def _sizes(value: Any) -> Iterator[int]:
    if isinstance(value, Mapping):
        for member in value.values():
            yield from _sizes(member)
    elif isinstance(value, Tensor | np.ndarray):
        if value.ndim:
            yield value.size(0) if isinstance(value, Tensor) else len(value)
    elif isinstance(value, list | tuple):
        if value and all(isinstance(member, str) for member in value):
            yield len(value)
        else:
            for member in value:
                yield from _sizes(member)


def _has_rows(value: Any, rows: int) -> bool:
    return bool(value.ndim > 0 and value.shape[0] == rows)


def _leaves(name: str, value: Any, rows: int) -> Iterator[tuple[str, Any]]:
    """The values of nested mappings, lists and tuples with their names; a list with a member for each row is one."""
    if isinstance(value, Mapping):
        for key, member in value.items():
            yield from _leaves(f"{name}.{key}", member, rows)
    elif isinstance(value, list | tuple) and (len(value) != rows or isinstance(value, tuple)):
        yield name, len(value)
        for number, member in enumerate(value):
            yield from _leaves(f"{name}.{number}", member, rows)
    else:
        yield name, value


def _digests_of(value: Any, rows: int, is_real: Any) -> Digests | None:
    """A digest for each row of a value; None where it has no rows."""
    if isinstance(value, Tensor) and value.is_nested and value.size(0) == rows:
        value = list(value.unbind())
    if isinstance(value, list) or (isinstance(value, np.ndarray) and value.dtype.hasobject and len(value) == rows):
        return np.array([inputs_crc32(member, 0) for member in value], dtype=np.uint64)
    elements = _elements(value, rows)
    if elements is None:
        return None
    if not elements.size:
        return np.zeros(rows, np.uint64)
    if is_real is not None and elements.shape[:2] == is_real.shape:
        return _sums_of_real(elements.reshape(*is_real.shape, -1), is_real)
    return _sums(elements.reshape(rows, -1), _SAMPLED_ELEMENTS)


def _elements(value: Any, rows: int) -> Any:
    """The bits of a tensor's or array's elements as unsigned integers, on the CPU; None where it has no rows."""
    if isinstance(value, Tensor):
        parts = parts_of(value)
        is_plain = len(parts) == 1 and parts[0] is value and value.layout is torch.strided and not value.is_quantized
        if not is_plain or value.is_meta or not _has_rows(value, rows):
            return None
        plain = value.detach().resolve_conj().resolve_neg()
        plain = (torch.view_as_real(plain) if plain.is_complex() else plain).contiguous()
        value = plain.view({1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[plain.element_size()])
        return value.cpu().numpy().view(_UNSIGNED[value.element_size()])
    if not isinstance(value, np.ndarray) or not _has_rows(value, rows) or value.dtype.itemsize not in _UNSIGNED:
        return None
    return np.ascontiguousarray(value).view(_UNSIGNED[value.dtype.itemsize])


def _sums(words: Any, most: int) -> Digests:
    """Sums over the last axis of words times numbers for their places, as in `tensor_sum`."""
    words = words[..., :: max(1, words.shape[-1] // most)].astype(np.uint64)
    sums: Digests = (words * multipliers()[: words.shape[-1]]).sum(-1, dtype=np.uint64)
    return sums


def _sums_of_real(words: Any, is_real: Any) -> Digests:
    """Sums over positions that are real, each by its distance from the first one that is."""
    numbers = multipliers()
    distances = (np.arange(is_real.shape[1]) - is_real.argmax(1)[:, None]) * is_real
    far, near = np.divmod(distances, len(numbers))
    weights = numbers[near] + np.uint64(2) * numbers[far]
    sums: Digests = (_mixed(_sums(words, _SAMPLED_FEATURES)) * weights * is_real).sum(1, dtype=np.uint64)
    return sums


def _mixed(values: Digests) -> Digests:
    """Values whose every bit depends on all bits before (a round of SplitMix64)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: Digests = values ^ (values >> np.uint64(31))
    return mixed


def _kind(value: Any, is_real: Any) -> tuple[Any, ...]:
    """The dtype of a tensor or array, and the shape of its rows, or of their positions where padding is left out."""
    if not isinstance(value, Tensor | np.ndarray) or getattr(value, "is_nested", False):
        return ()
    shape = tuple(value.shape)
    return (str(value.dtype), *shape[2 if is_real is not None and shape[:2] == is_real.shape else 1 :])


def _as_mask(mask: Any, rows: int) -> Any:
    if not isinstance(mask, Tensor) or mask.is_nested or mask.dim() != 2 or len(mask) != rows:
        return None
    return mask.detach().cpu().numpy().astype(bool)
