"""A run over a data set: which of its units are stored already, and the sink that writes the others."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, final

from torch import nn

from activation_extractor._format._codecs import Codec
from activation_extractor._format._fingerprints import inputs_crc32
from activation_extractor._format._manifest import has_manifest, read_manifest, store_name
from activation_extractor._format._reader import Reader
from activation_extractor._format._shards import list_units, shard_path, unit_name
from activation_extractor.errors import OtherRunError, StoreError
from activation_extractor.runs._arithmetic import COMPUTED_WITH
from activation_extractor.runs._batches import Batch
from activation_extractor.runs._proof import Proof
from activation_extractor.runs._run_policies import RunPolicy
from activation_extractor.runs._stored_unit import BATCHES, INPUTS, StoredUnit
from activation_extractor.sinks import Sink, Step
from activation_extractor.sinks._resume import check_free
from activation_extractor.sinks._store_writer import StoreWriter


@final
class Run(Sink):
    """Writes the units of a data set, each under its number in the data set.

    A unit whose shard is stored is not computed again: its batches are compared with what the shard was made from.
    `fingerprint` returns what the values depend on beside what is captured. One stored batch is run again and
    compared before anything is written.
    """

    reads_later = True

    def __init__(
        self,
        folder: Path,
        codec: Codec,
        model: nn.Module,
        fingerprint: Callable[[], Mapping[str, Any]],
        policy: RunPolicy,
        *,
        queue_bytes: int,
        resume: bool,
    ) -> None:
        self.stored_rows = 0  # before the run, in the units up to the current one
        self._folder, self._codec, self._fingerprint, self._policy = folder, codec, fingerprint, policy
        self._model = model
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
        self._stored: StoredUnit | None = None
        self._proof: Proof  # from `begin` on

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
        self._proof = Proof(self._folder, self._codec, self._model)
        self._writer.begin(self._about, {COMPUTED_WITH: self._proof.computed_with})
        if not self._has_store:
            return
        self._policy.size = read_manifest(self._folder).unit_size
        if self._policy.size is None:
            advice = "Give extract a folder of its own."
            raise StoreError(self._folder, "be a store that extract wrote", "one that with-blocks wrote", advice)
        self._writer.resume()
        self._writer.hold_back = bool(list_units(self._folder, self._codec))

    def add(self, batch: Batch, forward: Callable[[bool], None]) -> None:
        """Add the next batch, in a new unit when the current one is full.

        `forward` runs it, and ends in a call of `write`; it is told whether the batch is stored and run again.

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
            self._proof.check_further()
            forward(False)
            return
        self._stored.compare(batch.ids, rows)
        self._writer.remember_ids(batch.ids)
        if self._proof.is_open:
            self._proof.run(self._stored, rows, partial(forward, True))

    def write(self, step: Step) -> None:
        """Add a batch's rows to its unit; raises what `StoreWriter.add` raises."""
        if self._stored is not None:
            self._proof.take(step)
            return
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
            self._proof.end(self._stored)
            if self._writer.hold_back and self.rows:
                self._proof.check_further()
            self._writer.hold_back = self._writer.hold_back and self._proof.is_open
        elif self._policy.size is not None:  # a unit without rows too, so that a resumed run finds it
            metadata = {BATCHES: str(self._policy.batches), INPUTS: f"{self._inputs:08x}"}
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
        self._writer.hold_back = False

    def close(self) -> None:
        """Wait until the finished units are on the disk; the current one is dropped."""
        self._writer.finish()

    def _find_unit(self) -> StoredUnit | None:
        path = shard_path(self._folder, unit_name(self._unit_number), self._codec)
        if not path.exists():
            return None
        if not self._has_store:  # another process has begun the store meanwhile
            self._writer.check_run()
            self._has_store = True
        return StoredUnit(self._folder, Reader(self._codec, store_name(self._about)), str(path))
