"""Parquet: tables whose columns have types, of which those that are wanted are read."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from importlib.util import find_spec
from typing import Any

from activation_extractor.cli.inputs._bad_rows import BadRows
from activation_extractor.cli.inputs._files import InputFile
from activation_extractor.cli.inputs._records import Columns
from activation_extractor.cli.inputs._source import Reader, Row
from activation_extractor.errors import MissingExtraError

_ROWS = 1024  # that are held at once
_BUFFER = 1 << 20  # bytes of a column that are read at once, or else a column's whole row group is


class ParquetReader(Reader):
    """A row for each one of a ``.parquet`` file."""

    def __init__(self, file: InputFile, columns: Columns) -> None:
        if find_spec("pyarrow") is None:
            raise MissingExtraError("Reading .parquet", "tables", "pyarrow")
        import pyarrow as pa
        from pyarrow.parquet import ParquetFile

        self._file = file
        self.kept, self.has_ids = columns.keep, columns.id is not None
        with file.reading(), ParquetFile(file.path) as table:
            schema = table.schema_arrow
        columns.check(file.name, schema.names)
        self._wanted = columns.among(schema.names)
        self.unsigned = tuple(name for name in self.kept if schema.field(name).type == pa.uint64())

    def rows(self, bad_rows: BadRows) -> Iterator[Row]:
        """The wanted cells of each row."""
        from pyarrow.parquet import ParquetFile

        number = 0
        with self._file.reading(), ParquetFile(self._file.path, buffer_size=_BUFFER, pre_buffer=False) as table:
            for batch in table.iter_batches(_ROWS, columns=sorted({*self._wanted}), use_threads=False):
                columns = [_cells(batch.column(name)) for name in self._wanted]
                for cells in zip(*columns, strict=True):
                    number += 1
                    row_id = cells[1] if self.has_ids else None
                    yield Row(cells[0], row_id, cells[1 + self.has_ids :], f"row {number}")


def _cells(column: Any) -> list[Any]:
    """The cells of a column as Python has them; those of dates, times and durations as text."""
    import pyarrow as pa

    if pa.types.is_temporal(column.type):
        column = column.cast(pa.string())
    elif pa.types.is_binary(column.type) or pa.types.is_large_binary(column.type):
        with suppress(pa.ArrowInvalid):  # bytes that are no text, which the rows' checks name
            column = column.cast(pa.large_string())
    cells: list[Any] = column.to_pylist()
    return cells
