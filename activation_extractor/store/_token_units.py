"""Where the tokens of columns, or their rows, lie in the shards, and reading them from there as records of bytes."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from itertools import accumulate, chain, tee, zip_longest
from typing import Any

import numpy as np
import torch
from torch import Tensor

from activation_extractor._requests import AHEAD_BYTES, ahead
from activation_extractor._streams import pinned
from activation_extractor.errors import StoreError
from activation_extractor.store._columns import Column
from activation_extractor.store._text_columns import TextColumn
from activation_extractor.store._token_order import Window

_Array = np.ndarray[Any, np.dtype[Any]]
Runs = Sequence[tuple[int, int]]  # of consecutive units: the first of them, and how many there are
_TEXT_BYTES = 128  # about what a string of a kept column takes
_AHEAD = AHEAD_BYTES // 4  # counted for each piece that is read before it is asked for, by many requests


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
        self.column, self._parts, self.is_remote = column, column._parts, column._parts.is_remote
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

    def read(self, runs: Runs, out: _Array) -> None:
        """Fill a contiguous array of records with runs of consecutive units."""
        data, size = memoryview(out.view(np.uint8)), self.nbytes  # type: ignore[arg-type]
        wanted: dict[int, list[tuple[memoryview, int]]] = {}
        for run in runs:
            for number, start, stop in self._spans(*run):
                part, data = data[: (stop - start) * size], data[(stop - start) * size :]
                wanted.setdefault(number, []).append((part, start * size))
        self._parts.read_many(wanted)

    def rows(self, runs: Runs) -> _Array:
        """The rows of the store that runs of consecutive units are of, ``(units,)`` int64."""
        found = []
        for number, start, stop in chain.from_iterable(self._spans(*run) for run in runs):
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
        self.is_remote = units[0].is_remote

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

    def read(self, runs: Runs, outs: list[_Array]) -> None:
        """Fill memory of `staging` with runs of consecutive units."""
        for units, out in zip(self._units, outs, strict=True):
            units.read(runs, out)


class RowField:
    """Of each unit the number of its row, or what kept columns hold for that row."""

    def __init__(self, units: Units, column: Column | TextColumn | None) -> None:
        self._units, self._column, self.is_remote = units, column, units.is_remote
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

    def read(self, runs: Runs, outs: list[_Array]) -> None:
        """Fill memory of `staging` with runs of consecutive units."""
        rows = self._units.rows(runs)
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
        self.is_remote = any(field.is_remote for field in fields)
        self._staging: list[list[_Array]] = []

    def __reduce__(self) -> Any:
        return Source, (self.fields, self.at_once)

    def empty(self, count: int, *, is_pinned: bool = False) -> list[Any]:
        """Memory for units, of each field."""
        return [field.empty(count, is_pinned=is_pinned) for field in self.fields]

    def staged(self, window: Window, spans: Iterable[tuple[int, int]]) -> Iterator[tuple[int, int, list[list[_Array]]]]:
        """Read spans of a window in pieces, into memory that is used again: where each begins and ends, and its units.

        Out of a bucket some pieces are read ahead.
        """
        pieces: Iterator[tuple[int, int]] = (
            (first, min(first + self.at_once, stop))
            for start, stop in spans
            for first in range(start, stop, self.at_once)
        )
        if not self.is_remote:
            self._staging = self._staging or self._new_staging(self.at_once)
            return ((*piece, self._stage(list(window.runs(*piece)), self._staging)) for piece in pieces)
        pieces, others = tee(pieces)
        reads = (  # memory is made by the thread that frees it: what another one frees, malloc keeps for itself
            (partial(self._stage, list(window.runs(*piece)), self._new_staging(piece[1] - piece[0])), _AHEAD)
            for piece in others
        )
        return ((*piece, staged) for piece, staged in zip(pieces, ahead(reads), strict=True))

    def read_in_order(self, first: int, count: int, memory: Sequence[list[_Array]]) -> None:
        """Fill memory, given as the `parts` of each field, with consecutive units."""
        if all(part.flags.c_contiguous for parts in memory for part in parts):
            for field, parts in zip(self.fields, memory, strict=True):
                field.read([(first, count)], parts)
            return
        for start in range(0, count, self.at_once):
            size = min(self.at_once, count - start)
            self.put(memory, self._stage([(first + start, size)]), slice(start, start + size))

    def put(self, memory: Sequence[list[_Array]], staged: list[list[_Array]], places: _Array | slice) -> None:
        """Bring units of `staged` to these places of memory, given as the `parts` of each field."""
        for parts, values in zip(memory, staged, strict=True):
            for part, value in zip(parts, values, strict=True):
                part[places] = value

    def _stage(self, runs: Runs, staging: list[list[_Array]] | None = None) -> list[list[_Array]]:
        """Runs of units, in memory of `_new_staging`."""
        count = sum(size for _, size in runs)
        staged = [[part[:count] for part in parts] for parts in staging or self._new_staging(count)]
        for field, parts in zip(self.fields, staged, strict=True):
            field.read(runs, parts)
        return staged

    def _new_staging(self, count: int) -> list[list[_Array]]:
        return [field.staging(count) for field in self.fields]


def _bytes_of(values: Tensor) -> _Array:
    return values.reshape(-1).view(torch.uint8).numpy()
