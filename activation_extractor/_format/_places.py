"""Where the values of a column lie in the shards of a store: found in the header of each shard once, and remembered."""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from activation_extractor._format._entry_names import OFFSETS
from activation_extractor._format._fields import Field
from activation_extractor._format._headers import Extent
from activation_extractor._format._shards import REPAIR, Shard
from activation_extractor._format._unit_table import UnitTable
from activation_extractor._storage import located
from activation_extractor.errors import StoreError

_NO_CRC = 0  # of what is read; `verify` reads headers of its own


class Places:
    """Where the values of a column lie, by the place of a unit: 8 bytes for each unit, 24 where the column is ragged.

    A shard that holds the column otherwise than the field says is refused.

    Args:
        field: the column.
        units: of the store.
        read_shard: gives the header of the shard at a path.
    """

    def __init__(self, field: Field, units: UnitTable, read_shard: Callable[[str], Shard]) -> None:
        self.field, self.units, self._read_shard = field, units, read_shard
        self.held = units.of_entry(field.entry)
        self._counts = self.held.counts.data
        self._path = located if len(units) and "://" in units.path(0) else Path  # which takes less time
        self._values = array("q", bytes(8 * len(units)))  # the first byte; 0 until it is known
        self._positions = array("q", self._values if field.is_ragged else ())
        self._offsets = array("q", self._values if field.is_ragged else ())
        # Where each entry is a file of its own: its name in the folder of the shard, and that of its offsets.
        self._files: tuple[str, str] | None = None
        self._other_files: dict[int, tuple[str, str]] = {}

    def positions(self, unit: int) -> int:
        """How many positions of a ragged column a shard has."""
        if not self._values[unit]:
            self._find(unit)
        return self._positions[unit]

    def values(self, unit: int) -> Extent:
        """Where the values in a shard lie that has rows of the column."""
        if not self._values[unit]:
            self._find(unit)
        start, field = self._values[unit], self.field
        shape = (self._positions[unit] if field.is_ragged else self._rows(unit), *field.row_shape)
        return Extent(self._path(self._file(unit, 0)), start, field.dtype, shape, _NO_CRC, start)

    def offsets(self, unit: int) -> Extent:
        """Where the offsets of a ragged column lie, in the same way."""
        if not self._values[unit]:
            self._find(unit)
        start = self._offsets[unit]
        return Extent(self._path(self._file(unit, 1)), start, torch.int64, (self._rows(unit) + 1,), _NO_CRC, start)

    def _rows(self, unit: int) -> int:
        which = self.held.which
        rows: int = self._counts[unit if which is None else bisect_left(which, unit)]
        return rows

    def _file(self, unit: int, which: int) -> str:
        files = self._other_files.get(unit) or self._files or ("", "")
        return self.units.path(unit) + files[which]

    def _find(self, unit: int) -> None:
        path, field, entry = self.units.path(unit), self.field, self.field.entry
        shard = self._read_shard(path)
        if entry not in shard.extents:
            raise StoreError(path, f"hold the column {entry!r}, as the store says", "none", REPAIR)
        held = shard.field(entry)
        if held != replace(field, converted_from=None):
            got = f"{held.dtype} {held.row_shape} after {field.dtype} {field.row_shape}"
            raise StoreError(path, f"hold {entry!r} like the other shards", got, "Restore it from a copy.")
        values = shard.extents[entry]
        offsets = shard.extents[entry + OFFSETS] if field.is_ragged else values
        files = str(values.path)[len(path) :], str(offsets.path)[len(path) :]
        if self._files is None:
            self._files = files
        elif self._files != files:
            self._other_files[unit] = files
        if field.is_ragged:
            self._positions[unit], self._offsets[unit] = values.shape[0], offsets.start
        self._values[unit] = values.start  # last: another thread may be here
