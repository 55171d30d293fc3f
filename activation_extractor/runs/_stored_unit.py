"""A unit in the store, compared with what its rows would be made from now."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from activation_extractor._format._reader import Reader
from activation_extractor._format._stored_rows import RowId
from activation_extractor.errors import OtherRunError

BATCHES, INPUTS = "batches", "inputs"  # metadata of a data set's shards


class StoredUnit:
    """A unit in the store, compared batch by batch."""

    def __init__(self, folder: Path, reader: Reader, path: str) -> None:
        shard = reader.shard(path)
        self.rows, self.reader, self.path = shard.rows, reader, path
        self._folder, self._metadata, self._ids = folder, shard.metadata, reader.ids(path)
        self._row = 0

    def compare(self, ids: list[RowId] | None, rows: Sequence[int] | None) -> None:
        """Compare a batch's ids with those of its `rows` in the shard; None means the rows after the last batch's."""
        if ids is None or self._ids is None:
            return  # neither run has ids, or the fingerprints would differ
        for row, row_id in zip(rows or range(self._row, self._row + len(ids)), ids, strict=True):
            if row >= len(self._ids) or self._ids[row] != row_id:
                known = repr(self._ids[row]) if row < len(self._ids) else "none"
                self._fail(f"id {row_id!r} in place of {known} in row {row}")
        self._row += len(ids)

    def end(self, batches: int, inputs: int) -> None:
        """Compare the number of batches, and their checksum, once all of them have come."""
        if str(batches) != self._metadata.get(BATCHES):
            self._fail(f"{batches} batches in place of {self._metadata.get(BATCHES)}")
        if self._ids is not None and self._row != self.rows:
            self._fail(f"{self._row} rows in place of {self.rows}")
        if f"{inputs:08x}" != self._metadata.get(INPUTS):
            self._fail("other inputs under the same ids" if self._ids else "other inputs")

    def row_name(self, row: int) -> str:
        """A row for people: its id, or where it stands."""
        return f"row {row} of unit {self._metadata['unit']!r}" + (f", id {self._ids[row]!r}" if self._ids else "")

    def _fail(self, difference: str) -> None:
        raise OtherRunError(self._folder, [f"data (unit {self._metadata['unit']!r}: {difference})"])
