"""What of a store is exported, and its columns as those of a table: with names of their own and all rows of it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from activation_extractor._format._stored_rows import RowId
from activation_extractor.errors import ArgumentError, ArgumentTypeError
from activation_extractor.store._columns import Column
from activation_extractor.store._rows_on_disk import bounds
from activation_extractor.store._store import Store
from activation_extractor.store._text_columns import TextColumn

_TEXT_BYTES = 1 << 10  # assumed for a row of text

_Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Content:
    """The ids of all rows of a store, some of its columns by name and reducer, and its kept columns."""

    ids: list[RowId]
    id_type: str | None  # as in a manifest
    columns: Mapping[tuple[str, str], Column]
    kept: Mapping[str, Column | TextColumn]

    @classmethod
    def of(cls, store: Store, keys: Iterable[Any] | None) -> Content:
        """What of a store is meant by the keys of columns; all of it when they are None.

        Raises:
            ArgumentTypeError: one key in place of several.
            ActivationNotFoundError: there is no such column.
            StoreError: a shard is damaged or gone.
        """
        if isinstance(keys, str | bytes):
            raise ArgumentTypeError("keys", "be several keys of columns", keys, "Put it into a list.")
        columns = {pair: store[pair] for pair in store.pairs}
        if keys is not None:
            wanted = {store[key].name for key in keys}
            columns = {pair: column for pair, column in columns.items() if pair in wanted}
        return cls(store.ids, store.manifest["ids"], columns, store.keep)

    @property
    def only_reducer(self) -> str | None:
        """The reducer of all columns; None when they have several."""
        reducers = {reducer for _, reducer in self.columns}
        return reducers.pop() if len(reducers) == 1 else None

    def named(self, reserved: Collection[str], short: str | None) -> dict[str, Column | TextColumn]:
        """The columns by names that are neither escaped nor reserved.

        Columns of the reducer `short` are called like their layer, others ``layer:reducer``; kept ones as they are.

        Raises:
            ArgumentError: two columns would have the same name.
        """
        names = [
            layer if reducer == short and layer not in reserved else f"{layer}:{reducer}"
            for layer, reducer in self.columns
        ]
        taken = {*reserved, *names}
        names += [f"keep:{name}" if name in taken else name for name in self.kept]
        twice = next((name for name, count in Counter(names).items() if count > 1), None)
        if twice is not None:
            condition = f"be a format that can tell two columns called {twice!r} apart"
            raise ArgumentError("to", condition, "another", "Use npz.")
        return dict(zip(names, [*self.columns.values(), *self.kept.values()], strict=True))


class TableColumn:
    """A column of a store in a table of all its rows, of which it may lack some.

    Attributes:
        name: what it is called.
        source: where its rows are read.
        is_text: whether rows are strings.
        rows: how many rows the table has.
        is_short: whether the column lacks some of them.
    """

    def __init__(self, name: str, source: Any, rows: int) -> None:
        self.name, self.source, self.is_text = name, source, not hasattr(source, "dtype")
        self.rows, self.is_short = rows, len(source) < rows
        self._present = source.rows.numpy() if self.is_short else None

    def add_bytes(self, totals: _Array, itemsize: int) -> None:
        """Add to the bytes of each row of the table what this column has of it, with numbers of `itemsize` bytes."""
        if self.is_text:
            totals += _TEXT_BYTES
        elif self.source.is_ragged:
            rows = slice(None) if self._present is None else self._present
            totals[rows] += self.source.lengths().numpy() * math.prod(self.source.row_shape) * itemsize
        else:
            totals += math.prod(self.source.row_shape) * itemsize

    def take(self, start: int, stop: int) -> tuple[Any, _Array]:
        """The rows that the column has of `start` to `stop` of the table, and for each of these whether it has it."""
        has_row = np.ones(stop - start, dtype=bool)
        if self._present is None:
            return self.source[start:stop], has_row
        first, last = (int(place) for place in np.searchsorted(self._present, (start, stop)))
        has_row[:] = False
        has_row[self._present[first:last] - start] = True
        return self.source[first:last], has_row

    def texts(self, start: int, stop: int) -> list[str | None]:
        """The strings of rows of the table, None where the column has none."""
        rows, has_row = self.take(start, stop)
        texts = iter(rows)
        return [next(texts) if is_present else None for is_present in has_row]


def shard_files(
    groups: Sequence[tuple[int, int]], sizes: _Array, most_bytes: int, suffix: str
) -> list[tuple[str, list[tuple[int, int]]]]:
    """The files of a folder by name, each with its groups of rows: as many as have so many bytes, and at least one.

    `sizes` are the bytes of each row. Without groups there is one file, without rows.
    """
    totals = np.array([sizes[start:stop].sum() for start, stop in groups], dtype=np.int64)
    spans = list(bounds(totals, most_bytes)) or [(0, 0)]
    names = (f"data-{number:05d}-of-{len(spans):05d}.{suffix}" for number in range(len(spans)))
    return [(name, list(groups[first:stop])) for name, (first, stop) in zip(names, spans, strict=True)]
