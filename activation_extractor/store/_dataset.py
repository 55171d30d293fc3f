"""Columns of a store as a data set of torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch.utils.data import Dataset

from activation_extractor.errors import StoreError
from activation_extractor.store._columns import Column
from activation_extractor.store._text_columns import TextColumn


class StoreDataset(Dataset[tuple[Any, ...]]):
    """Rows of columns of a store as tuples: a tensor for each column, a string for kept text; see `Store.dataset`.

    A ``DataLoader`` reads the rows of a batch at once. Ragged columns give ``(positions, *features)`` for each row
    and need a ``collate_fn``.

    Args:
        columns: the columns.
        rows: how many rows the store has.

    Raises:
        StoreError: a column is short of rows.
    """

    def __init__(self, columns: Sequence[Column | TextColumn], rows: int) -> None:
        self._columns, self._rows = tuple(columns), rows
        short = next((column for column in columns if len(column) != rows), None)
        if short is not None:
            advice = "Read it with column[...] and column.rows."
            raise StoreError(repr(short), f"have all {rows} rows of its store", f"{len(short)}", advice)

    def __len__(self) -> int:
        return self._rows

    def __getitem__(self, index: int) -> tuple[Any, ...]:
        return tuple(column[index] for column in self._columns)

    def __getitems__(self, indices: list[int]) -> list[tuple[Any, ...]]:
        """The rows of a batch, as a DataLoader asks for them."""
        return list(zip(*(column[indices] for column in self._columns), strict=True))
