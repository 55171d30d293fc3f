"""The two sides of a comparison: what each holds, in order, and its numbers piece by piece."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from itertools import chain
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from activation_extractor._format._entry_names import Key
from activation_extractor._tensors import as_plain, ordinary
from activation_extractor.activations import Activations
from activation_extractor.activations._saved import SavedActivations
from activation_extractor.errors import ArgumentTypeError
from activation_extractor.store import Column, Store

_PIECE_VALUES = 1 << 18  # 2 MiB as float64, which stays in a processor's cache


class Value(Protocol):
    """One value of a side; its shape has None for an axis along which rows differ."""

    dtype: torch.dtype
    shape: tuple[int | None, ...]

    def lengths(self) -> list[int] | None:
        """How many positions each row has, where rows can differ in that."""
        ...

    def blocks(self) -> Iterable[Tensor]:
        """All numbers in order, in tensors of any shape and about a MiB, or a row where that has more."""
        ...


class Side:
    """What is compared: a `Store`, or else tensors by key, of `Activations` or a mapping.

    The keys are in order; with ``calls="all"`` there is one for each call. Another `source` is an `ArgumentTypeError`
    that names the `argument`.
    """

    def __init__(self, source: Any, argument: str) -> None:
        if not isinstance(source, Mapping):
            condition = "be Activations, a Store, or a mapping of names to tensors"
            raise ArgumentTypeError(argument, condition, source, "Open a store with open_store.")
        self.store = source if isinstance(source, Store) else None
        self.tensors: Mapping[Key, Tensor] = {}
        if isinstance(source, SavedActivations):
            self.tensors = source  # which reads a value when it is asked for
        elif not isinstance(source, Store):
            self.tensors = dict(_tensors(source, argument))
        self.keys: list[Key] = list(source.pairs if isinstance(source, Store) else self.tensors)

    def value(self, key: Key, rows: Tensor | None = None) -> Value:
        """The value of a key; with `rows`, a column's rows in that order."""
        if self.store is not None:
            return _ColumnValue(self.store[key], rows)
        tensor = self.tensors[key]
        return _NestedValue(tensor) if tensor.is_nested else _TensorValue(tensor)


class _TensorValue:
    """A tensor in memory; one without axes is one row."""

    def __init__(self, tensor: Tensor) -> None:
        self.dtype, self._rows = tensor.dtype, tensor if tensor.dim() else tensor[None]
        self.shape: tuple[int | None, ...] = tuple(tensor.shape)

    def lengths(self) -> list[int] | None:
        return None

    def blocks(self) -> Iterable[Tensor]:
        return torch.split(self._rows, max(1, _PIECE_VALUES // max(1, math.prod(self._rows.shape[1:]))))


class _NestedValue:
    """A nested tensor: rows of different lengths."""

    def __init__(self, tensor: Tensor) -> None:
        self.dtype, self._rows = tensor.dtype, tensor.unbind()
        forms = {row.shape[1:] for row in self._rows}
        if len(forms) > 1:
            condition = "be one whose rows differ in their length alone"
            raise ArgumentTypeError("a nested tensor", condition, [tuple(row.shape) for row in self._rows])
        self.shape: tuple[int | None, ...] = (len(self._rows), None, *(forms.pop() if forms else ()))

    def lengths(self) -> list[int] | None:
        return [row.shape[0] if row.dim() else 1 for row in self._rows]

    def blocks(self) -> Iterable[Tensor]:
        return self._rows


class _ColumnValue:
    """A column of a store: all of it, or some rows in another order."""

    def __init__(self, column: Column, rows: Tensor | None) -> None:
        self._column, self._rows, self.dtype = column, rows, column.dtype
        self.shape: tuple[int | None, ...] = column.shape

    def lengths(self) -> list[int] | None:
        if not self._column.is_ragged:
            return None
        lengths = self._column.lengths()
        return list((lengths if self._rows is None else lengths[self._rows]).tolist())

    def blocks(self) -> Iterable[Tensor]:
        blocks = self._column.blocks(indices=self._rows)
        return chain.from_iterable(blocks) if self._column.is_ragged else blocks


def paired_pieces(left: Value, right: Value) -> Iterator[tuple[Tensor, Tensor]] | None:
    """The numbers of both, flat and equally many at a time; None when their shapes differ.

    Ragged rows that are all equally long have the shape of a tensor with a sequence axis.
    """
    if len(left.shape) != len(right.shape):
        return None
    if any(None not in sizes and sizes[0] != sizes[1] for sizes in zip(left.shape, right.shape, strict=True)):
        return None
    lengths, others = left.lengths(), right.lengths()
    if lengths is not None or others is not None:
        lengths = lengths or [left.shape[1] or 0] * (left.shape[0] or 0)
        others = others or [right.shape[1] or 0] * (right.shape[0] or 0)
        if lengths != others:
            return None
    return zip(_pieces(left), _pieces(right), strict=True)


def _pieces(value: Value) -> Iterator[Tensor]:
    """All numbers of a value, flat, `_PIECE_VALUES` at a time, however it is cut into blocks."""
    held, count = [], 0
    for block in value.blocks():
        held.append(block.reshape(-1))
        count += block.numel()
        if count >= _PIECE_VALUES:
            *pieces, rest = torch.split(torch.cat(held), _PIECE_VALUES)
            yield from pieces
            held, count = [rest], len(rest)
    if count:
        yield torch.cat(held)


def _tensors(source: Mapping[Any, Any], argument: str) -> Iterator[tuple[Key, Tensor]]:
    """The tensors in memory, by key; with ``calls="all"`` one for each call."""
    for key in source.pairs if isinstance(source, Activations) else source:
        name, reducer = key if isinstance(key, tuple) and len(key) == 2 else (key, None)
        if not isinstance(name, str) or not isinstance(reducer, str | None):
            raise ArgumentTypeError(f"a key of {argument}", "be a name or a (name, reducer)", key)
        value = source[key]
        if isinstance(value, list):
            calls = enumerate(value)
            yield from (((f"{name}#{number}", reducer), _tensor(tensor, argument, name)) for number, tensor in calls)
        else:
            yield (name, reducer), _tensor(value, argument, name)


def _tensor(value: Any, argument: str, layer: str) -> Tensor:
    if isinstance(value, np.ndarray):
        native = value.astype(value.dtype.newbyteorder("="), copy=False)
        with suppress(TypeError):  # torch has no such numbers: the array is refused below
            value = torch.from_numpy(np.require(native, requirements=["C", "W"]))
    if not isinstance(value, Tensor):
        raise ArgumentTypeError(f"a value in {argument}", "be a tensor, or an array of numbers", value)
    return ordinary(value.detach()) if value.is_nested else as_plain(value, layer, "in a comparison")
