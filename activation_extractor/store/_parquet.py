"""Columns as one Parquet file, a row group at a time."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from activation_extractor._files import sync
from activation_extractor._format._rows import RowId
from activation_extractor._tensors import to_numpy
from activation_extractor.errors import ArgumentError, MissingExtraError
from activation_extractor.store._columns import Column
from activation_extractor.store._parts import bounds

ID = "id"
_GROUP_BYTES = 1 << 25  # of a row group, of which there are a few in memory at a time, encoded and not
_MOST_GROUP_ROWS = 1 << 16
_TEXT_BYTES = 1 << 10  # what a row of text is taken to have

_Array = np.ndarray[Any, Any]


def write_parquet(path: Path, ids: Sequence[RowId], columns: Mapping[str, Any]) -> None:
    """Write columns to a file at a free path, synced.

    Args:
        path: the file.
        ids: of all rows, in the column `ID`.
        columns: by name, a `Column` or a sequence of strings; one that is short of rows has ``rows``.

    Raises:
        ArgumentError: numbers that the format does not have.
        MissingExtraError: pyarrow is not installed.
        StoreError: a shard is damaged or gone.
        OSError: the file cannot be written.
    """
    if find_spec("pyarrow") is None:
        raise MissingExtraError("Exporting to parquet", "parquet", "pyarrow")
    import pyarrow as pa
    import pyarrow.parquet as pq

    fields = [_Field(pa, name, column, len(ids)) for name, column in columns.items()]
    id_column = pa.array(ids, pa.string() if ids and isinstance(ids[0], str) else pa.int64())
    schema = pa.schema([pa.field(ID, id_column.type, nullable=False), *(one.field for one in fields)])
    options: dict[str, Any] = {
        # Measured on 6,000 rows of MiniLM: zstd alone leaves 93 % of float32; with the bytes of equal weight side by
        # side 85 %, and 35 % of what was bfloat16; written at three quarters of the speed of no compression at all.
        "compression": "zstd",
        "use_byte_stream_split": [one.path for one in fields if one.is_splittable],  # floats of 32 and 64 bits alone:
        "use_dictionary": False,  # it is in all readers for them, and for others only since Parquet 2.11
        "write_statistics": [ID],
    }
    with open(path, "xb") as file:
        with pq.ParquetWriter(file, schema, **options) as writer:
            for start, stop in _groups(len(ids), fields):
                arrays = [id_column[start:stop], *(one.array(start, stop) for one in fields)]
                writer.write_table(pa.table(arrays, schema=schema), row_group_size=stop - start)
        sync(file)


class _Field:
    """A column of a Parquet file.

    Attributes:
        field: its name, type and metadata.
        path: what Parquet calls its numbers.
        is_splittable: whether they are floats of 32 or 64 bits.
    """

    def __init__(self, pa: Any, name: str, column: Any, rows: int) -> None:
        self._pa, self._column, self._is_text = pa, column, not hasattr(column, "dtype")
        self._present = None if len(column) == rows else column.rows.numpy()
        self.path, self.is_splittable = name, False
        if self._is_text:
            self.field = pa.field(name, pa.string())
            return
        self._width, self._number = math.prod(column.row_shape), _parquet_number(pa, name, column)
        self.is_splittable = self._number in (pa.float32(), pa.float64())
        # pyarrow before 26 cannot read lists of a fixed size of which some are null.
        self._is_listed = bool(column.row_shape) and self._present is not None and not column.is_ragged
        size = () if self._is_listed else (self._width,)
        self._row = self._number if not column.row_shape else self._listed(self._number, *size)
        whole = self._listed(self._row) if column.is_ragged else self._row
        about = {"shape": json.dumps(list(column.row_shape)), "dtype": str(column.dtype).removeprefix("torch.")}
        self.field = pa.field(name, whole, metadata=about)

    def add_bytes(self, totals: _Array) -> None:
        """Add to the bytes of each row of the table what this column has of it."""
        if self._is_text:
            totals += _TEXT_BYTES
        elif self._column.is_ragged:
            rows = slice(None) if self._present is None else self._present
            totals[rows] += self._column.lengths().numpy() * self._width * self._number.bit_width // 8
        else:
            totals += self._width * self._number.bit_width // 8

    def array(self, start: int, stop: int) -> Any:
        """The rows `start` to `stop` of the table, null where the column has none."""
        has_row, first, last = np.ones(stop - start, dtype=bool), start, stop
        if self._present is not None:
            first, last = (int(one) for one in np.searchsorted(self._present, (start, stop)))
            has_row[:] = False
            has_row[self._present[first:last] - start] = True
        found = self._column[first:last]
        if self._is_text:
            texts = iter(found)
            return self._pa.array([next(texts) if one else None for one in has_row], self._pa.string())
        return self._ragged(found, has_row) if self._column.is_ragged else self._rows(to_numpy(found), ~has_row)

    def _ragged(self, found: list[Tensor], has_row: _Array) -> Any:
        offsets = np.zeros(len(has_row) + 1, dtype=np.int32)
        offsets[1:][has_row] = [len(one) for one in found]
        values = to_numpy(torch.cat([torch.empty((0, *self._column.row_shape), dtype=self._column.dtype), *found]))
        rows, starts = self._rows(values, None), self._pa.array(offsets.cumsum(dtype=np.int32))
        return self._pa.ListArray.from_arrays(starts, rows, type=self.field.type, mask=self._pa.array(~has_row))

    def _rows(self, values: _Array, is_null: _Array | None) -> Any:
        """An element for each row; for each that is not null, where that is said."""
        pa = self._pa
        if is_null is not None and self._is_listed:
            starts = np.zeros(len(is_null) + 1, dtype=np.int32)
            starts[1:][~is_null] = self._width
            starts, mask = pa.array(starts.cumsum(dtype=np.int32)), pa.array(is_null)
            return pa.ListArray.from_arrays(starts, pa.array(values.reshape(-1)), type=self._row, mask=mask)
        if self._row is not self._number:
            return pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), type=self._row)
        if is_null is None:
            return pa.array(values)
        spread = np.zeros(len(is_null), values.dtype)
        spread[~is_null] = values
        return pa.array(spread, mask=is_null)

    def _listed(self, kind: Any, *size: int) -> Any:
        self.path += ".list.element"
        return self._pa.list_(self._pa.field("element", kind, nullable=False), *size)


def _parquet_number(pa: Any, name: str, column: Column) -> Any:
    """The type of a column's numbers."""
    what, advice = f"column {name!r} of a Parquet file", "Export to npz instead."
    if column.dtype.is_complex:
        raise ArgumentError(what, "hold real numbers", column.dtype, advice)
    if 0 in column.row_shape:
        raise ArgumentError(what, "have at least one number in a row", column.row_shape, advice)
    return pa.from_numpy_dtype(to_numpy(torch.empty(0, dtype=column.dtype)).dtype)


def _groups(rows: int, fields: Sequence[_Field]) -> Iterator[tuple[int, int]]:
    """Where row groups of bounded size begin and end; each has a row at least."""
    totals = np.zeros(rows, dtype=np.int64)
    for field in fields:
        field.add_bytes(totals)
    return bounds(np.maximum(totals, _GROUP_BYTES // _MOST_GROUP_ROWS), _GROUP_BYTES)
