"""The passes of a rank that shares a run with others: its own units first, then what others have left."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any, final

from activation_extractor._display import examples, plural
from activation_extractor._storage import RemotePath
from activation_extractor.runs._batches import BatchFields
from activation_extractor.runs._caller import warn_caller
from activation_extractor.runs._items import RowItems
from activation_extractor.runs._layouts import BatchLayout
from activation_extractor.runs._one_unit import OneUnit
from activation_extractor.runs._passes import AllUnits, Passes
from activation_extractor.runs._planned_units import PlannedUnit
from activation_extractor.runs._ranks import Remaining, Share
from activation_extractor.runs._run import Run
from activation_extractor.runs._sources import Batches, batches_of
from activation_extractor.runs._workers import each_row_once

_MOST_LOOKS, _LOOK_SECONDS = 5, 0.05
_LIST_SECONDS = 0.5  # between two looks into a bucket: each is a request that costs money
_WHOLE = (
    "Each of the {world} ranks goes through all batches, since they come one after the other. Where batches have "
    "__getitem__ and __len__, or a DataLoader gives them in a fixed order, a rank asks for its own alone."
)


@final
class DividedUnits(Passes):
    """What a rank computes: the units that are its own, and then those that are still missing.

    A batch of a unit that another rank has computed is run again, and compared, once: a rank with another model is
    found.
    """

    compares_others = False

    def __init__(self, *args: Any, share: Share, **options: Any) -> None:
        super().__init__(*args, **options)
        self._share, self._begun = share, 0

    @property
    def is_quiet(self) -> bool:
        """Whether another rank shows a bar."""
        return self._share.rank > 0

    @property
    def total_rows(self) -> int | None:
        """How many rows this rank computes, about, where the batches say how many there are."""
        rows = super().total_rows
        return None if rows is None else -(-rows // self._share.world)

    def __len__(self) -> int:
        return -(-super().__len__() // self._share.world)

    def __iter__(self) -> Iterator[Any]:
        run = self.run
        run.choice.is_shared = True
        run.choice.computes, run.expected.is_lenient = self._share.owns, self.has_order
        layout = None
        if self.is_lazy:
            self._read_journals()
            yield from self._choose_size()
            layout = self.agreed_layout()
        if layout is not None:
            yield from self._own(layout)
        if layout is None or run.expected.was_other:
            yield from self._own_of_all(is_again=layout is not None)
            layout = None if self.is_lazy else self.agreed_layout()
        yield from self._left_by_others(layout)
        if layout is not None and run.proof.is_open:
            others = sorted(run.stored.numbers().difference(run.choice.committed))
            yield from self.prove(layout, others[:1])

    def _read_journals(self) -> None:
        """Read them again, where other ranks have published units, and are about to say so."""
        for _ in range(_MOST_LOOKS):
            if self.run.stored.unknown:
                time.sleep(_LOOK_SECONDS)
                self.run.stored.read_journals()

    def _choose_size(self) -> Iterator[Any]:
        """The first batches, until the size of units is known: the same on each rank."""
        run = self.run
        if run.units is None and run.items.size and isinstance(run.items, RowItems) and self.has_row_names:
            run.begin_units(run.items.size)
        assert self.numbered is not None
        for _, item in self.numbered.take(range(len(self.numbered)) if run.units is None else ()):
            self._begun += 1
            yield from self.timed([item])
            if run.units is not None:
                return

    def _own(self, layout: BatchLayout) -> Iterator[Any]:
        """The units of this rank, of batches that can be asked for."""
        run = self.run
        if run.stored.data and run.proof.is_open:
            run.choice.stored_rows = run.stored.all_rows
            yield from self.compare(layout)
        if not run.expected.was_other:
            count = self._count(layout)
            self._share = self._share.in_groups(layout.groups({unit: self.units.span(unit) for unit in range(count)}))
            units = filter(self._share.owns, run.choice.missing(range(count)))
            yield from self.compute(layout, [*units], self._begun)

    def _own_of_all(self, *, is_again: bool) -> Iterator[Any]:
        """The units of this rank, of all batches."""
        if self.numbered is None and self.sink is self.run:
            warn_caller(_WHOLE.format(world=self._share.world))
        if is_again:
            self.run.begin_pass(is_scattered=False)
        self.run.choice.computes = self._share.owns
        yield from self.whole(0 if is_again else self._begun)

    def _left_by_others(self, layout: BatchLayout | None) -> Iterator[Any]:
        """The units that are missing, until none is."""
        run, count = self.run, self._count(layout)
        self._finish()
        is_remote = isinstance(run.folder, RemotePath)
        remaining = Remaining(
            self._share,
            look=lambda: run.choice.missing(range(count)),
            unit_seconds=lambda: self._unit_seconds(layout),
            overtaken=lambda: run.choice.overtaken,
            sleep=lambda seconds: time.sleep(max(seconds, _LIST_SECONDS if is_remote else 0)),
        )
        if layout is not None:
            for units in remaining:
                yield from self.compute(layout, units)
                self._finish()
        elif self.batches.can_repeat:
            for units in remaining:
                run.begin_pass(is_scattered=False)
                run.choice.computes = units.__contains__
                yield from self.whole()
                self._finish()
        else:
            self.missing = remaining.wait()
            if self.missing:
                text = (
                    f"{plural(len(self.missing), 'unit')} of other ranks are missing: {examples(self.missing)}. These"
                )
                warn_caller(f"{text} batches cannot be gone through again; call again to compute what is missing then.")

    def _finish(self) -> None:
        """Wait until all that was computed is on the disk, where other ranks see it."""
        begun = time.monotonic()
        self.run.flush()
        self.seconds += time.monotonic() - begun

    def _count(self, layout: BatchLayout | None) -> int:
        """How many units the data set has."""
        if layout is None:
            return self.run.units.count if self.run.units else 0
        return self.units.number_of(layout.items - 1) + 1 if layout.items else 0

    def _unit_seconds(self, layout: BatchLayout | None) -> float | None:
        """How long a unit takes, by those that were computed or by the first batches."""
        if self.run.choice.committed:
            return self.seconds / len(self.run.choice.committed)
        if layout is None or not self._begun:
            return None
        return self.seconds / self._begun * len(layout.batches_of(*self.units.span(0)))


def passes_of(
    sink: Any, run: Any, batches: Any, fields: BatchFields, *, share: Share | PlannedUnit | None, is_full: bool
) -> Passes | Batches:
    """The passes of a process that does a part of a run, or a unit of it; None for all of it.

    `sink` takes the batches, and writes `run`; where this is no `Run`, all batches come. `fields` are theirs.
    """
    source = batches_of(batches if fields.has_ids else each_row_once(batches))
    if not isinstance(run, Run):
        return source
    how: Any = {"is_full": is_full, "has_order": fields.has_order, "has_row_names": fields.has_row_names}
    what: Any = (sink, run, source, fields.split)
    if isinstance(share, PlannedUnit):
        return OneUnit(*what, unit=share, **how)
    return AllUnits(*what, **how) if share is None else DividedUnits(*what, share=share, **how)
