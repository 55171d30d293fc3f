"""Columns of a store: lazy, indexed like arrays."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from typing import Any, overload

import numpy as np
import torch
from torch import Tensor

from activation_extractor._tensors import numpy_has, to_numpy
from activation_extractor.errors import ArgumentTypeError, StoreError
from activation_extractor.reducers._keys import EntryKey
from activation_extractor.store._rows_on_disk import Parts, Rows

BLOCK_BYTES = 1 << 20  # what is read at once where a whole column is read


class Column:
    """A column of a store, one row for each sample; nothing is read before it is asked for.

    ``column[3]`` is a row, ``column[10:20]`` and ``column[[4, 2]]`` are ``(rows, *row)`` tensors on the CPU, new
    memory each time; only their bytes are read. In a ragged column a row is ``(positions, *features)`` and several
    rows are a list. A column can be handed to other processes, which open files of their own, and used by threads.

    Attributes:
        name: what it is called in its store: ``(layer, reducer)``, or the name of a kept column.
        dtype: the dtype on disk.
        row_shape: the shape of a row; of a position, when ragged.
        is_ragged: whether rows differ in length.
    """

    def __init__(self, parts: Parts) -> None:
        self._parts, field = parts, parts.field
        self.name: EntryKey = field.key
        self.dtype, self.row_shape, self.is_ragged = field.dtype, field.row_shape, field.is_ragged

    def __reduce__(self) -> Any:
        return Column, (self._parts,)

    def __len__(self) -> int:
        return len(self._parts)

    @property
    def shape(self) -> tuple[int | None, ...]:
        """``(rows, *row_shape)``; a ragged column has None for the axis that differs."""
        return (len(self), None, *self.row_shape) if self.is_ragged else (len(self), *self.row_shape)

    @property
    def rows(self) -> Tensor:
        """The rows of the store that the column has, ``(len(column),)`` int64.

        All of them, unless a layer that runs conditionally was captured with ``missing="skip"``.
        """
        return self._parts.row_numbers()

    def __repr__(self) -> str:
        return f"Column({self.name!r}, {self.shape}, {str(self.dtype).removeprefix('torch.')})"

    @overload
    def __getitem__(self, index: int | np.integer[Any]) -> Tensor: ...

    @overload
    def __getitem__(self, index: Any) -> Tensor | Any: ...  # a list of tensors when ragged

    def __getitem__(self, index: Any) -> Tensor | Any:
        """A row for an integer; rows for a slice, a sequence of integers or a boolean mask.

        Raises:
            IndexError: there is no such row.
            ArgumentTypeError: an index of another kind.
            StoreError: a shard is damaged or gone.
        """
        if type(index) is int:
            return self._parts.row(self._row_index(index))
        if isinstance(index, np.generic | np.ndarray | Tensor) and not index.ndim:
            return self[index.item()]
        return self._parts.gather(self._selected(index))

    def __iter__(self) -> Iterator[Tensor]:
        """The rows one by one, read in blocks."""
        return chain.from_iterable(self.blocks())

    def blocks(self, nbytes: int = BLOCK_BYTES, *, indices: Any = None, flat: bool = False) -> Iterator[Tensor | Any]:
        """The column piece by piece: as many rows at a time as fit in so many bytes, and always at least one.

        A piece is read when the iterator comes to it: on the CPU, in the dtype on disk, new memory. A column that is
        short of rows (``missing="skip"``) gives those it has; see `rows`.

        Args:
            nbytes: the most bytes of a piece, unless a single row has more.
            indices: which rows, in which order, as for ``column[indices]``; by default all of them.
            flat: whether a ragged column gives positions rather than rows; other columns are the same either way.

        Returns:
            An iterator of ``(some rows, *row_shape)`` tensors; for a ragged column, of lists of ``(positions,
            *features)`` tensors, each of which counts 512 bytes more than its numbers have. With `flat` it gives
            ``(some positions, *features)`` tensors, which cut rows that do not fit and end with their shard.

        Raises:
            IndexError: there is no such row.
            ArgumentTypeError: `indices` is something else than a slice, integers, or a boolean for each row.
            StoreError: a shard is damaged or gone; raised when the iterator comes to it.

        Example:
            >>> import tempfile, torch
            >>> from torch import nn
            >>> from activation_extractor import capture, open_store
            >>> model, folder = nn.Sequential(nn.Linear(4, 8)), tempfile.mkdtemp()
            >>> with capture(model, "0", sink=folder):
            ...     _ = model(torch.randn(5, 4))
            >>> [tuple(block.shape) for block in open_store(folder)["0"].blocks(nbytes=64)]  # two rows of 8 float32
            [(2, 8), (2, 8), (1, 8)]
        """
        rows = range(len(self)) if indices is None else self._selected(indices)
        return self._parts.blocks(rows, nbytes, flat)

    def torch(self) -> Tensor:
        """The whole column, ``(rows, *row_shape)``; ragged rows of one length too, as ``(rows, positions, ...)``.

        Raises:
            StoreError: ragged rows of different lengths, or a damaged shard.
        """
        rows = self[:]
        if not self.is_ragged:
            return rows
        if len({len(row) for row in rows}) > 1:
            advice = "Take rows one by one, column[i], or flatten them with column.flat()."
            raise StoreError(self.name, "have rows of one length to become one tensor", "different lengths", advice)
        return torch.stack(list(rows)) if len(rows) else torch.empty(0, 0, *self.row_shape, dtype=self.dtype)

    def numpy(self) -> np.ndarray[Any, Any]:
        """The whole column as an array, as `torch` gives it; bfloat16 and float8 become float32."""
        return to_numpy(self.torch())

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray[Any, Any]:
        if copy is not False:
            return np.asarray(self.numpy(), dtype=dtype)
        mapped = [] if self.is_ragged else self.mapped()
        if len(mapped) != 1 or not numpy_has(self.dtype):
            raise ValueError(f"A view must be of one shard in a dtype of numpy, got {self!r}. Use column.mapped().")
        array = to_numpy(mapped[0])
        if dtype is not None and array.dtype != dtype:
            raise ValueError(f"A view of {self!r} must keep its dtype, got dtype={dtype}. Leave copy=False out.")
        return array

    def mapped(self) -> list[Tensor]:
        """The column without a copy: for each shard a tensor over the mapped file, ragged ones flat.

        Nothing is read before it is touched. Writes to such a tensor stay in memory and never reach the file. Cutting
        a mapped file short elsewhere crashes a process that touches the lost part, as with any memory map; every
        other way of reading gives an error instead.
        """
        return self._parts.mapped()

    def flat(self) -> Tensor:
        """The positions of all rows of a ragged column one behind the other, ``(positions, *features)``, new memory."""
        self._check_ragged()
        return self._parts.flat()

    def lengths(self) -> Tensor:
        """How many positions each row of a ragged column has, ``(rows,)`` int64."""
        self._check_ragged()
        return self._parts.lengths()

    def _check_ragged(self) -> None:
        if not self.is_ragged:
            advice = "Read it with column[...] or column.torch()."
            raise StoreError(self.name, "be ragged to have positions", "a column of rows of one shape", advice)

    def _selected(self, index: Any) -> Rows:
        """The rows that are meant by a slice, integers, or a boolean for each row."""
        if isinstance(index, slice):
            rows = range(len(self))[index]
            return rows if rows.step == 1 else np.asarray(rows)
        array = np.asarray(None if isinstance(index, tuple) else index)
        if array.dtype == bool and array.shape == (len(self),):
            return np.flatnonzero(array)
        if array.ndim != 1 or not (np.issubdtype(array.dtype, np.integer) or array.size == 0):
            condition = "be an integer, a slice, integers, or a boolean for each row"
            raise ArgumentTypeError("an index into a column", condition, index)
        return np.array([self._row_index(int(row)) for row in array], dtype=np.int64)

    def _row_index(self, index: int) -> int:
        length = len(self)
        if not -length <= index < length:
            raise IndexError(f"A row index must be below {length}, got {index}. len(column) is the number of rows.")
        return index + length if index < 0 else index
