"""Batches of windows, made into the rows of a data set for a run that knows nothing of windows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, final

from activation_extractor._format._fingerprints import describe
from activation_extractor.errors import ArgumentError, StepError
from activation_extractor.reducers import Reducer
from activation_extractor.runs._added_rows import AddedRows
from activation_extractor.runs._batches import Batch
from activation_extractor.runs._grouped import Grouped, empty_row
from activation_extractor.runs._padding import Padding
from activation_extractor.runs._pieces import Pieces
from activation_extractor.runs._run import Run
from activation_extractor.runs._window_batches import OpenRow, RowBatch, WindowBatch
from activation_extractor.sinks import Sink, Step
from activation_extractor.sinks._step import part_of

Forward = Callable[[Batch, bool], None]


@final
class WindowedRows(Sink):
    """Takes batches of windows, and gives a run the rows that are whole, as batches of rows.

    A batch of windows is run when the run asks for the first row that needs it; the run does not ask for rows that are
    stored. What else is computed in it is held until it is asked for, or its row is found to be stored. With
    `skips_rows`, what a window raises is raised where its row is asked for.
    """

    reads_later = True

    def __init__(
        self, run: Run | AddedRows, reducers: Mapping[str, Reducer], padding: Padding, *, skips_rows: bool = False
    ) -> None:
        self._run, self._reducers, self._padding = run, reducers, padding
        self._grouped = Grouped(reducers)
        self._open: dict[int, OpenRow] = {}
        self._pieces, self._skips_rows = Pieces(skips_rows=skips_rows), skips_rows
        self._failed: dict[int, Exception] = {}  # what windows raised, by the places of their rows
        self._into: Grouped  # where the windows of the batch that runs go
        self._now: WindowBatch  # the batch that runs
        self._row = 0  # of it, the first that has not come
        self._wanted: set[int] = set()  # the places of the rows whose windows are held

    def begin(self, about: Mapping[str, Any]) -> None:
        """Begin the run."""
        own = {name: reducer.merge for name, reducer in self._reducers.items() if hasattr(reducer, "merge")}
        self._run.begin({**about, **({"merge": describe(own)} if own else {})})

    def add(self, batch: Batch, forward: Forward) -> None:
        """Add the next batch of windows.

        `forward` runs it, or a part of it, and ends in a call of `write`.

        Raises:
            ArgumentError: a window comes twice, or says something else of its row than one before; or a reducer does
                not say how windows are merged. And whatever `Run.add` raises.
        """
        for places in self._arrive(WindowBatch.of(batch, self._padding, self._reducers)):
            rows = RowBatch.of([self._open[place] for place in places])
            self._run.add(rows, partial(self._compute, forward))
            self._grouped.drop(places)
            for place in places:
                del self._open[place]
                self._failed.pop(place, None)

    def write(self, step: Step) -> None:
        """Hold the windows of a batch, or of a part of it, that are of rows that are wanted."""
        if self._skips_rows:  # while the row can be left out
            step.check_masks()
        now, start = self._now, self._row
        self._row += step.rows
        self._pieces.is_final = True
        rows = range(min(step.rows, len(now.parts) - start))
        wanted = [row for row in rows if now.parts[start + row].place in self._wanted]
        if wanted:
            parts = [now.parts[start + row] for row in wanted]
            counts = [now.counts[start + row] for row in wanted]
            weights = {name: [sums[start + row] for row in wanted] for name, sums in now.weights.items()}
            self._into.hold(part_of(step, wanted), parts, counts, weights)

    def end_pass(self) -> None:
        """End a pass over the data set; raises an ArgumentError where a row lacks a window."""
        if self._open:
            row = self._open[min(self._open)]
            missing = next(number for number in range(row.part.windows) if number not in row.windows)
            condition = f"hold window {missing} of {row.name}, which has {row.part.windows}"
            advice = f"{len(self._open)} rows lack windows." if len(self._open) > 1 else ""
            raise ArgumentError("group", condition, sorted(row.windows), advice)
        if isinstance(self._run, Run):
            self._run.end_pass()

    def end(self) -> None:
        """End the run, after the last pass."""
        if not isinstance(self._run, Run):
            self.end_pass()
        self._run.end()

    def close(self) -> None:
        """Close the run."""
        self._run.close()

    def _arrive(self, windows: WindowBatch) -> Iterator[list[int]]:
        """The places of the rows that are whole with a batch: those of one window together, each other one alone."""
        self._grouped.check_merges(windows.parts)
        ids, keep = windows.batch.ids, windows.batch.keep
        for index, part in enumerate(windows.parts):
            kept = {name: column[index] for name, column in keep.items()}
            new = OpenRow(part, ids[index] if ids else None, kept)
            self._open.setdefault(part.place, new).add(new, windows, index)
            if part.windows == 1 and not windows.counts[index]:
                self._failed[part.place] = empty_row(new.name)
        places = dict.fromkeys(part.place for part in windows.parts)
        single = [place for place in places if self._open[place].part.windows == 1]
        whole = [place for place in places if self._open[place].is_whole and self._open[place].part.windows > 1]
        yield from ([single] if single else [])
        yield from ([place] for place in whole)

    def _compute(self, forward: Forward, rows: Batch, is_again: bool) -> None:
        """Hand rows to the run, after running what of their windows has not been run; or all of it, with `is_again`."""
        assert isinstance(rows, RowBatch)
        self._into = Grouped(self._reducers) if is_again else self._grouped
        self._wanted = {*rows.places} if is_again else {*self._open}
        for windows in rows.needed:
            self._check(rows)
            if is_again or not windows.pieces:
                self._run_windows(windows, forward, is_again)
        self._check(rows)
        for step in self._into.take(rows.places):
            self._run.write(step)

    def _check(self, rows: RowBatch) -> None:
        """Raise what a window of these rows raised."""
        failed = next((place for place in rows.places if place in self._failed), None)
        if failed is not None:
            raise self._failed[failed]

    def _run_windows(self, windows: WindowBatch, forward: Forward, is_again: bool) -> None:
        self._now, self._row = windows, 0
        pieces = 0

        def leave_out(error: Exception) -> None:
            self._failed[windows.parts[self._row].place] = error
            self._row += 1

        def run(piece: Batch) -> None:
            nonlocal pieces
            forward(piece, is_again)
            pieces += 1

        self._pieces.run(windows.batch, run, leave_out if self._skips_rows else None)
        windows.pieces = windows.pieces if is_again else max(pieces, 1)
        if self._row != len(windows.parts):
            got = f"{self._row} rows for {len(windows.parts)} windows"
            raise StepError("have a row for each window", got, "Give each window the id of its row, with ids=.")
