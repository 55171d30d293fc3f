"""Columns of text that users keep beside activations."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, overload

import numpy as np
from torch import Tensor

from activation_extractor.errors import StoreError
from activation_extractor.store._columns import BLOCK_BYTES, Column


class TextColumn:
    """A kept column of text, one string for each row; nothing is read before it is asked for.

    ``column[3]`` is a string, ``column[10:20]`` and ``column[[4, 2]]`` are lists of strings.

    Args:
        column: the UTF-8 bytes, a ragged column of uint8.
    """

    def __init__(self, column: Column) -> None:
        self._bytes = column

    def __len__(self) -> int:
        return len(self._bytes)

    @property
    def rows(self) -> Tensor:
        """The rows of the store that the column has, as for `Column.rows`."""
        return self._bytes.rows

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._bytes.name!r}, ({len(self)},), str)"

    @overload
    def __getitem__(self, index: int | np.integer[Any]) -> str: ...

    @overload
    def __getitem__(self, index: Any) -> list[str]: ...

    def __getitem__(self, index: Any) -> str | list[str]:
        """A string for an integer; a list of strings for whatever else a `Column` takes.

        Raises:
            IndexError: there is no such row.
            StoreError: a shard is damaged or gone.
        """
        rows = self._bytes[index]
        return [self._text(row) for row in rows] if isinstance(rows, list) else self._text(rows)

    def __iter__(self) -> Iterator[str]:
        return map(self._text, self._bytes)

    def blocks(self, nbytes: int = BLOCK_BYTES, *, indices: Any = None) -> Iterator[list[str]]:
        """The column piece by piece, lists of strings; see `Column.blocks`.

        Args:
            nbytes: the most bytes of UTF-8 in a piece, unless a single string has more; each counts 512 bytes more.
            indices: which rows, in which order; by default all of them.

        Raises:
            IndexError: there is no such row.
            ArgumentTypeError: `indices` is something else than a slice, integers, or a boolean for each row.
            StoreError: a shard is damaged or gone; raised when the iterator comes to it.
        """
        return ([self._text(row) for row in block] for block in self._bytes.blocks(nbytes, indices=indices))

    def numpy(self) -> np.ndarray[Any, Any]:
        """The whole column as an array of strings, ``(rows,)``."""
        return np.array(list(self), dtype=np.str_)

    def _text(self, data: Tensor) -> str:
        try:
            return data.numpy().tobytes().decode()
        except ValueError as error:
            advice = "Restore the store from a copy."
            raise StoreError(self._bytes.name, "hold text in UTF-8", "other bytes", advice) from error
