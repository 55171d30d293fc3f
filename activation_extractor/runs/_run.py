"""A run over a data set: which of its units are stored already, and the sink that writes the others."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, final

from torch import nn

from activation_extractor._format._codecs import Codec
from activation_extractor._format._manifest import store_name
from activation_extractor._format._stored_rows import RowId
from activation_extractor.errors import StepError
from activation_extractor.runs._arithmetic import COMPUTED_WITH
from activation_extractor.runs._batches import Batch
from activation_extractor.runs._items import Arrived, BatchItems, Expected, Items, RowItems
from activation_extractor.runs._pieces import Pieces
from activation_extractor.runs._proof import Proof
from activation_extractor.runs._run_units import RunUnit, RunUnits
from activation_extractor.runs._stored_batches import StoredBatches
from activation_extractor.runs._stored_run import check_end, manifest_of_run, may_resume
from activation_extractor.runs._stored_unit import StoredUnits
from activation_extractor.runs._unit_choice import UnitChoice
from activation_extractor.sinks import Sink, Step
from activation_extractor.sinks._step import nbytes_of, part_of
from activation_extractor.sinks._store_writer import StoreWriter

OnFailure = Callable[[RowId, Exception], Any]


@final
class Run(Sink):
    """Writes the units of a data set, each under its number in the data set.

    A unit that is stored is not computed again, but compared. `fingerprint` returns what the values depend on beside
    what is captured. One stored batch is run again and compared before anything is written.

    Units are ranges of `items`: of rows, so that a run may go on with batches of another size, or of batches. Where the
    first batch gives another number of rows than its arguments have, they become ranges of batches. With `may_grow` the
    data set may go on after a last unit that is not full. `on_failure` is told of rows that raise an error.

    Attributes:
        units: those that have begun; None until their size is known.
        expected: where the items of the next batch must be.
        count: how many units the run has, where that was planned: no other one is looked for.
    """

    reads_later = _takes_inference = True

    def __init__(
        self,
        folder: Path,
        codec: Codec,
        model: nn.Module,
        fingerprint: Callable[[], Mapping[str, Any]],
        items: Items,
        *,
        queue_bytes: int,
        resume: bool,
        may_grow: bool,
        on_failure: OnFailure | None,
    ) -> None:
        self.folder, self._codec, self._fingerprint = folder, codec, fingerprint
        self._model, self.items, self._may_grow = model, items, may_grow
        self.writer = StoreWriter(folder, codec, queue_bytes=queue_bytes, shares_store=resume, may_leave_gaps=True)
        self._has_store = may_resume(folder, resume=resume)
        self.units: RunUnits | None = None
        self._waiting: list[Arrived] = []  # batches that came before their size was known
        self._pieces, self._on_failure = Pieces(skips_rows=on_failure is not None), on_failure
        self._now: Arrived  # the batch that runs
        self._piece: Batch  # the part of it that runs, from its row `_row` on
        self._row = 0
        self._parts: Mapping[RunUnit, list[int]] = {}  # the units of the batch, and which of its items are of each
        self._is_again = self._has_begun = False  # whether it runs to be compared, and whether one has come
        self.expected, self.count = Expected(), None

    @property
    def rows(self) -> int:
        """How many rows were computed."""
        return self.writer.rows

    @property
    def stored_rows(self) -> int:
        """How many rows the store had before, in the units that were found so far."""
        return self.choice.stored_rows

    @property
    def nbytes(self) -> int:
        """How many bytes of columns were computed."""
        return self.writer.nbytes

    def begin(self, about: Mapping[str, Any]) -> None:
        """Compare the run with the store in the folder, if there is one.

        Raises:
            OtherRunError, StoreError: the store is of another run, of with-blocks, or says something else of its end.
        """
        about = {**about, **self._fingerprint()}
        self.stored = StoredUnits(self.folder, self._codec, store_name(about))
        self.proof = Proof(self.folder, self._codec, self._model)
        self.choice = UnitChoice(self.stored, self.writer, self.proof)
        self._batches = StoredBatches(self.stored, self.proof, self._pieces, self._on_failure)
        self.writer.begin(about, {COMPUTED_WITH: self.proof.computed_with})
        if not self._has_store:
            self.stored.on_found = self.writer.check_run
            return
        manifest, size = manifest_of_run(self.folder)
        if manifest.rows_per_unit is None:
            self.items = self.items.in_batches()
        if self.count is None:
            self.stored.read_journals()
        self.begin_units(size)
        self.writer.resume()
        self.writer.hold_back = bool(self.stored.data)

    def add(self, batch: Batch, forward: Callable[[Batch, bool], None]) -> None:
        """Add the next batch.

        `forward` runs it, or a part of it, and ends in a call of `write`; it is told whether the batch is stored and
        run again.

        Raises:
            ArgumentError: the places are not such as a data set has.
            OtherRunError: the rows in the store were made from another batch.
            StoreError: an id comes twice, or an earlier unit could not be written.
        """
        is_first = self.units is None
        if is_first and batch.rows is None:
            self.items = self.items.in_batches()
        self._now = self.items.arrive(batch)
        if not self.expected.fits(self._now):
            return
        self._has_begun = True
        if is_first:
            _ = self._now.digests  # before the model can write to its inputs
            self._waiting.append(self._now)
            self._run(batch, forward)
        else:
            self._parts = self._take(self._now)
        self._compare(forward)
        if not is_first and any(unit.is_computed for unit in self._parts):
            self.proof.check_further()
            self._run(batch, forward)
        for unit in self._parts:
            if unit.is_complete:
                self.end_unit(unit)

    def write(self, step: Step) -> None:
        """Add the rows of a batch, or of a part of it, to their units; raises what `StoreWriter.add` raises."""
        if self._is_again:
            self.proof.take(step)
            return
        if self._on_failure:  # while the row can be left out
            step.check_masks()
        if self.units is None:
            self._choose_size(step)
        start = self._row
        self._row += step.rows
        self._pieces.is_final = True
        for unit, indices in self._parts.items():
            if not unit.is_computed:
                continue
            if isinstance(self.items, BatchItems):
                self.writer.add(step, unit.gathered)
                continue
            rows = [index - start for index in indices if start <= index < self._row]
            if rows:
                self.writer.add(part_of(step, rows), unit.gathered)

    def begin_pass(self, *, is_scattered: bool) -> None:
        """Begin to go through the data set again: through all of it, or through any batches of it."""
        if self.units:
            self.units.begin_pass(is_scattered=is_scattered)
        self.items.go_to(0, 0)
        self.expected.places, self.expected.was_other = None, False
        self.choice.is_first = not (is_scattered or self._has_begun)

    def end_pass(self, *, is_whole: bool = True) -> None:
        """End the units that are open, after the last batch; those that are computed alone, if a pass is not whole."""
        if self.units is None:
            self._pieces.check_ran()
        for unit in self.units.open if self.units else []:
            if is_whole or unit.is_computed:
                self.end_unit(unit)

    def end_proof(self) -> None:
        """End the proof, after the batches that it ran again: what else of their units is the same is not asked."""
        self._batches.end_proof(self.units.open if self.units else ())
        self.writer.hold_back = False

    def end(self) -> None:
        """End the run, after the last pass; raises an OtherRunError where the store holds further batches."""
        count = self.count or (self.units.count if self.units else 0)
        known = check_end(self.folder, self._codec, count)
        self.writer.hold_back = False
        if known < count and not (self.choice.is_shared and self.choice.missing(range(count))):
            self.writer.then(partial(self.stored.write_end, count))

    def flush(self) -> None:
        """Wait until all units that were computed are on the disk, those too that wait in memory for the proof."""
        self.writer.hold_back = False
        self.writer.finish()

    def close(self) -> None:
        """Wait until the finished units are on the disk; the others are dropped."""
        self.writer.finish()

    def _compare(self, forward: Callable[[Batch, bool], None]) -> None:
        """Compare the rows of the batch that are in stored units, and run it again where that is to be done."""
        stored = {unit: rows for unit, rows in self._parts.items() if unit.stored}
        found = {unit: self._batches.compare(unit, self._now, rows) for unit, rows in stored.items()}
        for unit, (rows, ids) in found.items():
            if self.choice.is_first:
                self.writer.take_ids(ids or ())
            if self.proof.is_open and rows:
                self._is_again = True
                try:
                    self._batches.prove(unit, self._now, rows, forward)
                finally:
                    self._is_again = False

    def _run(self, batch: Batch, forward: Callable[[Batch, bool], None]) -> None:
        """Run a batch, of which rows are missing in the store."""
        self._row, pieces, failed = 0, 0, self._now.failed

        def leave_out(error: Exception) -> None:
            failed[self._row] = error
            self._row += 1

        def run(piece: Batch) -> None:
            nonlocal pieces
            self._piece, start = piece, self._row
            forward(piece, False)
            if isinstance(self.items, RowItems) and self._row - start != piece.rows:
                got = f"{self._row - start} rows for a batch of {piece.rows}"
                raise StepError("have the rows of its batch", got, "Give each row an id, with ids=.")
            pieces += 1

        self._pieces.run(batch, run, leave_out if isinstance(self.items, RowItems) else None)
        if self.units is not None and (pieces > 1 or failed or batch.was_cut):
            for unit, indices in self._parts.items():
                unit.cut(self._now, indices)
        passed = {row for unit, rows in self._parts.items() if not unit.is_computed for row in rows}
        for row, error in failed.items():
            if row not in passed and self._on_failure:
                self._on_failure((self._now.batch.ids or self._now.places)[row], error)

    def _choose_size(self, step: Step) -> None:
        """Choose the size of units by the first step, and take the batches that came so far."""
        batch = self._now.batch
        is_counted = isinstance(self.items, RowItems) and batch.ids is None and batch.places is None
        if is_counted and step.rows != self._piece.rows:  # the first axis of its arguments is another one than rows
            self.items = self.items.in_batches()
            self._waiting = [self.items.arrive(batch)]
            self._now = self._waiting[0]
        self.items.choose_size(max(step.rows, 1), max(nbytes_of(step), 1))
        assert self.items.size is not None
        self.begin_units(self.items.size)
        for arrived in self._waiting:
            self._parts = self._take(arrived)
            for unit, indices in self._parts.items() if arrived.failed else ():
                unit.cut(arrived, indices)
        self._waiting = []

    def begin_units(self, size: int) -> None:
        """Take the size of units, which a store has, or which was chosen."""
        self.items.size = size
        self.writer.unit_size = {self.items.size_member: size}
        self.units = RunUnits(self.items, self.stored, self.choice.begin, may_grow=self._may_grow)

    def _take(self, arrived: Arrived) -> Mapping[RunUnit, list[int]]:
        """The units of a batch, which take their items; each with the indices of its own."""
        assert self.units is not None
        parts = self.units.split(arrived.places)
        for unit, indices in parts.items():
            unit.take(arrived, indices, self.items)
            if unit.data and self.choice.is_first:
                self.writer.take_ids(self.items.ids(arrived.batch, indices) or ())
        return parts

    def end_unit(self, unit: RunUnit) -> None:
        """Hand a unit over to be written, or compare the whole of it when it is stored.

        Raises:
            ArgumentError: a place before the last one is missing.
            OtherRunError: the unit in the store was made from other batches.
        """
        assert self.units is not None
        if unit.is_passed:
            self._batches.end_passed(unit)
        elif unit.stored is not None:
            self._batches.end(unit)
            if self.writer.hold_back and self.rows:
                self.proof.check_further()
            self.writer.hold_back = self.writer.hold_back and not self.proof.is_done
        else:  # a unit without rows too, so that a resumed run finds it
            self.choice.commit(unit, is_of_batches=isinstance(self.items, BatchItems))
        self.units.close(unit)
