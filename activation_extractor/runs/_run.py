"""A run over a data set: which of its units are stored already, and the sink that writes the others."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, final

from activation_extractor._format._codecs import Codec
from activation_extractor._format._fingerprints import inputs_crc32
from activation_extractor._format._manifest import has_manifest, read_manifest, store_name
from activation_extractor._format._reader import Reader
from activation_extractor._format._shards import list_units, shard_path, unit_name
from activation_extractor._format._stored_rows import RowId
from activation_extractor.errors import OtherRunError, StoreError
from activation_extractor.runs._batches import Batch
from activation_extractor.runs._run_policies import RunPolicy
from activation_extractor.sinks import Sink, Step
from activation_extractor.sinks._resume import check_free
from activation_extractor.sinks._store_writer import StoreWriter

_BATCHES, _INPUTS = "batches", "inputs"  # metadata of a data set's shards


@final
class Run(Sink):
    """Writes the units of a data set, each under its number in the data set.

    A unit whose shard is stored is not computed again: its batches are compared with what the shard was made from.
    `fingerprint` returns what the values depend on beside what is captured.
    """

    reads_later = True

    def __init__(
        self,
        folder: Path,
        codec: Codec,
        fingerprint: Callable[[], Mapping[str, Any]],
        policy: RunPolicy,
        *,
        queue_bytes: int,
        resume: bool,
    ) -> None:
        self.stored_rows = 0  # before the run, in the units up to the current one
        self._folder, self._codec, self._fingerprint, self._policy = folder, codec, fingerprint, policy
        self._writer = StoreWriter(folder, codec, policy, queue_bytes=queue_bytes, shares_store=resume)
        self._has_store = resume and has_manifest(folder)
        if not self._has_store:
            try:
                check_free(folder, "Choose another folder, or leave out resume=False to go on with it.")
            except StoreError:
                self._has_store = resume and has_manifest(folder)  # another process may have begun it meanwhile
                if not self._has_store:
                    raise
        self._about: Mapping[str, Any] = {}
        self._unit_number = 0
        self._inputs = 0  # the checksum over the batches of the current unit
        self._stored: _StoredUnit | None = None

    @property
    def rows(self) -> int:
        """How many rows were computed."""
        return self._writer.rows

    @property
    def nbytes(self) -> int:
        """How many bytes of columns they had."""
        return self._writer.nbytes

    def begin(self, about: Mapping[str, Any]) -> None:
        """Compare the run with the store in the folder, if there is one.

        Raises:
            OtherRunError: the store is of another run.
            StoreError: with-blocks wrote the store.
        """
        self._about = {**about, **self._fingerprint()}
        self._writer.begin(self._about)
        if not self._has_store:
            return
        self._policy.size = read_manifest(self._folder).unit_size
        if self._policy.size is None:
            advice = "Give extract a folder of its own."
            raise StoreError(self._folder, "be a store that extract wrote", "one that with-blocks wrote", advice)
        self._writer.resume()

    def begin_batch(self, batch: Batch) -> bool:
        """Begin the next batch, in a new unit when the current one is full; returns whether to compute it.

        Raises:
            ArgumentError: the places are not such as a data set has.
            OtherRunError: the rows in the store were made from another batch.
            StoreError: an id comes twice, or an earlier unit could not be written.
        """
        if self._writer.is_full:
            self.end_unit()
        if not self._policy.batches and self._policy.size:
            self._stored = self._find_unit()
            self.stored_rows += self._stored.rows if self._stored else 0
        rows = self._policy.begin_batch(batch.places)
        self._inputs = inputs_crc32(batch.inputs, self._inputs)
        if self._stored is None:
            return True
        self._stored.compare(batch.ids, rows)
        self._writer.remember_ids(batch.ids)
        return False

    def write(self, step: Step) -> None:
        """Add a batch's rows to its unit; raises what `StoreWriter.add` raises."""
        nbytes = self._writer.add(step)
        if self._policy.size is None:
            self._policy.choose_size(max(step.rows, 1), max(nbytes, 1))

    def end_unit(self) -> None:
        """Hand the current unit over to be written, or compare the whole of it when it is stored; begin the next one.

        Raises:
            ArgumentError: a place before the last one is missing.
            OtherRunError: the unit in the store was made from other batches.
            StepError: there are not as many rows as places.
            StoreError: an earlier unit could not be written.
        """
        if self._stored is not None:
            self._stored.end(self._policy.batches, self._inputs)
        elif self._policy.size is not None:  # a unit without rows too, so that a resumed run finds it
            metadata = {_BATCHES: str(self._policy.batches), _INPUTS: f"{self._inputs:08x}"}
            order = self._policy.permutation(self._writer.unit.rows)
            self._writer.commit(unit_name(self._unit_number), metadata, order)
        self._policy.begin_unit()
        self._unit_number += 1
        self._inputs = 0
        self._stored = None

    def end(self) -> None:
        """End the last unit, after the last batch; raises an OtherRunError where the store holds further batches."""
        if self._policy.batches and (self.rows or self.stored_rows):
            self.end_unit()
        units = list_units(self._folder, self._codec) if self._has_store else []
        if units and units[-1] >= unit_name(self._unit_number):
            raise OtherRunError(self._folder, [f"data (it ends before the batches of unit {units[-1]!r})"])

    def close(self) -> None:
        """Wait until the finished units are on the disk; the current one is dropped."""
        self._writer.finish()

    def _find_unit(self) -> _StoredUnit | None:
        path = shard_path(self._folder, unit_name(self._unit_number), self._codec)
        if not path.exists():
            return None
        if not self._has_store:  # another process has begun the store meanwhile
            self._writer.check_run()
            self._has_store = True
        return _StoredUnit(self._folder, Reader(self._codec, store_name(self._about)), str(path))


class _StoredUnit:
    """A unit in the store, compared batch by batch with what its rows would be made from now."""

    def __init__(self, folder: Path, reader: Reader, path: str) -> None:
        shard = reader.shard(path)
        self.rows = shard.rows
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
        if str(batches) != self._metadata.get(_BATCHES):
            self._fail(f"{batches} batches in place of {self._metadata.get(_BATCHES)}")
        if self._ids is not None and self._row != self.rows:
            self._fail(f"{self._row} rows in place of {self.rows}")
        if f"{inputs:08x}" != self._metadata.get(_INPUTS):
            self._fail("other inputs under the same ids" if self._ids else "other inputs")

    def _fail(self, difference: str) -> None:
        raise OtherRunError(self._folder, [f"data ({difference} of unit {self._metadata['unit']!r})"])
