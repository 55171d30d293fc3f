"""A run over a data set: which of its units are stored already, and the sink that writes the others."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, final

from torch import nn

from activation_extractor._format._codecs import Codec
from activation_extractor._format._end import write_end
from activation_extractor._format._manifest import store_name
from activation_extractor._format._shards import list_units, unit_name
from activation_extractor._format._stored_rows import RowId
from activation_extractor.errors import StepError
from activation_extractor.runs._arithmetic import COMPUTED_WITH
from activation_extractor.runs._batches import Batch
from activation_extractor.runs._items import Arrived, BatchItems, Items, RowItems
from activation_extractor.runs._pieces import Pieces
from activation_extractor.runs._proof import Proof
from activation_extractor.runs._run_units import RunUnit, RunUnits
from activation_extractor.runs._stored_run import check_end, manifest_of_run, may_resume
from activation_extractor.runs._stored_unit import BATCHES, INPUTS, StoredUnit, StoredUnits
from activation_extractor.sinks import Sink, Step
from activation_extractor.sinks._step import nbytes_of, part_of
from activation_extractor.sinks._store_writer import StoreWriter

OnFailure = Callable[[RowId, Exception], Any]


@final
class Run(Sink):
    """Writes the units of a data set, each under its number in the data set.

    A unit whose shard is stored is not computed again: what it is made from is compared with what the shard was made
    from. `fingerprint` returns what the values depend on beside what is captured. One stored batch is run again and
    compared before anything is written.

    Units are ranges of `items`: of rows, so that a run may go on with batches of another size, or of batches. Where the
    first batch gives another number of rows than its arguments have, they become ranges of batches. With `may_grow` the
    data set may go on after a last unit that is not full. Rows that raise an error are left out and told to
    `on_failure`, where there is one.
    """

    reads_later = True

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
        self._folder, self._codec, self._fingerprint = folder, codec, fingerprint
        self._model, self._items, self._may_grow = model, items, may_grow
        self._writer = StoreWriter(folder, codec, queue_bytes=queue_bytes, shares_store=resume)
        self._has_store = may_resume(folder, resume=resume)
        self._units: RunUnits | None = None  # until the size of units is known
        self._waiting: list[Arrived] = []  # batches that came before that
        self._pieces, self._on_failure = Pieces(skips_rows=on_failure is not None), on_failure
        self._now: Arrived  # the batch that runs
        self._piece: Batch  # the part of it that runs
        self._row = 0  # of the batch, the first of that part
        self._parts: Mapping[RunUnit, list[int]] = {}  # the units of the batch, and which of its items are of each
        self._is_again = False  # whether it runs to be compared

    @property
    def rows(self) -> int:
        """How many rows were computed."""
        return self._writer.rows

    @property
    def stored_rows(self) -> int:
        """How many rows the store had before the run, in the units up to the current one."""
        return self._units.stored if self._units else 0

    @property
    def nbytes(self) -> int:
        """How many bytes of columns were computed."""
        return self._writer.nbytes

    def begin(self, about: Mapping[str, Any]) -> None:
        """Compare the run with the store in the folder, if there is one.

        Raises:
            OtherRunError: the store is of another run.
            StoreError: with-blocks wrote the store, or what it says of its end is damaged.
        """
        about = {**about, **self._fingerprint()}
        self._stored = StoredUnits(self._folder, self._codec, store_name(about))
        self._proof = Proof(self._folder, self._codec, self._model)
        self._writer.begin(about, {COMPUTED_WITH: self._proof.computed_with})
        if not self._has_store:
            return
        manifest, size = manifest_of_run(self._folder)
        if manifest.rows_per_unit is None:
            self._items = self._items.in_batches()
        self._begin_units(size)
        self._writer.resume()
        self._writer.hold_back = bool(list_units(self._folder, self._codec))

    def add(self, batch: Batch, forward: Callable[[Batch, bool], None]) -> None:
        """Add the next batch.

        `forward` runs it, or a part of it, and ends in a call of `write`; it is told whether the batch is stored and
        run again.

        Raises:
            ArgumentError: the places are not such as a data set has.
            OtherRunError: the rows in the store were made from another batch.
            StoreError: an id comes twice, or an earlier unit could not be written.
        """
        is_first = self._units is None
        if is_first and batch.rows is None:
            self._items = self._items.in_batches()
        self._now = self._items.arrive(batch)
        if is_first:
            self._waiting.append(self._now)
            self._run(batch, forward)
        else:
            self._parts = self._take(self._now)
        stored = {unit: self._compare(unit) for unit in self._parts if unit.stored}
        for unit, indices in stored.items():
            if self._proof.is_open and indices:
                self._prove(unit, indices, forward)
        if not is_first and any(unit.stored is None for unit in self._parts):
            self._proof.check_further()
            self._run(batch, forward)
        for unit in self._parts:
            if unit.is_complete:
                self._end_unit(unit)

    def write(self, step: Step) -> None:
        """Add the rows of a batch, or of a part of it, to their units; raises what `StoreWriter.add` raises."""
        if self._is_again:
            self._proof.take(step)
            return
        if self._on_failure:  # while the row can be left out
            step.check_masks()
        if self._units is None:
            self._choose_size(step)
        start = self._row
        self._row += step.rows
        self._pieces.is_final = True
        for unit, indices in self._parts.items():
            if unit.stored is not None:
                continue
            if isinstance(self._items, BatchItems):
                self._writer.add(step, unit.gathered)
                continue
            rows = [index - start for index in indices if start <= index < self._row]
            if rows:
                self._writer.add(part_of(step, rows), unit.gathered)

    def end(self) -> None:
        """End the last units, after the last batch; raises an OtherRunError where the store holds further batches."""
        if self._units is None:
            self._pieces.check_ran()
        for unit in self._units.open if self._units else []:
            self._end_unit(unit)
        count = self._units.count if self._units else 0
        known = check_end(self._folder, self._codec, count) if self._has_store else 0
        self._writer.hold_back = False
        if known < count:
            self._writer.then(partial(write_end, self._folder, count, self.rows + self.stored_rows))

    def close(self) -> None:
        """Wait until the finished units are on the disk; the others are dropped."""
        self._writer.finish()

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
            if isinstance(self._items, RowItems) and self._row - start != piece.rows:
                got = f"{self._row - start} rows for a batch of {piece.rows}"
                raise StepError("have the rows of its batch", got, "Give each row an id, with ids=.")
            pieces += 1

        self._pieces.run(batch, run, leave_out if isinstance(self._items, RowItems) else None)
        if self._units is not None and (pieces > 1 or failed or batch.was_cut):
            for unit, indices in self._parts.items():
                unit.cut(self._now, indices)
        for row, error in failed.items():
            self._report(row, error)

    def _report(self, row: int, error: Exception) -> None:
        assert self._on_failure is not None
        self._on_failure((self._now.batch.ids or self._now.places)[row], error)

    def _compare(self, unit: RunUnit) -> list[int]:
        """Compare ids with those of a stored unit; returns which rows of the batch are stored there."""
        stored, batch, indices = unit.stored, self._now.batch, self._parts[unit]
        assert stored is not None
        if isinstance(self._items, BatchItems):
            ids, rows = batch.ids, None
        else:
            places = {index: self._now.places[index] - unit.start for index in indices}
            for index in stored.left_out(places, is_allowed=self._on_failure is not None):
                self._report(index, RuntimeError(stored.failed[places[index]]))
            indices = [index for index in indices if places[index] not in stored.failed]
            ids = None if batch.ids is None else [batch.ids[index] for index in indices]
            rows = [stored.row_of(places[index]) for index in indices]
        if ids is not None:
            stored.compare(ids, rows)
        self._writer.take_ids(ids or ())
        return indices

    def _prove(self, unit: RunUnit, indices: list[int], forward: Callable[[Batch, bool], None]) -> None:
        """Run the batch again, and compare its rows that are in a stored unit with what is stored."""
        stored, batch, rows = unit.stored, self._now.batch, None
        assert stored is not None
        if isinstance(self._items, RowItems):
            rows = [stored.row_of(self._now.places[index] - unit.start) for index in indices]
        batch, chosen = batch.alone(indices) if self._on_failure else (batch, indices)  # others may not run
        self._is_again = True
        try:
            same = stored.first_batch in (None, self._now.relative_to(unit.start))
            again = partial(self._pieces.run, batch, lambda piece: forward(piece, True))
            self._proof.run(stored, rows, chosen if rows else None, again, is_same_batch=same)
        finally:
            self._is_again = False

    def _choose_size(self, step: Step) -> None:
        """Choose the size of units by the first step, and take the batches that came so far."""
        batch = self._now.batch
        is_counted = isinstance(self._items, RowItems) and batch.ids is None and batch.places is None
        if is_counted and step.rows != self._piece.rows:  # the first axis of its arguments is another one than rows
            self._items = self._items.in_batches()
            self._waiting = [self._items.arrive(batch)]
            self._now = self._waiting[0]
        self._items.choose_size(max(step.rows, 1), max(nbytes_of(step), 1))
        assert self._items.size is not None
        self._begin_units(self._items.size)
        for arrived in self._waiting:
            self._parts = self._take(arrived)
            for unit, indices in self._parts.items() if arrived.failed else ():
                unit.cut(arrived, indices)
        self._waiting = []

    def _begin_units(self, size: int) -> None:
        self._items.size = size
        self._writer.unit_size = {self._items.size_member: size}
        self._units = RunUnits(self._items, self._find_unit, self._writer.new_unit, may_grow=self._may_grow)

    def _take(self, arrived: Arrived) -> Mapping[RunUnit, list[int]]:
        """The units of a batch, which take their items; each with the indices of its own."""
        assert self._units is not None
        parts = self._units.split(arrived.places)
        for unit, indices in parts.items():
            unit.take(arrived, indices, self._items)
        return parts

    def _end_unit(self, unit: RunUnit) -> None:
        """Hand a unit over to be written, or compare the whole of it when it is stored.

        Raises:
            ArgumentError: a place before the last one is missing.
            OtherRunError: the unit in the store was made from other batches.
            StoreError: an earlier unit could not be written.
        """
        assert self._units is not None
        if unit.stored is not None:
            unit.stored.end(len(unit.places), unit.inputs)
            self._proof.end(unit.stored)
            if self._writer.hold_back and self.rows:
                self._proof.check_further()
            self._writer.hold_back = self._writer.hold_back and not self._proof.is_done
        else:  # a unit without rows too, so that a resumed run finds it
            unit.check_gapless()
            metadata, order = unit.metadata, unit.permutation
            if isinstance(self._items, BatchItems):
                metadata, order = {BATCHES: str(len(unit.places)), INPUTS: unit.inputs}, None
            is_same = partial(unit.is_same, self._stored)
            self._writer.commit(unit.gathered, unit_name(unit.number), metadata, order, is_same)
        self._units.close(unit)

    def _find_unit(self, number: int) -> StoredUnit | None:
        if not self._stored.has(number):
            return None
        if not self._has_store:  # another process has begun the store meanwhile
            self._writer.check_run()
            self._has_store = True
        return self._stored[number]
