"""Rows that are new in a data set that grew, added to the store of the others."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, final

import numpy as np
import torch
from torch import nn

from activation_extractor._creation import exists
from activation_extractor._display import examples, plural
from activation_extractor._format._codecs import Codec
from activation_extractor._format._end import read_end, write_end
from activation_extractor._format._headers import Entries
from activation_extractor._format._manifest import BATCHES_PER_UNIT, ROWS_PER_UNIT, store_name
from activation_extractor._format._reader import Reader
from activation_extractor._format._seen_ids import SeenIds
from activation_extractor._format._shards import list_units, shard_path, unit_name
from activation_extractor._format._stored_rows import RowId
from activation_extractor.errors import ArgumentError, StoreError
from activation_extractor.runs._batch_columns import is_near
from activation_extractor.runs._batch_rows import Digests, combined
from activation_extractor.runs._batches import Batch
from activation_extractor.runs._caller import warn_caller
from activation_extractor.runs._items import RowItems
from activation_extractor.runs._pieces import Pieces
from activation_extractor.runs._proof import Proof
from activation_extractor.runs._run_units import CUT, GAPS
from activation_extractor.runs._stored_run import manifest_of_run
from activation_extractor.runs._stored_unit import FIRST_BATCH, INPUTS, StoredUnit
from activation_extractor.sinks import Sink, Step
from activation_extractor.sinks._step import part_of
from activation_extractor.sinks._store_writer import StoreWriter, take_once
from activation_extractor.store import open_store


@final
class AddedRows(Sink):
    """Writes the rows of a data set whose ids a store of `extract` lacks, as units behind those that it has.

    A unit ends with the first batch that leaves no gap among the places so far, once it has as many rows as units have.
    The first batch that has stored rows is run again, and these are compared.
    """

    reads_later = True

    def __init__(
        self,
        folder: Path,
        codec: Codec,
        model: nn.Module,
        fingerprint: Callable[[], Mapping[str, Any]],
        items: RowItems,
        *,
        queue_bytes: int,
        on_failure: Callable[[RowId, Exception], Any] | None,
    ) -> None:
        self.stored_rows = 0  # that the data set had so far
        self._folder, self._codec, self._model, self._fingerprint = folder, codec, model, fingerprint
        self._items, self._size = items, 1
        self._writer = StoreWriter(folder, codec, queue_bytes=queue_bytes, shares_store=True)
        self._pieces, self._on_failure = Pieces(skips_rows=on_failure is not None), on_failure
        self._proof = Proof(folder, codec, model)
        self._stored: list[str] = []  # the units that were there before
        self._number = 0  # of the unit
        self._new = SeenIds()  # the ids that were added: one that comes again is an error
        self._unit = self._writer.new_unit()
        self._came = SeenIds()  # the ids that came and were stored before: each comes once
        self._ids: list[str] = []  # of the rows of the unit
        self._places: list[int] = []  # of the same rows, in the data set
        self._digests: list[Digests] = []  # of what they are made from
        self._seen: set[int] = set()  # places that came, from the first that did not come on
        self._first_unseen = 0
        self._chosen: Sequence[int] = ()  # the rows of the batch that runs that are added
        self._row = 0  # of that batch, the first of the part that runs
        self._is_again = False  # whether it runs to be compared

    @property
    def rows(self) -> int:
        """How many rows were computed."""
        return self._writer.rows

    @property
    def nbytes(self) -> int:
        """How many bytes of columns they had."""
        return self._writer.nbytes

    def begin(self, about: Mapping[str, Any]) -> None:
        """Compare the run with the store, of which it takes over the size of units; and read the ids that are there.

        Raises:
            OtherRunError: the store is of another run.
            StoreError: with-blocks wrote the store, a unit is missing, or what it says of its end is damaged.
        """
        manifest, self._size = manifest_of_run(self._folder)
        missing = open_store(self._folder, partial=True).missing_units
        if missing:
            got = f"{plural(len(missing), 'unit')} missing: {examples(missing)}"
            advice = "Call extract without append=True first, with the data that it was begun with."
            raise StoreError(self._folder, "have all units up to its last before rows are added", got, advice)
        about = {**about, **self._fingerprint(), "rows_per_unit": manifest.fingerprint.get("rows_per_unit")}
        self._writer.begin(about)
        self._writer.unit_size = {ROWS_PER_UNIT if manifest.rows_per_unit else BATCHES_PER_UNIT: self._size}
        self._writer.resume()
        self._reader = Reader(self._codec, store_name(about))
        self._stored = list_units(self._folder, self._codec)
        self._writer.remember_units(self._stored, lambda unit: self._reader.ids(self._path(unit)))
        self._number = int(self._stored[-1]) + 1 if self._stored else 0
        self._writer.hold_back = bool(self._stored)

    def add(self, batch: Batch, forward: Callable[[Batch, bool], None]) -> None:
        """Add the rows of a batch that are new; `forward` is as for `Run.add`.

        Raises:
            ArgumentError: the places are not integers, or one comes twice.
            OtherRunError: the model computes other values than those of the store.
            StoreError: an id comes twice, or an earlier unit could not be written.
        """
        places, ids = self._items.places(batch), batch.ids or []
        self._see(places)
        known = zip(self._writer.has_ids(ids), self._new.has(ids), strict=True)
        stored = [row for row, (is_known, is_new) in enumerate(known) if is_known and not is_new]
        self.stored_rows += len(stored)
        take_once(self._folder, self._came, (ids[row] for row in stored))
        if stored and self._proof.is_open:
            self._prove(batch, stored, forward)
        new = sorted(set(range(len(ids))) - set(stored))
        if new:
            self._proof.check_further()
            digests = self._items.digests(batch, places)
            take_once(self._folder, self._new, [ids[row] for row in new])
            failed = self._run(batch, new, forward)
            new = [row for row in new if row not in failed]
            self._digests.append(digests[new])
            self._places += [places[row] for row in new]
            self._ids += [str(ids[row]) for row in new]
        if len(self._places) >= self._size and not self._seen:
            self._end_unit()

    def write(self, step: Step) -> None:
        """Add the new rows of a batch, or of a part of it, to the unit; raises what `StoreWriter.add` raises."""
        if self._is_again:
            self._proof.take(step)
            return
        if self._on_failure:  # while the row can be left out
            step.check_masks()
        start = self._row
        self._row += step.rows
        self._pieces.is_final = True
        rows = [row - start for row in self._chosen if start <= row < self._row]
        if rows:
            self._writer.add(part_of(step, rows), self._unit)

    def end(self) -> None:
        """End the last unit, after the last batch."""
        if self._places:
            self._end_unit()
        self._writer.hold_back = False
        end = read_end(self._folder)
        if self._number and (end is None or end.units < self._number):
            self._writer.then(self._write_end)

    def close(self) -> None:
        """Wait until the finished units are on the disk; the current one is dropped."""
        self._writer.finish()

    def _write_end(self) -> None:
        """Say where the data set ends now; other processes may have added rows to it as well."""
        store = open_store(self._folder, partial=True)
        if not store.missing_units:
            write_end(self._folder, len(store.shards), store.rows)

    def _run(self, batch: Batch, new: Sequence[int], forward: Callable[[Batch, bool], None]) -> set[int]:
        """Run the new rows of a batch alone, or all rows where it cannot be cut; returns the rows that are left out."""
        ids = batch.ids or []
        part, self._chosen = batch.alone(new)
        numbers = range(len(ids)) if part is batch else new
        self._row, failed = 0, set[int]()

        def leave_out(error: Exception) -> None:
            assert self._on_failure is not None
            failed.add(numbers[self._row])
            self._on_failure(ids[numbers[self._row]], error)
            self._row += 1

        self._pieces.run(part, lambda piece: forward(piece, False), leave_out)
        return failed

    def _prove(self, batch: Batch, stored: Sequence[int], forward: Callable[[Batch, bool], None]) -> None:
        """Run a batch again, and compare its rows with those of the unit that has the first of them."""
        ids = [str(row_id) for row_id in batch.ids or ()]
        for name in self._stored:
            unit_ids = {str(row_id): row for row, row_id in enumerate(self._reader.ids(self._path(name)) or ())}
            rows = [row for row in stored if ids[row] in unit_ids]
            if ids[stored[0]] in unit_ids:
                break
        else:
            return  # another process added it meanwhile
        unit = StoredUnit(self._folder, self._reader, self._path(name))
        stored_rows = [unit_ids[ids[row]] for row in rows]
        batch, chosen = batch.alone(rows) if self._on_failure else (batch, rows)  # others may not run
        self._is_again = True
        try:
            again = partial(self._pieces.run, batch, lambda piece: forward(piece, True))
            self._proof.run(unit, stored_rows, chosen, again, is_same_batch=False)
        finally:
            self._is_again = False
        if not self._proof.is_open:
            self._proof.end(unit)
        self._writer.hold_back = self._writer.hold_back and self._proof.is_open

    def _see(self, places: Sequence[int]) -> None:
        for place in places:
            if place < self._first_unseen or place in self._seen:
                raise ArgumentError(self._items.places_from, "hold each place once", place, GAPS)
            self._seen.add(place)
        while self._first_unseen in self._seen:
            self._seen.remove(self._first_unseen)
            self._first_unseen += 1

    def _end_unit(self) -> None:
        """Hand the unit over to be written, and begin the next one."""
        if self._writer.hold_back:
            text = f"No row that {str(self._folder)!r} holds came before {plural(len(self._places), 'new row')}: the"
            warn_caller(f"{text} model was compared by its weights and structure alone.")
            self._writer.hold_back = False
        order = np.argsort(self._places, kind="stable")
        inputs = combined(np.concatenate(self._digests)[order], range(len(order)))
        metadata = {INPUTS: f"{inputs:016x}", FIRST_BATCH: CUT}
        is_sorted = bool((np.diff(order) > 0).all())
        name = self._next_name([self._ids[row] for row in order])
        permutation = None if is_sorted else torch.from_numpy(order)
        self._writer.commit(self._unit, name, metadata, permutation, partial(self._is_same, name, metadata[INPUTS]))
        self._number += 1
        self._unit, self._places, self._ids, self._digests = self._writer.new_unit(), [], [], []

    def _next_name(self, ids: Sequence[str]) -> str:
        """The name of a unit of these ids: behind what other processes have added meanwhile.

        Raises:
            StoreError: another process has added some of the rows, in other units.
        """
        while exists(path := shard_path(self._folder, unit_name(self._number), self._codec)):
            theirs = self._reader.ids(str(path)) or []
            if [*map(str, theirs)] == ids:
                break  # the same unit
            if again := {*map(str, theirs)} & {*ids}:
                advice = "Call again: it adds the rows that are still missing."
                raise StoreError(self._folder, "get a row from one process", f"{min(again)!r} from two", advice)
            self._writer.remember_ids(theirs)
            self._number += 1
        return unit_name(self._number)

    def _is_same(self, name: str, inputs: str, entries: Entries) -> bool:
        """Whether another process, with batches of another size maybe, wrote a unit meanwhile."""
        unit = StoredUnit(self._folder, self._reader, self._path(name))
        return unit.inputs == inputs and is_near(unit, entries)

    def _path(self, unit: str) -> str:
        return str(shard_path(self._folder, unit, self._codec))
