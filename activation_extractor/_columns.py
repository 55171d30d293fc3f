"""Columns of a store: read piece by piece from the shards that hold them."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from activation_extractor._values import to_numpy
from activation_extractor.errors import ArgumentTypeError, StoreError


@dataclass(frozen=True)
class Part:
    """What one shard holds of a column.

    Attributes:
        path: the shard.
        entry: the tensor's name in it.
        count: how many rows it has.
        offsets: for a ragged column, the entry of the rows' beginnings; else None.
        rows: the rows of the store that these are.
    """

    path: Path
    entry: str
    count: int
    offsets: str | None
    rows: Tensor


def read_entry(path: Path, entry: str, start: int = 0, stop: int | None = None) -> Tensor:
    """Rows `start` to `stop` of a tensor in a shard, without reading the others.

    Raises:
        StoreError: the shard is damaged or gone.
    """
    try:
        with safe_open(path, framework="pt") as shard:
            part: Tensor = shard.get_slice(entry)[start:stop]
            return part
    except (SafetensorError, OSError) as error:
        advice = "Restore it from a copy, or delete it and extract again."
        raise StoreError(path, "be a readable shard", str(error), advice) from error


class Column:
    """A column of a store, one row for each sample; nothing is read before it is asked for.

    ``column[3]`` is a row, ``column[10:20]`` and ``column[[4, 2]]`` are ``(rows, *row)`` tensors on the CPU, new
    memory each time. In a ragged column a row is ``(positions, *features)`` and several rows are a list.

    Attributes:
        dtype: the dtype on disk.
        row_shape: the shape of a row; of a position, when ragged.
        is_ragged: whether rows differ in length.
        rows: the rows of the store that the column has, ``(len(column),)`` int64; all of them unless a layer that runs
            conditionally was captured with ``missing="skip"``.
    """

    def __init__(self, name: Any, parts: Sequence[Part], dtype: torch.dtype, row_shape: tuple[int, ...]) -> None:
        self._name, self._parts = name, tuple(parts)
        self.dtype, self.row_shape = dtype, row_shape
        self.is_ragged = parts[0].offsets is not None
        self.rows = torch.cat([part.rows for part in parts])
        self._starts = [0, *accumulate(part.count for part in parts)]

    def __len__(self) -> int:
        return self._starts[-1]

    @property
    def shape(self) -> tuple[int | None, ...]:
        """``(rows, *row_shape)``; a ragged column has None for the axis that differs."""
        return (len(self), None, *self.row_shape) if self.is_ragged else (len(self), *self.row_shape)

    def __repr__(self) -> str:
        return f"Column({self._name!r}, {self.shape}, {str(self.dtype).removeprefix('torch.')})"

    def __getitem__(self, index: Any) -> Any:
        """A row for an integer; rows for a slice, a sequence of integers or a boolean mask."""
        if isinstance(index, slice):
            return self._rows_of(range(len(self))[index])
        if isinstance(index, int | np.integer) and not isinstance(index, bool):
            return self._row(self._checked(int(index)))
        if isinstance(index, np.ndarray | Tensor) and not index.ndim and index.dtype not in (np.bool_, torch.bool):
            return self[index.item()]
        return self._rows_of([self._checked(one) for one in self._integers(index)])

    def torch(self) -> Tensor:
        """The whole column, ``(rows, *row_shape)``; ragged rows of one length too, as ``(rows, positions, ...)``.

        Raises:
            StoreError: ragged rows of different lengths.
        """
        rows = self[:]
        if not self.is_ragged:
            whole: Tensor = rows
            return whole
        if len({len(row) for row in rows}) > 1:
            advice = "Take rows one by one, column[i], or flatten them with column.flat()."
            raise StoreError(self._name, "have rows of one length to become one tensor", "different lengths", advice)
        return torch.stack(rows)

    def numpy(self) -> np.ndarray[Any, Any]:
        """The whole column as an array, as `torch` gives it; bfloat16 and float8 become float32."""
        return to_numpy(self.torch())

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray[Any, Any]:
        return np.asarray(self.numpy(), dtype=dtype)

    def flat(self) -> Tensor:
        """The positions of all rows of a ragged column one behind the other, ``(positions, *features)``."""
        self._check_ragged()
        return torch.cat([read_entry(part.path, part.entry) for part in self._parts])

    def lengths(self) -> Tensor:
        """How many positions each row of a ragged column has, ``(rows,)`` int64."""
        self._check_ragged()
        return torch.cat([read_entry(part.path, part.offsets).diff() for part in self._parts if part.offsets])

    def _check_ragged(self) -> None:
        if not self.is_ragged:
            advice = "Read it with column[...] or column.torch()."
            raise StoreError(self._name, "be ragged to have positions", "a column of rows of one shape", advice)

    def _integers(self, index: Any) -> list[int]:
        array = np.asarray(None if isinstance(index, tuple) else index)
        if array.dtype == bool and array.shape == (len(self),):
            return [int(one) for one in np.flatnonzero(array)]
        if array.ndim != 1 or not (np.issubdtype(array.dtype, np.integer) or array.size == 0):
            condition = "be an integer, a slice, integers, or a boolean for each row"
            raise ArgumentTypeError("an index into a column", condition, index)
        return [int(one) for one in array]

    def _checked(self, index: int) -> int:
        if not -len(self) <= index < len(self):
            raise IndexError(
                f"A row index must be below {len(self)}, got {index}. len(column) tells the number of rows."
            )
        return index % len(self)

    def _row(self, index: int) -> Tensor:
        number = bisect_right(self._starts, index) - 1
        part, row = self._parts[number], index - self._starts[number]
        if part.offsets is None:
            return read_entry(part.path, part.entry, row, row + 1)[0]
        start, stop = read_entry(part.path, part.offsets, row, row + 2).tolist()
        return read_entry(part.path, part.entry, start, stop)

    def _rows_of(self, indices: Sequence[int]) -> Any:
        if isinstance(indices, range) and indices.step == 1:
            pieces = [piece for part, start, stop in self._spans(indices) for piece in self._read(part, start, stop)]
        else:
            pieces = [self._row(index)[None] if not self.is_ragged else self._row(index) for index in indices]
        if self.is_ragged:
            return pieces
        return torch.cat(pieces) if pieces else torch.empty(0, *self.row_shape, dtype=self.dtype)

    def _spans(self, rows: range) -> list[tuple[Part, int, int]]:
        """The parts that hold consecutive rows, and where in them they begin and end."""
        spans = []
        for part, first in zip(self._parts, self._starts, strict=False):
            start, stop = max(rows.start, first) - first, min(rows.stop, first + part.count) - first
            if start < stop:
                spans.append((part, start, stop))
        return spans

    def _read(self, part: Part, start: int, stop: int) -> Sequence[Tensor]:
        """Consecutive rows of one part: one tensor, or one for each row when ragged."""
        if part.offsets is None:
            return [read_entry(part.path, part.entry, start, stop)]
        offsets = read_entry(part.path, part.offsets, start, stop + 1)
        first, last = int(offsets[0]), int(offsets[-1])
        return torch.split(read_entry(part.path, part.entry, first, last), offsets.diff().tolist())
