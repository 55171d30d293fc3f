"""A run over a data set: which units are there already, and the sink that writes the others."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, final

from torch import Tensor

from activation_extractor._format._codecs import Codec
from activation_extractor._format._fingerprints import inputs_crc32
from activation_extractor._format._manifest import LEAST_ROWS, has_manifest, read_manifest, store_name
from activation_extractor._format._reader import Reader
from activation_extractor._format._rows import RowId
from activation_extractor._format._shards import list_units, shard_path, unit_name
from activation_extractor.errors import OtherRunError, StepError, StoreError
from activation_extractor.runs._order import Order
from activation_extractor.sinks import Sink, Step
from activation_extractor.sinks._store_sinks import writer_name
from activation_extractor.sinks._store_writer import UNIT_BYTES, UNIT_ROWS, StoreWriter, check_free

_BATCHES, _INPUTS = "batches", "inputs"  # what the shards of a data set note beside their rows


@final
class Run(Sink):
    """Writes the units of a data set, each under the number that its place gives it.

    A unit has a fixed number of batches, chosen at the first one and kept in the manifest; where batches tell the
    places of their rows, it ends with the first batch that leaves no gap once it has as many rows as was chosen. A unit
    whose shard is there is not computed again: its batches are compared with what the shard was made from.

    Attributes:
        rows: how many rows were computed.
        nbytes: how many bytes of columns they had.
        known_rows: how many rows were there already, in the units up to the one that is under way.

    Args:
        folder: the store.
        codec: the format of its shards.
        fingerprint: what the values depend on beside what is captured.
        rows_per_unit: how many rows a unit has, rounded up to whole batches; None for about 64 MiB.
        is_ordered: whether batches tell the places of their rows.
        queue_bytes: how many bytes units may hold, finished ones and the one that is under way.
        resume: whether to go on with a store that is there.
    """

    reads_later = True

    def __init__(
        self,
        folder: Path,
        codec: Codec,
        fingerprint: Callable[[], Mapping[str, Any]],
        *,
        rows_per_unit: int | None,
        queue_bytes: int,
        resume: bool,
        is_ordered: bool = False,
    ) -> None:
        self.known_rows = 0
        self._order = Order() if is_ordered else None
        self._folder, self._codec, self._fingerprint = folder, codec, fingerprint
        self._rows_per_unit = rows_per_unit
        self._writer = StoreWriter(folder, codec, writer_name(), queue_bytes, shares_store=resume)
        self._is_there = resume and _is_store(folder)
        if not self._is_there:
            check_free(folder, "Choose another folder, or leave out resume=False to go on with it.")
        self._about: Mapping[str, Any] = {}
        self._unit_size: int | None = None  # in batches; in rows, at least, where these are ordered
        self._unit = self._batches = 0  # the number of the unit that is under way, and its batches so far
        self._inputs = 0  # the checksum over what these were called with
        self._known: _KnownUnit | None = None

    @property
    def rows(self) -> int:
        """How many rows were computed."""
        return self._writer.rows

    @property
    def nbytes(self) -> int:
        """How many bytes of columns they had."""
        return self._writer.nbytes

    def begin(self, about: Mapping[str, Any]) -> None:
        """Compare the run with the store that is there.

        Raises:
            OtherRunError: it is another one.
        """
        self._about = {**about, **self._fingerprint()}
        if not self._is_there:
            return
        found = read_manifest(self._folder)
        self._unit_size = found.unit_size
        if found.unit_size is None:
            advice = "Give extract a folder of its own."
            raise StoreError(self._folder, "be a store that extract wrote", "one that with-blocks wrote", advice)
        self._writer.begin(self._described())
        self._writer.go_on()

    def skips(self, ids: list[RowId] | None, arguments: Any, places: Any = None) -> bool:
        """Whether the next batch need not be computed, since its rows are in the store.

        Args:
            ids: the ids of its rows.
            arguments: what it is.
            places: where its rows are in the data set, if that is told.

        Raises:
            ArgumentError: the places are not such as a data set has.
            OtherRunError: the rows in the store were made from another batch.
            StoreError: an id comes twice, or an earlier unit could not be written.
        """
        if self._is_full():
            self._end_unit()
        if not self._batches and self._unit_size:
            self._known = self._find(self._unit)
            self.known_rows += self._known.rows if self._known else 0
        self._batches += 1
        rows = None if self._order is None else self._order.take(places)
        self._inputs = inputs_crc32(arguments, self._inputs)
        if self._known is None:
            return False
        self._known.compare(ids, rows)
        self._writer.see(ids)
        return True

    def write(self, step: Step) -> None:
        """Add a batch's rows to its unit.

        Raises:
            StoreError: see `StoreWriter.add`.
        """
        nbytes = self._writer.add(step)
        if self._unit_size is None:
            self._unit_size = self._choose_size(max(step.rows, 1), max(nbytes, 1))
            self._writer.begin(self._described())

    def end(self) -> None:
        """The data set has no more batches: write the last unit.

        Raises:
            OtherRunError: the store holds rows of further batches.
        """
        if self._batches and (self.rows or self.known_rows):
            self._end_unit()
        units = list_units(self._folder, self._codec) if self._is_there else []
        if units and units[-1] >= unit_name(self._unit):
            raise OtherRunError(self._folder, [f"data (it ends before the batches of unit {units[-1]!r})"])

    def close(self) -> None:
        """Wait until the finished units are on the disk; the one under way is not written."""
        self._writer.finish()

    def _described(self) -> dict[str, Any]:
        batches, rows = (self._unit_size, None) if self._order is None else (None, self._unit_size)
        size = {"batches_per_unit": batches, **({LEAST_ROWS: rows} if rows else {})}
        return {"fingerprint": self._about, **size, "model": self._about.get("model")}

    def _is_full(self) -> bool:
        if self._order is None:
            return self._batches == self._unit_size
        return self._unit_size is not None and self._order.rows >= self._unit_size and self._order.is_gapless

    def _choose_size(self, rows: int, nbytes: int) -> int:
        """How many batches like this one make a unit; how many rows, where these are ordered."""
        if self._order is not None:
            return self._rows_per_unit or max(1, min(UNIT_BYTES * rows // nbytes, UNIT_ROWS))
        if self._rows_per_unit is not None:
            size = -(-self._rows_per_unit // rows)
        else:
            size = max(1, min(UNIT_BYTES // nbytes, UNIT_ROWS // rows))
        return max(size, self._batches)  # batches before it may have had nothing to write

    def _find(self, unit: int) -> _KnownUnit | None:
        path = shard_path(self._folder, unit_name(unit), self._codec)
        if not path.exists():
            return None
        if not self._is_there:  # another process works on the same, one hopes
            self._writer.check_run()
            self._is_there = True
        return _KnownUnit(self._folder, Reader(self._codec, store_name(self._about)), str(path))

    def _end_unit(self) -> None:
        if self._known is not None:
            self._known.end(self._batches, self._inputs)
        elif self._unit_size is not None:  # also without rows: a unit that is there need not be looked at again
            about = {_BATCHES: str(self._batches), _INPUTS: f"{self._inputs:08x}"}
            self._writer.commit(unit_name(self._unit), about, self._permutation())
        if self._order is not None:
            self._order.begin_unit()
        self._unit += 1
        self._batches = self._inputs = 0
        self._known = None

    def _permutation(self) -> Tensor | None:
        if self._order is None:
            return None
        order, there = self._order.permutation(), self._writer.unit.rows
        if there != len(order):
            got = f"{there} rows for {len(order)} places"
            raise StepError("have a row for each place in order", got, "Check order=, and give each row an id.")
        return order


def _is_store(folder: Path) -> bool:
    """Whether a folder is a store, or becomes one while it is looked at."""
    if has_manifest(folder):
        return True
    try:
        check_free(folder)
    except StoreError:
        return has_manifest(folder)
    return False


class _KnownUnit:
    """A unit that is in the store, compared batch by batch with what its rows would be made from now."""

    def __init__(self, folder: Path, reader: Reader, path: str) -> None:
        shard = reader.shard(path)
        self.rows = shard.rows
        self._folder, self._about, self._ids = folder, shard.about, reader.ids(path)
        self._row = 0

    def compare(self, ids: list[RowId] | None, rows: Sequence[int] | None) -> None:
        """Compare the ids of the next batch with those in the shard, where its rows follow each other or are these."""
        if ids is None or self._ids is None:
            return  # none were given then, nor are they now, or the fingerprint would differ
        for row, one in zip(rows or range(self._row, self._row + len(ids)), ids, strict=True):
            if row >= len(self._ids) or self._ids[row] != one:
                known = repr(self._ids[row]) if row < len(self._ids) else "none"
                self._fail(f"id {one!r} in place of {known} in row {row}")
        self._row += len(ids)

    def end(self, batches: int, inputs: int) -> None:
        """Compare the whole once all of its batches have come."""
        if str(batches) != self._about.get(_BATCHES):
            self._fail(f"{batches} batches in place of {self._about.get(_BATCHES)}")
        if self._ids is not None and self._row != self.rows:
            self._fail(f"{self._row} rows in place of {self.rows}")
        if f"{inputs:08x}" != self._about.get(_INPUTS):
            self._fail("other inputs under the same ids" if self._ids else "other inputs")

    def _fail(self, difference: str) -> None:
        raise OtherRunError(self._folder, [f"data ({difference} of unit {self._about['unit']!r})"])
