"""A unit in the store, compared with what its rows would be made from now."""

from __future__ import annotations

import json
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path

from activation_extractor._creation import exists
from activation_extractor._format._codecs import Codec
from activation_extractor._format._end import read_end, write_end
from activation_extractor._format._journal import read_records
from activation_extractor._format._reader import Reader
from activation_extractor._format._shards import list_units, shard_path, unit_name
from activation_extractor._format._stored_rows import RowId
from activation_extractor.errors import OtherRunError, StoreError
from activation_extractor.runs._unit_data import UnitData

# Metadata of a data set's shards: the number of batches, where units are counted in them; a digest of what its rows are
# made from; and which rows were in the batch that gave its first row.
BATCHES, INPUTS, FIRST_BATCH = "batches", "inputs", "first_batch"
FAILED = "failed"  # a JSON object: what was raised for rows that were left out, by their places in the unit


class StoredUnits:
    """The units of a store; `store` is its name.

    Attributes:
        on_found: called once, before the first unit is found that was not listed.
        data: what the journals said of the units that were listed last, by their numbers; None where they said nothing.
    """

    def __init__(self, folder: Path, codec: Codec, store: str) -> None:
        self._folder, self._codec, self._store = folder, codec, store
        self.on_found: Callable[[], object] | None = None
        self._opened: dict[int, StoredUnit] = {}  # which of them were opened for their size, and not asked for yet
        self.data: dict[int, UnitData | None] = {}
        self._rows: dict[int, int] = {}

    def read_journals(self) -> None:
        """List the units, and read what the journals say of them."""
        records = read_records(self._folder)
        for unit in list_units(self._folder, self._codec):
            record = records.get(unit)
            self.data[int(unit)] = UnitData.of(record) if record else None
            if record:
                self._rows[int(unit)] = record.rows

    def numbers(self) -> set[int]:
        """The numbers of the units that are there now."""
        return {int(unit) for unit in list_units(self._folder, self._codec)}

    def has(self, number: int) -> bool:
        """Whether there is a unit with this number."""
        if number in self.data:
            return True
        is_found = exists(shard_path(self._folder, unit_name(number), self._codec))
        if is_found and self.on_found:
            self.on_found()
            self.on_found = None
        return is_found

    def items(self, number: int) -> int:
        """How many rows or batches of the data set a unit is made from."""
        data = self.data.get(number)
        return data.items if data else self._open(number).items

    def rows(self, number: int) -> int:
        """How many rows a unit has."""
        rows = self._rows.get(number)
        return self[number].rows if rows is None else rows

    @property
    def unknown(self) -> list[int]:
        """Those of which the journals said nothing."""
        return sorted(number for number, data in self.data.items() if data is None)

    @property
    def all_rows(self) -> int:
        """How many rows those have that were listed last."""
        return sum(map(self.rows, self.data))

    @property
    def ended(self) -> int | None:
        """How many units the store has once it is complete; None where nobody has said it."""
        end = read_end(self._folder)
        return end.units if end else None

    def write_end(self, count: int) -> None:
        """Say that the store has so many units, all of which are on the disk."""
        self.read_journals()
        write_end(self._folder, count, sum(map(self.rows, range(count))))

    def __getitem__(self, number: int) -> StoredUnit:
        unit = self._open(number)
        del self._opened[number]
        return unit

    def _open(self, number: int) -> StoredUnit:
        if number not in self._opened:
            path = shard_path(self._folder, unit_name(number), self._codec)
            self._opened[number] = StoredUnit(self._folder, Reader(self._codec, self._store), str(path))
        return self._opened[number]


class StoredUnit:
    """A unit in the store, compared batch by batch.

    Attributes:
        rows: how many it has.
        items: how many rows or batches of the data set it is made from.
        failed: what was raised for rows that were left out, by their places.
        first_batch: the metadata of that name; None where the store does not say.
        inputs: a digest of what its rows are made from.
    """

    def __init__(self, folder: Path, reader: Reader, path: str) -> None:
        shard = reader.shard(path)
        self.rows, self.reader, self.path = shard.rows, reader, path
        self._folder, self._metadata = folder, shard.metadata
        self._row = 0
        batches = self._metadata.get(BATCHES)
        self._item = "rows" if batches is None else "batches"
        self.failed = {int(place): text for place, text in json.loads(self._metadata.get(FAILED, "{}")).items()}
        self.items = self.rows + len(self.failed) if batches is None else int(batches)
        self._failed_places = sorted(self.failed)
        self.first_batch, self.inputs = self._metadata.get(FIRST_BATCH), self._metadata.get(INPUTS, "")

    @cached_property
    def _ids(self) -> list[RowId] | None:
        return self.reader.ids(self.path)

    def left_out(self, places: Mapping[int, int], *, is_allowed: bool) -> list[int]:
        """The keys of places whose rows could not be run; an OtherRunError where that is not allowed."""
        found = [key for key, place in places.items() if place in self.failed]
        if found and not is_allowed:
            text = self.failed[places[found[0]]]
            self.fail(f"a row was left out, since it raised {text}; on_failure= goes on without it")
        return found

    def row_of(self, place: int) -> int:
        """The row of the shard that was at a place of the unit."""
        return place - bisect_left(self._failed_places, place)

    def compare(self, ids: Sequence[RowId], rows: Sequence[int] | None) -> None:
        """Compare ids with those of some rows of the shard; None means the rows after those that were compared."""
        if self._ids is None:
            return  # neither run has ids, or the fingerprints would differ
        for row, row_id in zip(range(self._row, self._row + len(ids)) if rows is None else rows, ids, strict=True):
            if row >= len(self._ids) or self._ids[row] != row_id:
                known = repr(self._ids[row]) if row < len(self._ids) else "none"
                anew = "; append=True adds ids that are new, in whatever order they come"
                self.fail(f"id {row_id!r} in place of {known} in row {row}{anew}")
        self._row += len(ids)

    def end(self, items: int, inputs: str) -> None:
        """Compare the number of items, and the digest of what they are made from, once all of them have come."""
        if items != self.items:
            self.fail(f"{items} {self._item} in place of {self.items}")
        if len(self.inputs) != len(inputs):
            advice = "Read it with open_store, and extract into a new folder."
            raise StoreError(self.path, "be one that this version can compare", "one of an older version", advice)
        if inputs != self.inputs:
            self.fail_inputs()

    def fail_inputs(self) -> None:
        """Raise an OtherRunError: its rows were made from other inputs."""
        self.fail("other inputs under the same ids" if self._ids else "other inputs")

    def row_name(self, row: int) -> str:
        """A row for people: its id, or where it stands."""
        return f"row {row} of unit {self._metadata['unit']!r}" + (f", id {self._ids[row]!r}" if self._ids else "")

    def fail(self, difference: str) -> None:
        """Raise an OtherRunError: the data differ."""
        raise OtherRunError(self._folder, [f"data (unit {self._metadata['unit']!r}: {difference})"])
