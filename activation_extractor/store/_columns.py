"""Columns of a store: read piece by piece from the shards that hold them."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, chain
from typing import Any

import numpy as np
import torch
from torch import Tensor

from activation_extractor._format._fields import Field
from activation_extractor._format._reader import Reader, Values
from activation_extractor._format._shards import Shard
from activation_extractor._tensors import numpy_has, to_numpy
from activation_extractor.errors import ArgumentTypeError, StoreError

_BLOCK_BYTES = 1 << 20  # read at once where rows are walked through
_RAGGED_BLOCK = 256


@dataclass(frozen=True)
class Part:
    """What one shard holds of a column.

    Attributes:
        path: the shard.
        count: how many rows of the column it has.
        first_row: the row of the store that is the shard's first one.
    """

    path: str
    count: int
    first_row: int


class Column:
    """A column of a store, one row for each sample; nothing is read before it is asked for.

    ``column[3]`` is a row, ``column[10:20]`` and ``column[[4, 2]]`` are ``(rows, *row)`` tensors on the CPU, new
    memory each time; only their bytes are read. In a ragged column a row is ``(positions, *features)`` and several
    rows are a list. A column can be handed to other processes, which open files of their own, and used by threads.

    Attributes:
        name: what it is called in its store.
        dtype: the dtype on disk.
        row_shape: the shape of a row; of a position, when ragged.
        is_ragged: whether rows differ in length.
    """

    def __init__(self, field: Field, reader: Reader, parts: Sequence[Part]) -> None:
        self.name: Any = field.key
        self._field, self._entry, self._reader, self._parts = field, field.entry, reader, tuple(parts)
        self.dtype, self.row_shape, self.is_ragged = field.dtype, field.row_shape, field.is_ragged
        self._starts = [0, *accumulate(part.count for part in parts)]
        self._fitting: set[int] = set()  # parts whose header was seen to fit

    def __reduce__(self) -> Any:
        return Column, (self._field, self._reader, self._parts)

    def __len__(self) -> int:
        return self._starts[-1]

    @property
    def shape(self) -> tuple[int | None, ...]:
        """``(rows, *row_shape)``; a ragged column has None for the axis that differs."""
        return (len(self), None, *self.row_shape) if self.is_ragged else (len(self), *self.row_shape)

    @property
    def rows(self) -> Tensor:
        """The rows of the store that the column has, ``(len(column),)`` int64.

        All of them, unless a layer that runs conditionally was captured with ``missing="skip"``.
        """
        parts = [self._reader.row_numbers(part.path, self._entry) + part.first_row for part in self._parts]
        return torch.cat([torch.empty(0, dtype=torch.int64), *parts])

    def __repr__(self) -> str:
        return f"Column({self.name!r}, {self.shape}, {str(self.dtype).removeprefix('torch.')})"

    def __getitem__(self, index: Any) -> Any:
        """A row for an integer; rows for a slice, a sequence of integers or a boolean mask.

        Raises:
            IndexError: there is no such row.
            ArgumentTypeError: an index of another kind.
            StoreError: a shard is damaged or gone.
        """
        if type(index) is int:
            return self._row(self._checked(index))
        if isinstance(index, slice):
            rows = range(len(self))[index]
            return self._gather(rows if rows.step == 1 else np.asarray(rows))
        if isinstance(index, np.integer):
            return self._row(self._checked(int(index)))
        if isinstance(index, np.ndarray | Tensor) and not index.ndim and index.dtype not in (np.bool_, torch.bool):
            return self[index.item()]
        return self._gather(np.array([self._checked(one) for one in self._integers(index)], dtype=np.int64))

    def __iter__(self) -> Iterator[Tensor]:
        """The rows one by one, read in blocks."""
        size = self.dtype.itemsize * max(1, int(np.prod(self.row_shape)))
        block = _RAGGED_BLOCK if self.is_ragged else max(1, _BLOCK_BYTES // size)
        return chain.from_iterable(self[start : start + block] for start in range(0, len(self), block))

    def torch(self) -> Tensor:
        """The whole column, ``(rows, *row_shape)``; ragged rows of one length too, as ``(rows, positions, ...)``.

        Raises:
            StoreError: ragged rows of different lengths, or a damaged shard.
        """
        rows = self[:]
        if not self.is_ragged:
            whole: Tensor = rows
            return whole
        if len({len(row) for row in rows}) > 1:
            advice = "Take rows one by one, column[i], or flatten them with column.flat()."
            raise StoreError(self.name, "have rows of one length to become one tensor", "different lengths", advice)
        return torch.stack(rows) if rows else torch.empty(0, 0, *self.row_shape, dtype=self.dtype)

    def numpy(self) -> np.ndarray[Any, Any]:
        """The whole column as an array, as `torch` gives it; bfloat16 and float8 become float32."""
        return to_numpy(self.torch())

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray[Any, Any]:
        if copy is False:
            array = self._as_view()
            if dtype is not None and array.dtype != dtype:
                raise ValueError(f"A view of {self!r} must keep its dtype, got dtype={dtype}. Leave copy=False out.")
            return array
        return np.asarray(self.numpy(), dtype=dtype)

    def mapped(self) -> list[Tensor]:
        """The column without a copy: for each shard a tensor over the mapped file, ragged ones flat.

        Nothing is read before it is touched. Writes to such a tensor stay in memory and never reach the file. Cutting
        a mapped file short elsewhere crashes a process that touches the lost part, as with any memory map; every
        other way of reading gives an error instead.
        """
        return [self._values(number).mapped() for number in range(len(self._parts))]

    def flat(self) -> Tensor:
        """The positions of all rows of a ragged column one behind the other, ``(positions, *features)``, new memory."""
        self._check_ragged()
        numbers = range(len(self._parts))
        counts = [self._values(number).extent.shape[0] for number in numbers]  # no part stays open for its count
        out = torch.empty((sum(counts), *self.row_shape), dtype=self.dtype)
        for number, part in zip(numbers, torch.split(out, counts), strict=True):
            self._values(number).read_into(part, 0)
        return out

    def lengths(self) -> Tensor:
        """How many positions each row of a ragged column has, ``(rows,)`` int64."""
        self._check_ragged()
        for number in range(len(self._parts)):
            self._values(number)  # is ragged, as the store was told
        parts = [self._reader.offsets(part.path, self._entry, 0, None).diff() for part in self._parts]
        return torch.cat([torch.empty(0, dtype=torch.int64), *parts])

    def _as_view(self) -> np.ndarray[Any, Any]:
        if len(self._parts) != 1 or self.is_ragged or not numpy_has(self.dtype):
            raise ValueError(f"A view must be of one shard in a dtype of numpy, got {self!r}. Use column.mapped().")
        return to_numpy(self.mapped()[0])

    def _check_ragged(self) -> None:
        if not self.is_ragged:
            advice = "Read it with column[...] or column.torch()."
            raise StoreError(self.name, "be ragged to have positions", "a column of rows of one shape", advice)

    def _integers(self, index: Any) -> list[int]:
        array = np.asarray(None if isinstance(index, tuple) else index)
        if array.dtype == bool and array.shape == (len(self),):
            return [int(one) for one in np.flatnonzero(array)]
        if array.ndim != 1 or not (np.issubdtype(array.dtype, np.integer) or array.size == 0):
            condition = "be an integer, a slice, integers, or a boolean for each row"
            raise ArgumentTypeError("an index into a column", condition, index)
        return [int(one) for one in array]

    def _checked(self, index: int) -> int:
        length = self._starts[-1]
        if not -length <= index < length:
            raise IndexError(f"A row index must be below {length}, got {index}. len(column) tells the number of rows.")
        return index + length if index < 0 else index

    def _values(self, number: int) -> Values:
        """The values of a part, once its header has been seen to fit what the store was told."""
        if number not in self._fitting:
            _check(self._reader.shard(self._parts[number].path), self._field)
            self._fitting.add(number)
        return self._reader.open(self._parts[number].path, self._entry)

    def _row(self, index: int) -> Tensor:
        number = bisect_right(self._starts, index) - 1
        row, values = index - self._starts[number], self._values(number)
        if not self.is_ragged:
            return values.row(row)
        start, stop = self._reader.offsets(self._parts[number].path, self._entry, row, row + 1).tolist()
        return values.rows(start, stop)

    def _gather(self, indices: range | np.ndarray[Any, Any]) -> Any:
        """The rows of these indices: runs of consecutive ones are read at once."""
        if self.is_ragged:
            return [row for first, stop in _runs(indices) for row in self._ragged_rows(first, stop)]
        if isinstance(indices, range) and (span := self._only_span(indices)):
            return span[0].rows(*span[1:])
        spans = [span for first, stop in _runs(indices) for span in self._spans(first, stop)]
        for number in {number for number, _, _ in spans}:
            self._values(number)  # is there as it should be, before memory is taken
        out, place = torch.empty((len(indices), *self.row_shape), dtype=self.dtype), 0
        for number, start, end in spans:
            self._values(number).read_into(out[place : place + end - start], start)
            place += end - start
        return out

    def _only_span(self, rows: range) -> tuple[Values, int, int] | None:
        """Where rows lie that are all in one shard."""
        number = bisect_right(self._starts, rows.start) - 1
        if not rows or rows.stop > self._starts[number + 1]:
            return None
        start = self._starts[number]
        return self._values(number), rows.start - start, rows.stop - start

    def _ragged_rows(self, first: int, stop: int) -> Iterator[Tensor]:
        for number, start, end in self._spans(first, stop):
            values = self._values(number)
            offsets = self._reader.offsets(self._parts[number].path, self._entry, start, end)
            positions = values.rows(int(offsets[0]), int(offsets[-1]))
            yield from torch.split(positions, offsets.diff().tolist())

    def _spans(self, first: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """The parts that hold consecutive rows, and where in them they begin and end."""
        number = bisect_right(self._starts, first) - 1
        while first < stop:
            start, end = self._starts[number], min(stop, self._starts[number + 1])
            if first < end:
                yield number, first - start, end - start
            first, number = max(first, end), number + 1


def _check(shard: Shard, field: Field) -> None:
    found = shard.field(field.entry)
    if found != replace(field, converted_from=None):
        got = f"{found.dtype} {found.row_shape} after {field.dtype} {field.row_shape}"
        raise StoreError(shard.path, f"hold {field.entry!r} like the other shards", got, "Restore it from a copy.")


def _runs(indices: range | np.ndarray[Any, Any]) -> Iterator[tuple[int, int]]:
    """Where runs of consecutive indices begin and end."""
    if isinstance(indices, range):
        if len(indices):
            yield indices.start, indices.stop
        return
    breaks = np.flatnonzero(np.diff(indices) != 1) + 1
    for run in np.split(indices, breaks):
        if len(run):
            yield int(run[0]), int(run[-1]) + 1
