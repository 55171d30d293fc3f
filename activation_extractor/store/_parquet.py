"""Columns as one Parquet file, a row group at a time."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch

from activation_extractor._display import dtype_name
from activation_extractor._files import sync
from activation_extractor._format._stored_rows import RowId
from activation_extractor._tensors import to_numpy
from activation_extractor.errors import ArgumentError, MissingExtraError
from activation_extractor.store._columns import Column
from activation_extractor.store._rows_on_disk import bounds

ID = "id"
_GROUP_BYTES = 1 << 25  # of a row group; a few copies of one are in memory at a time
_MOST_GROUP_ROWS = 1 << 16
_TEXT_BYTES = 1 << 10  # assumed for a row of text

_Array = np.ndarray[Any, Any]


def write_parquet(path: Path, ids: Sequence[RowId], columns: Mapping[str, Any]) -> None:
    """Write the ids of all rows, as the column `ID`, and columns by name to a file at a free path, synced.

    A column is a `Column` or a sequence of strings; one that is short of rows has ``rows``.

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
    schema = pa.schema([pa.field(ID, id_column.type, nullable=False), *(field.field for field in fields)])
    options: dict[str, Any] = {
        # Measured on 6,000 rows of MiniLM: zstd alone leaves 93 % of float32; with the bytes of equal weight side by
        # side 85 %, and 35 % of what was bfloat16; written at three quarters of the speed of no compression at all.
        "compression": "zstd",
        # Floats of 32 and 64 bits alone: other numbers can be split since Parquet 2.11, which not all readers know.
        "use_byte_stream_split": [field.path for field in fields if field.is_splittable],
        "use_dictionary": False,
        "write_statistics": [ID],
    }
    row_bytes = np.zeros(len(ids), dtype=np.int64)
    for field in fields:
        field.add_bytes(row_bytes)
    with open(path, "xb") as file:
        with pq.ParquetWriter(file, schema, **options) as writer:
            for start, stop in bounds(np.maximum(row_bytes, _GROUP_BYTES // _MOST_GROUP_ROWS), _GROUP_BYTES):
                arrays = [id_column[start:stop], *(field.array(start, stop) for field in fields)]
                writer.write_table(pa.table(arrays, schema=schema), row_group_size=stop - start)
        sync(file)


class _Field:
    """A column of a Parquet file: `field` is its name, type and metadata, `path` what Parquet calls its numbers."""

    def __init__(self, pa: Any, name: str, column: Any, rows: int) -> None:
        self._pa, self._column, self._is_text = pa, column, not hasattr(column, "dtype")
        self._present = None if len(column) == rows else column.rows.numpy()
        self.path, self.is_splittable = name, False
        if self._is_text:
            self.field = pa.field(name, pa.string())
            return
        number, self._width = _parquet_number(pa, name, column), math.prod(column.row_shape)
        self._row_bytes = self._width * number.bit_width // 8  # of a position, when ragged
        self.is_splittable = number in (pa.float32(), pa.float64())
        # pyarrow before 26 cannot read lists of a fixed size of which some are null.
        self._has_null_lists = bool(column.row_shape) and self._present is not None and not column.is_ragged
        size = -1 if self._has_null_lists else self._width
        self._row = self._listed(number, size) if column.row_shape else number
        whole = self._listed(self._row) if column.is_ragged else self._row
        has_axes = len(column.row_shape) > 1 and not column.is_ragged and not self._has_null_lists
        if has_axes and number != pa.bool_():  # which Arrow has no tensors of
            whole = pa.fixed_shape_tensor(number, column.row_shape)
            self._row = whole.storage_type
        about = {"shape": json.dumps(list(column.row_shape)), "dtype": dtype_name(column.dtype)}
        self.field = pa.field(name, whole, metadata=about)

    def add_bytes(self, totals: _Array) -> None:
        """Add to the bytes of each row of the table what this column has of it."""
        if self._is_text:
            totals += _TEXT_BYTES
            return
        if self._column.is_ragged:
            rows = slice(None) if self._present is None else self._present
            totals[rows] += self._column.lengths().numpy() * self._row_bytes
        else:
            totals += self._row_bytes

    def array(self, start: int, stop: int) -> Any:
        """The rows `start` to `stop` of the table, null where the column has none."""
        pa, has_row, first, last = self._pa, np.ones(stop - start, dtype=bool), start, stop
        if self._present is not None:
            first, last = (int(place) for place in np.searchsorted(self._present, (start, stop)))
            has_row[:] = False
            has_row[self._present[first:last] - start] = True
        rows = self._column[first:last]
        if self._is_text:
            texts = iter(rows)
            return pa.array([next(texts) if is_present else None for is_present in has_row], pa.string())
        if self._column.is_ragged:
            positions = torch.cat([torch.empty((0, *self._column.row_shape), dtype=self._column.dtype), *rows])
            return self._lists(self._fixed(to_numpy(positions)), list(map(len, rows)), has_row)
        values = to_numpy(rows)
        if self._has_null_lists:
            return self._lists(pa.array(values.reshape(-1)), self._width, has_row)
        if self._column.row_shape:
            lists = self._fixed(values)
            return lists if self.field.type == lists.type else pa.ExtensionArray.from_storage(self.field.type, lists)
        spread = np.zeros(len(has_row), values.dtype)
        spread[has_row] = values
        return pa.array(spread, mask=~has_row)

    def _fixed(self, values: _Array) -> Any:
        """An element for each row, or for each position of ragged ones."""
        numbers = self._pa.array(values.reshape(-1))
        if not self._column.row_shape:
            return numbers
        return self._pa.FixedSizeListArray.from_arrays(numbers, type=self._row)

    def _lists(self, elements: Any, lengths: Any, has_row: _Array) -> Any:
        """Lists of so many elements each, of which `lengths` has those that are not null."""
        ends = np.zeros(len(has_row) + 1, dtype=np.int32)
        ends[1:][has_row] = lengths
        starts, mask = self._pa.array(ends.cumsum(dtype=np.int32)), self._pa.array(~has_row)
        return self._pa.ListArray.from_arrays(starts, elements, type=self.field.type, mask=mask)

    def _listed(self, kind: Any, size: int = -1) -> Any:
        self.path += ".list.element"
        return self._pa.list_(self._pa.field("element", kind, nullable=False), size)


def _parquet_number(pa: Any, name: str, column: Column) -> Any:
    """The type of a column's numbers."""
    what, advice = f"column {name!r} of a Parquet file", "Export to npz instead."
    if column.dtype.is_complex:
        raise ArgumentError(what, "hold real numbers", column.dtype, advice)
    if 0 in column.row_shape:
        raise ArgumentError(what, "have at least one number in a row", column.row_shape, advice)
    return pa.from_numpy_dtype(to_numpy(torch.empty(0, dtype=column.dtype)).dtype)
