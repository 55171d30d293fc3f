"""The pass of a run that computes a single unit, which was planned."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, final

from activation_extractor._format._journal import Journal
from activation_extractor._format._shards import size_of
from activation_extractor._storage import located
from activation_extractor.errors import ArgumentError
from activation_extractor.runs._items import Items
from activation_extractor.runs._layouts import BatchLayout
from activation_extractor.runs._passes import Passes
from activation_extractor.runs._planned_units import PlannedUnit, Receipt
from activation_extractor.runs._sources import Batches, NumberedBatches, Split

# By process and folder: a process writes one for all its units.
_JOURNALS: dict[tuple[int, Path], Journal] = {}


@final
class OneUnit(Passes):
    """What a task computes: one unit, unless it is stored. Nothing else of the store is looked at."""

    def __init__(self, sink: Any, run: Any, batches: Batches, *args: Any, unit: PlannedUnit, **options: Any) -> None:
        super().__init__(sink, run, _Planned(batches, unit), *args, **options)
        self._unit, self._layout = unit, _Layout(unit)
        run.count = unit.units
        run.writer.journal = _JOURNALS.setdefault((os.getpid(), run.folder.absolute()), run.writer.journal)

    def __iter__(self) -> Iterator[Any]:
        run, unit = self.run, self._unit
        if run.units is None:
            run.begin_units(unit.size)
        run.choice.is_shared, run.proof.is_open = True, False
        self.units.assume(unit.number + 2)
        run.choice.compares = lambda _: False
        yield from self.compute(self._layout, [unit.number])

    def result(self, out: Any) -> Any:  # noqa: ARG002
        """The receipt of the unit."""
        stored = self.run.stored[self._unit.number]
        path, is_new = located(stored.path), self._unit.number in self.run.choice.committed
        return Receipt(self._unit.name, stored.rows, size_of(path), path, is_new and not self.run.choice.overtaken)


@final
class _Planned(NumberedBatches):
    """The batches of a unit, given alone or among all batches of the data set."""

    def __init__(self, batches: Batches, unit: PlannedUnit) -> None:
        super().__init__(batches.batches)
        self._given, self._unit = batches, unit

    def __len__(self) -> int:
        return len(self._unit.batches)

    def take(self, numbers: Iterable[int]) -> Iterator[tuple[int, Any]]:
        """The batches with these numbers, in their order."""
        given, wanted = self._given, list(numbers)
        if isinstance(given, NumberedBatches) and len(given) == self._unit.all_batches:
            yield from given.take(wanted)
            return
        items = iter(given) if wanted else iter(())
        for count, number in enumerate(wanted):
            item = next(items, None)
            is_last = count == len(wanted) - 1
            if item is None or (is_last and next(items, None) is not None):
                condition = (
                    f"be the {len(wanted)} of unit {self._unit.name!r}, or all {self._unit.all_batches} by number"
                )
                raise ArgumentError("batches", condition, f"{count} of them" if item is None else "further ones")
            yield number, item

    def layout(self, items: Items, split: Split, *, has_order: bool) -> BatchLayout | None:  # noqa: ARG002
        return _Layout(self._unit)


@final
class _Layout(BatchLayout):
    """Where the items of a unit's batches are."""

    def __init__(self, unit: PlannedUnit) -> None:
        self._unit, self.batches = unit, unit.all_batches

    @property
    def items(self) -> int:
        return self._unit.rows.stop

    @property
    def most_items(self) -> int:
        return self._unit.rows.stop

    def reaches_end(self, stop: int) -> bool:  # noqa: ARG002
        return self._unit.number == self._unit.units - 1

    def places(self, batch: int) -> Sequence[int]:
        return self._unit.batches[batch]

    def batches_of(self, start: int, stop: int) -> Sequence[int]:  # noqa: ARG002
        return sorted(self._unit.batches)

    def positions_of(self, places: Any) -> Any:  # noqa: ARG002
        return None
