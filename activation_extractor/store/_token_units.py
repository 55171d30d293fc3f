"""Where the tokens of columns, or their rows, lie in the shards, and reading them from there as records of bytes."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate, zip_longest
from typing import Any

import numpy as np
import torch
from torch import Tensor

from activation_extractor._streams import pinned
from activation_extractor.errors import StoreError
from activation_extractor.store._columns import Column
from activation_extractor.store._text_columns import TextColumn

_Array = np.ndarray[Any, np.dtype[Any]]
_TEXT_BYTES = 128  # about what a string of a kept column takes


class Units:
    """The units of a column that are handed out one by one: its tokens or its rows, counted over all shards.

    Args:
        column: the column.
        are_tokens: whether units are tokens.
        like: units that belong to these one by one; a row ``(seq,)`` is one of tokens if theirs have so many.

    Attributes:
        shape: of a unit.
        starts: the first unit of each shard, and the number of all units.

    Raises:
        StoreError: its rows are not made of tokens, or hold no values; a shard is damaged or gone.
    """

    def __init__(self, column: Column, are_tokens: bool, like: Units | None = None) -> None:
        self.column, self._parts = column, column._parts
        self.per_row, self.shape, axes = 1, column.row_shape, len(column.row_shape)
        self.is_of_positions: bool = (
            column.is_ragged or axes > 1 or (like is not None and like.is_of_positions and axes == 1)
        )
        if column.is_ragged and not are_tokens:
            advice = "Ask store.tokens for the positions of its rows."
            raise StoreError(repr(column), "have rows of one shape", "rows that differ in length", advice)
        if are_tokens and self.is_of_positions and not column.is_ragged:
            if axes > 2:
                advice = "Ask store.batches for whole rows, or store what a reducer makes of them."
                raise StoreError(repr(column), "have rows of (features,) or (seq, features)", "more axes", advice)
            self.per_row, self.shape = column.row_shape[0], column.row_shape[1:]
        self.nbytes = column.dtype.itemsize * math.prod(self.shape)
        if not self.nbytes:
            raise StoreError(repr(column), "hold values", "rows of none", "Ask for another column.")
        self.starts = [0, *accumulate(count * self.per_row for count in self._parts.counts())]
        self._index: list[tuple[Any, ...]] | None = None  # of each shard what `Parts.scan` tells

    def __len__(self) -> int:
        return self.starts[-1]

    def locate(self, index: Iterable[tuple[Any, ...]]) -> None:
        """Take note of where units are, from what `Parts.scan` tells."""
        self._index = list(index)
        self.starts = [0, *accumulate(count * self.per_row for _, count, *_ in self._index)]

    def check_like(self, other: Units, rows: int) -> None:
        """Refuse units that do not belong to those of another column of a store of so many rows one by one."""
        one, two = self.column, other.column
        are_alike = self.starts == other.starts and len(one) == len(two)
        if are_alike and one.is_ragged != two.is_ragged:  # where all rows have as many positions as those of the other
            ragged, dense = (self, other) if one.is_ragged else (other, self)
            are_alike = len(one) == rows and bool((ragged.column.lengths() == dense.per_row).all())
        elif are_alike:
            are_alike = self.per_row == other.per_row and self._index == other._index
        if not are_alike:
            got = f"other rows or lengths than {other.column!r}"
            advice = "Ask for each in a call of its own; what belongs to whole rows can be kept, keep=."
            raise StoreError(repr(self.column), "belong to the other columns token by token", got, advice)

    def read(self, first: int, count: int, out: _Array) -> None:
        """Fill a contiguous array of records with consecutive units."""
        data, size = memoryview(out.view(np.uint8)), self.nbytes  # type: ignore[arg-type]
        for number, start, stop in self._spans(first, count):
            part, data = data[: (stop - start) * size], data[(stop - start) * size :]
            self._parts.read_bytes(number, part, start * size)

    def rows(self, first: int, count: int) -> _Array:
        """The rows of the store that consecutive units are of, ``(count,)`` int64."""
        found = []
        for number, start, stop in self._spans(first, count):
            units = np.arange(start, stop)
            if self.column.is_ragged:
                units = np.searchsorted(self._parts.row_ends(number), units, side="right")
            found.append(self._parts.numbers_in(number)[units // self.per_row])
        return np.concatenate(found)

    def _spans(self, first: int, count: int) -> Iterator[tuple[int, int, int]]:
        """The shards that hold consecutive units, and where in them these begin and end."""
        number, stop = bisect_right(self.starts, first) - 1, first + count
        while first < stop:
            start, end = self.starts[number], min(stop, self.starts[number + 1])
            if first < end:
                yield number, first - start, end - start
            first, number = max(first, end), number + 1


def scan(units: Sequence[Units], rows: int) -> None:
    """Find where the units of columns of a store of so many rows are, and refuse those that do not belong together.

    The header of each shard is read once, whatever the number of columns; none is where rows are all of one shape.
    """
    others = units[1:]
    scanned = [one for one in units if one.column.is_ragged or (others and len(one.column) != rows)]
    shards = list(zip_longest(*(one.column._parts.scan() for one in scanned)))
    for one, index in zip(scanned, zip(*shards, strict=True), strict=bool(shards)):
        one.locate(shard for shard in index if shard is not None)
    for other in others:
        other.check_like(units[0], rows)


class StackedField:
    """Values of columns of one shape and dtype: ``(units, *shape)``, of several ``(units, keys, *shape)``."""

    def __init__(self, units: Sequence[Units]) -> None:
        self._units, self.dtype = units, units[0].column.dtype
        self.shape = (*([len(units)] if len(units) > 1 else []), *units[0].shape)
        self.nbytes = sum(unit.nbytes for unit in units)

    def empty(self, count: int, *, is_pinned: bool = False) -> Tensor:
        """Memory for units."""
        shape = (count, *self.shape)
        return pinned(shape, self.dtype) if is_pinned else torch.empty(shape, dtype=self.dtype)

    def records(self, values: Tensor) -> _Array:
        """A view of values: a record of bytes for each unit."""
        return _bytes_of(values).view(f"V{self.nbytes}")

    def parts(self, values: Tensor) -> list[_Array]:
        """A view of values for each key: a record of bytes for each unit."""
        size = self.nbytes // len(self._units)
        by_key = _bytes_of(values).reshape(len(values), len(self._units), size)
        return [by_key[:, key].view(f"V{size}")[:, 0] for key in range(len(self._units))]

    def staging(self, count: int) -> list[_Array]:
        """Memory for consecutive units of each key."""
        return [np.empty(count, f"V{units.nbytes}") for units in self._units]

    def read(self, first: int, count: int, outs: list[_Array]) -> None:
        """Fill memory of `staging` with consecutive units."""
        for units, out in zip(self._units, outs, strict=True):
            units.read(first, count, out)


class RowField:
    """Of each unit the number of its row, or what kept columns hold for that row."""

    def __init__(self, units: Units, column: Column | TextColumn | None) -> None:
        self._units, self._column = units, column
        self._is_text = isinstance(column, TextColumn)
        self.dtype = column.dtype if isinstance(column, Column) else torch.int64
        self.shape: tuple[int, ...] = column.row_shape if isinstance(column, Column) else ()
        self.nbytes = _TEXT_BYTES if self._is_text else self.dtype.itemsize * math.prod(self.shape)

    def empty(self, count: int, *, is_pinned: bool = False) -> Any:
        """Memory for units: a tensor; for text an array of objects."""
        if self._is_text:
            return np.empty(count, object)
        shape = (count, *self.shape)
        return pinned(shape, self.dtype) if is_pinned else torch.empty(shape, dtype=self.dtype)

    def records(self, values: Any) -> _Array:
        """A view of values: a record for each unit."""
        return values if self._is_text else _bytes_of(values).view(f"V{self.nbytes}")

    def parts(self, values: Any) -> list[_Array]:
        """The same in a list."""
        return [self.records(values)]

    def staging(self, count: int) -> list[_Array]:
        """Memory for consecutive units."""
        return self.parts(self.empty(count))

    def read(self, first: int, count: int, outs: list[_Array]) -> None:
        """Fill memory of `staging` with consecutive units."""
        rows = self._units.rows(first, count)
        if self._column is None:
            outs[0][:] = rows.view("V8")
            return
        distinct, places = np.unique(rows, return_inverse=True)
        values = self._column[distinct]
        found = np.array([*values, None], object)[:-1] if self._is_text else self.records(values)
        outs[0][:] = found[places]


Field = StackedField | RowField


def result(values: Any) -> Tensor | list[str]:
    """What a field's memory is handed out as."""
    return values if isinstance(values, Tensor) else values.tolist()


class Source:
    """Reads runs of consecutive units of several fields into memory of theirs."""

    def __init__(self, fields: Sequence[Field], at_once: int) -> None:
        self.fields, self.at_once = fields, at_once
        self.nbytes = sum(field.nbytes for field in fields)
        self._staging: list[list[_Array]] = []

    def __reduce__(self) -> Any:
        return Source, (self.fields, self.at_once)

    def empty(self, count: int, *, is_pinned: bool = False) -> list[Any]:
        """Memory for units, of each field."""
        return [field.empty(count, is_pinned=is_pinned) for field in self.fields]

    def read(self, runs: Iterable[tuple[int, int]], memory: Sequence[list[_Array]], places: _Array) -> None:
        """Read runs of units, ``(first, count)``, to these places of memory, given as the `parts` of each field."""
        self._staging = self._staging or [field.staging(self.at_once) for field in self.fields]
        filled = done = 0
        for first, count in runs:
            while count:
                size = min(count, self.at_once - filled)
                for field, staged in zip(self.fields, self._staging, strict=True):
                    field.read(first, size, [part[filled : filled + size] for part in staged])
                first, count, filled = first + size, count - size, filled + size
                if filled == self.at_once:
                    self._put(memory, places[done : done + filled])
                    filled, done = 0, done + filled
        self._put(memory, places[done : done + filled])

    def read_in_order(self, first: int, count: int, memory: Sequence[list[_Array]]) -> None:
        """Fill memory, given as the `parts` of each field, with consecutive units."""
        if all(part.flags.c_contiguous for parts in memory for part in parts):
            for field, parts in zip(self.fields, memory, strict=True):
                field.read(first, count, parts)
        else:
            self.read([(first, count)], memory, np.arange(count))

    def _put(self, memory: Sequence[list[_Array]], places: _Array) -> None:
        for parts, staged in zip(memory, self._staging, strict=True):
            for part, values in zip(parts, staged, strict=True):
                part[places] = values[: len(places)]


def _bytes_of(values: Tensor) -> _Array:
    return values.reshape(-1).view(torch.uint8).numpy()
