"""Batches whose rows are stored already: they are compared with what the store holds, and one of them is run again."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial

from activation_extractor._format._stored_rows import RowId
from activation_extractor.runs._batches import Batch
from activation_extractor.runs._items import Arrived, BatchItems
from activation_extractor.runs._pieces import Pieces
from activation_extractor.runs._proof import Proof
from activation_extractor.runs._run_units import RunUnit
from activation_extractor.runs._stored_unit import StoredUnits

Report = Callable[[RowId, Exception], object]


class StoredBatches:
    """Compares batches with the units that hold their rows.

    Args:
        stored: the units.
        proof: runs a batch again.
        pieces: in which batches are run.
        report: called with the id or the place of each row that was left out, and why; None where none may be.
    """

    def __init__(self, stored: StoredUnits, proof: Proof, pieces: Pieces, report: Report | None) -> None:
        self._stored, self.proof, self._pieces, self._report = stored, proof, pieces, report

    def compare(self, unit: RunUnit, now: Arrived, indices: list[int]) -> tuple[list[int], list[RowId] | None]:
        """Compare ids with those of a unit; returns which of the batch's rows are there, and their ids.

        Raises:
            OtherRunError: the ids are other ones, or a row was left out that may not be.
        """
        stored, batch = unit.stored, now.batch
        assert stored is not None
        if isinstance(now.items, BatchItems):
            ids, rows = batch.ids, None
        else:
            places = {index: now.places[index] - unit.start for index in indices}
            for index in stored.left_out(places, is_allowed=self._report is not None):
                assert self._report is not None
                self._report((batch.ids or now.places)[index], RuntimeError(stored.failed[places[index]]))
            indices = [index for index in indices if places[index] not in stored.failed]
            ids = now.items.ids(batch, indices)
            rows = [stored.row_of(places[index]) for index in indices]
        if ids is not None:
            stored.compare(ids, rows)
        return indices, ids

    def prove(self, unit: RunUnit, now: Arrived, indices: list[int], forward: Callable[[Batch, bool], None]) -> None:
        """Run a batch again, and compare those of its rows that are in a unit with what is stored."""
        stored, batch, rows = unit.stored, now.batch, None
        assert stored is not None
        if not isinstance(now.items, BatchItems):
            rows = [stored.row_of(now.places[index] - unit.start) for index in indices]
        batch, chosen = batch.alone(indices) if self._report else (batch, indices)  # others may not run
        same = stored.first_batch in (None, now.relative_to(unit.start))
        again = partial(self._pieces.run, batch, lambda piece: forward(piece, True))
        self.proof.run(stored, rows, chosen if rows else None, again, is_same_batch=same)

    def end(self, unit: RunUnit) -> None:
        """Compare the whole of a unit, once all of its items have come; raises an OtherRunError."""
        assert unit.stored is not None
        unit.stored.end(len(unit.places), unit.inputs)
        self.proof.end(unit.stored)

    def end_passed(self, unit: RunUnit) -> None:
        """Compare a unit that was passed with what the journal says of it; raises an OtherRunError."""
        if unit.data and unit.differs(unit.data):
            stored = self._stored[unit.number]
            stored.compare(unit.ids, unit.places if len(unit.places) == len(unit.ids) else None)
            stored.end(len(unit.places), stored.inputs)

    def end_proof(self, units: Iterable[RunUnit]) -> None:
        """End the proof, where no more of these units comes: raises an OtherRunError where the batch is another one."""
        for unit in units:
            if unit.stored is None:
                continue
            data = self._stored.data.get(unit.number)
            if data and unit.stored.first_batch == unit.first_batch and unit.told.first != data.first:
                unit.stored.fail_inputs()
            self.proof.end(unit.stored)
