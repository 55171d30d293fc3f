"""The passes of a run over its batches: which batches it asks for, and when."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Collection, Generator, Iterable, Iterator
from itertools import islice
from typing import Any, final

import numpy as np

from activation_extractor.runs._agreement import agreed_layout
from activation_extractor.runs._items import BatchItems
from activation_extractor.runs._layouts import BatchLayout
from activation_extractor.runs._run import Run
from activation_extractor.runs._run_units import RunUnits
from activation_extractor.runs._sources import Batches, NumberedBatches, Split
from activation_extractor.runs._windowed_rows import WindowedRows
from activation_extractor.store import open_store

_SAMPLED_UNITS = 32  # of those that are stored, where their batches come anyway


class Passes(ABC):
    """Gives the batches that a run needs, one by one, each after the one before was added.

    Args:
        sink: takes the batches.
        run: the run that `sink` writes, or `sink` itself.
        batches: the batches.
        split: takes one apart.
        is_full: whether all stored units are compared in full.
        has_order: whether rows have places of their own.
        has_row_names: whether rows are known by ids or places, so that no batch need be run to count them.

    Attributes:
        missing: the units that are missing at the end, where batches cannot be gone through again.
    """

    compares_others = True  # whether what other processes store meanwhile is compared

    def __init__(
        self,
        sink: Run | WindowedRows,
        run: Run,
        batches: Batches,
        split: Split,
        *,
        is_full: bool,
        has_order: bool,
        has_row_names: bool,
    ) -> None:
        self.sink, self.run, self.batches, self.split = sink, run, batches, split
        self.is_full, self.has_order, self.has_row_names = is_full, has_order, has_row_names
        self.missing: list[int] = []
        self.seconds = 0.0  # that adding batches took

    def __len__(self) -> int:
        return len(self.batches.batches)  # type: ignore[arg-type]

    @property
    def total_rows(self) -> int | None:
        """How many rows all batches have, where they say so."""
        return getattr(self.batches.batches, "total_rows", None)

    @abstractmethod
    def __iter__(self) -> Iterator[Any]: ...

    def result(self, out: Any) -> Any:
        """What the call returns that made the passes: the store."""
        return open_store(out, partial=bool(self.missing))

    @property
    def numbered(self) -> NumberedBatches | None:
        """The batches, if they can be asked for by their numbers; windows of rows cannot be."""
        return self.batches if isinstance(self.batches, NumberedBatches) and self.sink is self.run else None

    @property
    def units(self) -> RunUnits:
        """The units of the run, once their size is known."""
        assert self.run.units is not None
        return self.run.units

    @property
    def is_lazy(self) -> bool:
        """Whether batches that are not asked for are not loaded."""
        return self.numbered is not None and not self.numbered.is_loaded and not self.is_full

    def agreed_layout(self) -> BatchLayout | None:
        """Where items are, if the stored units are there as well; None where that is not sure."""
        if self.numbered is None or self.run.units is None:
            return None
        return agreed_layout(self.run, self.numbered, self.split, has_order=self.has_order)

    def whole(self, begun: int = 0) -> Iterator[Any]:
        """All batches after the first that have `begun`; of the stored units, some are compared in full."""
        data, items = self.run.stored.data, self.run.items
        numbers = sorted(data)
        places = np.linspace(0, len(numbers) - 1, _SAMPLED_UNITS).round() if numbers else []
        sampled = {numbers[int(place)] for place in places}
        is_of_rows = not isinstance(items, BatchItems)

        def is_compared(number: int) -> bool:
            known = data.get(number)
            if known is None:  # it is in no journal, or was written meanwhile
                return number in data or self.compares_others
            return number in sampled or (is_of_rows and known.items != self.run.stored.rows(number))

        # the digest of a batch may depend on those before it
        is_uneven = not is_of_rows and self.run.units is not None and not self.units.is_even
        self.run.choice.compares = (lambda _: True) if self.is_full or is_uneven else is_compared
        yield from self.timed(islice(iter(self.batches), begun, None))
        self.sink.end_pass()

    def compare(self, layout: BatchLayout) -> Generator[Any, None, None]:
        """A batch of a stored unit, to be run again; and all of the units of which the journals say nothing."""
        choice = self.run.choice
        yield from self.prove(layout, sorted(self.run.stored.data))
        if self.run.stored.unknown and not self.run.expected.was_other:
            self.run.begin_pass(is_scattered=True)
            choice.computes, choice.compares = (lambda _: False), (lambda _: True)
            yield from self._take(layout, self._numbers(layout, self.run.stored.unknown, set(), are_stored=True))

    def prove(self, layout: BatchLayout, units: Iterable[int]) -> Generator[Any, None, None]:
        """Batches of stored units, until one of them was run again."""
        run = self.run
        run.begin_pass(is_scattered=True)
        run.choice.computes = lambda _: False
        for unit in units:
            for item in self._take(layout, layout.batches_of(*self.units.span(unit))):
                yield item
                if not run.proof.is_open or run.expected.was_other:
                    break
            if not run.proof.is_open or run.expected.was_other:
                break
        if not run.expected.was_other:
            run.end_proof()

    def compute(self, layout: BatchLayout, units: Collection[int], begun: int = 0) -> Generator[Any, None, None]:
        """The batches of units that are missing still when they are asked for; `begun` of all batches have come."""
        asked = {*range(begun)}
        if begun:
            self.units.scatter()
        else:
            self.run.begin_pass(is_scattered=True)
        self.run.choice.computes = units.__contains__
        if units and layout.reaches_end(self.units.span(max(units))[1]):
            self.units.end_at(layout.items)
        yield from self.timed(self._take(layout, self._numbers(layout, units, asked)))
        for unit in () if self.run.expected.was_other else self.units.open:
            if unit.is_computed and asked.issuperset(layout.batches_of(*self.units.span(unit.number))):
                unit.check_complete()
                self.run.end_unit(unit)

    def _numbers(
        self, layout: BatchLayout, units: Iterable[int], asked: set[int], *, are_stored: bool = False
    ) -> Iterator[int]:
        """The numbers of the batches of units, each once, without those that were `asked` for before.

        The first batch of a unit comes first, as in a run of all batches.
        """
        for group in layout.groups({unit: self.units.span(unit) for unit in units}):
            wanted = group if are_stored else filter(self.run.choice.is_missing, group)
            batches = {batch for unit in wanted for batch in layout.batches_of(*self.units.span(unit))}
            for batch in sorted(batches - asked):
                asked.add(batch)
                yield batch

    def timed(self, items: Iterable[Any]) -> Iterator[Any]:
        """Items, and how long it took until all were added."""
        begun = time.monotonic()
        yield from items
        self.seconds += time.monotonic() - begun

    def _take(self, layout: BatchLayout, numbers: Iterable[int]) -> Iterator[Any]:
        assert self.numbered is not None
        for number, item in self.numbered.take(numbers):
            places = layout.places(number)
            self.run.items.go_to(number, places[0] if len(places) else 0)
            self.run.expected.places = places
            yield item
            if self.run.expected.was_other:
                return
        self.run.expected.places = None


@final
class AllUnits(Passes):
    """What one process needs, alone or beside others that do the same: all batches, or those that are missing.

    Where batches can be asked for by their numbers, and stored units lie where these would put them, what is stored is
    compared by the journals, and missing batches alone are asked for, beside one that is run again.
    """

    def __iter__(self) -> Iterator[Any]:
        layout = self.agreed_layout() if self.is_lazy and self.run.stored.data else None
        if layout is not None:
            self.run.expected.is_lenient = True
            yield from self._missing(layout, max(self.run.stored.data))
            self.run.expected.is_lenient = False
            if not self.run.expected.was_other:
                return
            self.run.begin_pass(is_scattered=False)
        self.run.choice.computes = lambda _: True
        yield from self.whole()

    def _missing(self, layout: BatchLayout, last: int) -> Iterator[Any]:
        """What is missing before the last unit that is stored, and after it."""
        run = self.run
        run.choice.stored_rows = run.stored.all_rows
        yield from self.compare(layout)
        if not run.expected.was_other:
            yield from self.compute(layout, run.choice.missing(range(last)))
        start = self.units.first_places(last + 2)[-1]
        if run.expected.was_other or start == layout.most_items:
            return
        if run.stored.ended == last + 1 and layout.may_end_at(start):
            return
        if self.has_order:
            yield from self.compute(layout, range(last + 1, self.units.number_of(layout.items - 1) + 1))
        else:
            yield from self._rest(layout, start, last)

    def _rest(self, layout: BatchLayout, start: int, last: int) -> Iterator[Any]:
        """All batches from a place on; they may have other rows than was thought, since none of these is stored."""
        assert self.numbered is not None
        self.run.begin_pass(is_scattered=True)
        self.run.choice.computes = lambda number: number > last
        first: int = layout.batches_of(start, start + 1)[0]
        self.run.items.go_to(first, layout.places(first)[0])
        yield from self.timed(item for _, item in self.numbered.take(range(first, layout.batches)))
        self.run.end_pass(is_whole=False)
