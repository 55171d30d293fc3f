"""Columns of text that users keep beside activations."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from torch import Tensor

from activation_extractor.errors import StoreError
from activation_extractor.store._columns import Column


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

    def __getitem__(self, index: Any) -> Any:
        """A string for an integer; a list of strings for whatever else a `Column` takes.

        Raises:
            IndexError: there is no such row.
            StoreError: a shard is damaged or gone.
        """
        found = self._bytes[index]
        return [self._text(one) for one in found] if isinstance(found, list) else self._text(found)

    def __iter__(self) -> Iterator[str]:
        return map(self._text, self._bytes)

    def numpy(self) -> np.ndarray[Any, Any]:
        """The whole column as an array of strings, ``(rows,)``."""
        return np.array(list(self), dtype=np.str_)

    def _text(self, data: Tensor) -> str:
        try:
            return data.numpy().tobytes().decode()
        except ValueError as error:
            advice = "Restore the store from a copy."
            raise StoreError(self._bytes.name, "hold text in UTF-8", "other bytes", advice) from error
