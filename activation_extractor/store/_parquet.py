"""Columns as Parquet files of one table, a row group at a time."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch

from activation_extractor._display import dtype_name
from activation_extractor._files import sync, sync_folder
from activation_extractor._tensors import to_numpy
from activation_extractor.errors import ArgumentError, MissingExtraError
from activation_extractor.store._columns import Column
from activation_extractor.store._export_columns import Content, TableColumn, shard_files
from activation_extractor.store._rows_on_disk import bounds

ID = "id"
_GROUP_BYTES = 1 << 25  # of a row group; a few copies of one are in memory at a time
_MOST_GROUP_ROWS = 1 << 16

_Array = np.ndarray[Any, Any]


def write_parquet(content: Content, path: Path) -> None:
    """Write a file of one table at a free path, synced: the ids of all rows, as the column `ID`, and the columns.

    Raises:
        ArgumentError: numbers that the format does not have.
        MissingExtraError: pyarrow is not installed.
        StoreError: a shard is damaged or gone.
        OSError: the file cannot be written.
    """
    table = _Table(content)
    table.write(path, table.groups())


def write_parquet_shards(content: Content, folder: Path, shard_bytes: int) -> None:
    """Write a folder of such files, each of at most so many bytes of numbers unless a row has more."""
    table = _Table(content)
    folder.mkdir()
    for name, groups in shard_files(table.groups(shard_bytes), table.sizes, shard_bytes, "parquet"):
        table.write(folder / name, groups)
    sync_folder(folder)


class _Table:
    """A table; `sizes` has about the bytes of each row."""

    def __init__(self, content: Content) -> None:
        if find_spec("pyarrow") is None:
            raise MissingExtraError("Exporting to parquet", "parquet", "pyarrow")
        import pyarrow as pa

        self._pa, columns = pa, content.named({ID}, content.only_reducer)
        self._fields = [_Field(pa, TableColumn(name, column, len(content.ids))) for name, column in columns.items()]
        self._ids = pa.array(content.ids, pa.string() if content.id_type == "str" else pa.int64())
        fields = [pa.field(ID, self._ids.type, nullable=False), *(field.field for field in self._fields)]
        self._schema = pa.schema(fields)
        self.sizes = np.zeros(len(content.ids), dtype=np.int64)
        for field in self._fields:
            field.column.add_bytes(self.sizes, field.itemsize)

    def groups(self, most_bytes: int = _GROUP_BYTES) -> list[tuple[int, int]]:
        """Where row groups begin and end."""
        least = _GROUP_BYTES // _MOST_GROUP_ROWS
        return list(bounds(np.maximum(self.sizes, least), min(_GROUP_BYTES, most_bytes)))

    def write(self, path: Path, groups: Sequence[tuple[int, int]]) -> None:
        """Write row groups to a file at a free path, synced."""
        import pyarrow.parquet as pq

        options: dict[str, Any] = {
            # Measured on 6,000 rows of MiniLM: zstd alone leaves 93 % of float32; with the bytes of equal weight side
            # by side 85 %, and 35 % of what was bfloat16; written at three quarters of the speed of no compression.
            "compression": "zstd",
            # Floats of 32 and 64 bits alone: other numbers can be split since Parquet 2.11, which not all readers know.
            "use_byte_stream_split": [field.path for field in self._fields if field.is_splittable],
            "use_dictionary": False,
            "write_statistics": [ID],
        }
        with open(path, "xb") as file:
            with pq.ParquetWriter(file, self._schema, **options) as writer:
                for start, stop in groups:
                    arrays = [self._ids[start:stop], *(field.array(start, stop) for field in self._fields)]
                    table = self._pa.table(arrays, schema=self._schema)
                    writer.write_table(table, row_group_size=stop - start)
            sync(file)


class _Field:
    """A column of a Parquet file: `field` is its name, type and metadata, `path` what Parquet calls its numbers."""

    def __init__(self, pa: Any, column: TableColumn) -> None:
        self._pa, self.column, self._source, self.itemsize = pa, column, column.source, 1
        self.path, self.is_splittable = column.name, False
        if column.is_text:
            self.field = pa.field(column.name, pa.string())
            return
        source = column.source
        number, self._width = _parquet_number(pa, column.name, source), math.prod(source.row_shape)
        self.itemsize = max(1, number.bit_width // 8)
        self.is_splittable = number in (pa.float32(), pa.float64())
        # pyarrow before 26 cannot read lists of a fixed size of which some are null.
        self._has_null_lists = bool(source.row_shape) and column.is_short and not source.is_ragged
        size = -1 if self._has_null_lists else self._width
        self._row = self._listed(number, size) if source.row_shape else number
        whole = self._listed(self._row) if source.is_ragged else self._row
        has_axes = len(source.row_shape) > 1 and not source.is_ragged and not self._has_null_lists
        if has_axes and number != pa.bool_():  # which Arrow has no tensors of
            whole = pa.fixed_shape_tensor(number, source.row_shape)
            self._row = whole.storage_type
        about = {"shape": json.dumps(list(source.row_shape)), "dtype": dtype_name(source.dtype)}
        self.field = pa.field(column.name, whole, metadata=about)

    def array(self, start: int, stop: int) -> Any:
        """The rows `start` to `stop` of the table, null where the column has none."""
        if self.column.is_text:
            return self._pa.array(self.column.texts(start, stop), self._pa.string())
        pa, source = self._pa, self._source
        rows, has_row = self.column.take(start, stop)
        if source.is_ragged:
            positions = torch.cat([torch.empty((0, *source.row_shape), dtype=source.dtype), *rows])
            return self._lists(self._fixed(to_numpy(positions)), list(map(len, rows)), has_row)
        values = to_numpy(rows)
        if self._has_null_lists:
            return self._lists(pa.array(values.reshape(-1)), self._width, has_row)
        if source.row_shape:
            lists = self._fixed(values)
            return lists if self.field.type == lists.type else pa.ExtensionArray.from_storage(self.field.type, lists)
        spread = np.zeros(len(has_row), values.dtype)
        spread[has_row] = values
        return pa.array(spread, mask=~has_row)

    def _fixed(self, values: _Array) -> Any:
        """An element for each row, or for each position of ragged ones."""
        numbers = self._pa.array(values.reshape(-1))
        if not self._source.row_shape:
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
