"""The units of a run: each is a range of the items of its data set, which may come in any order."""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor

from activation_extractor._format._headers import Entries
from activation_extractor.errors import ArgumentError
from activation_extractor.runs._batch_columns import is_near
from activation_extractor.runs._items import Arrived, Items
from activation_extractor.runs._stored_unit import FAILED, FIRST_BATCH, INPUTS, StoredUnit, StoredUnits
from activation_extractor.sinks._units import Unit

GAPS = "Sort rows within windows that follow each other, as length_batches does."
CUT = "cut"  # in place of the rows of a batch that was run in pieces


@dataclass(eq=False)
class RunUnit:
    """A unit that has not all of its items yet.

    Attributes:
        number: in the data set, from 0.
        start: the place of its first item.
        size: how many items it has.
        stored: what the store holds of it; None where it is missing.
        gathered: its rows, where it is missing.
        places: of the items that have come, counted from its first one.
        inputs: a digest of what they are made from, in hexadecimal.
        first_batch: which rows came with the first of them, counted from the unit's first one, as a digest; or `CUT`.
        failed: what was raised for items that are left out, by their places.
        places_from: the argument that names the field with places, for errors.
    """

    number: int
    start: int
    size: int
    stored: StoredUnit | None
    gathered: Unit
    places: list[int] = field(default_factory=list)
    inputs: str = "0"
    first_batch: str = ""
    failed: dict[int, str] = field(default_factory=dict)
    places_from: str = "order"
    _taken: set[int] = field(default_factory=set)
    _is_first: bool = True  # whether the last batch gave its first item

    def take(self, batch: Arrived, indices: Sequence[int], items: Items) -> None:
        """Take some items of a batch; raises an ArgumentError where one was taken before."""
        own = [batch.places[index] - self.start for index in indices]
        self._is_first = not self.places
        if self._is_first:
            self.first_batch = batch.relative_to(self.start)
        for place in own:
            if place in self._taken:
                raise ArgumentError(self.places_from, "hold each place once", place + self.start, GAPS)
            self._taken.add(place)
        self.places += own
        self.inputs = items.digest(self.inputs, batch.digests[indices], own)

    def cut(self, batch: Arrived, indices: Sequence[int]) -> None:
        """Note that the last batch was run in pieces, and which of its rows were left out."""
        if self._is_first:
            self.first_batch = CUT
        for index in indices:
            if error := batch.failed.get(index):
                self.failed[batch.places[index] - self.start] = f"{type(error).__name__}: {error}"

    @property
    def metadata(self) -> dict[str, str]:
        """What a shard of rows says of where they come from."""
        failed = {FAILED: json.dumps(self.failed, sort_keys=True)} if self.failed else {}
        return {INPUTS: self.inputs, FIRST_BATCH: self.first_batch, **failed}

    def is_same(self, units: StoredUnits, entries: Entries) -> bool:
        """Whether a unit that another process wrote is made from the same rows, in whatever batches, and as good."""
        stored = units[self.number]
        is_of_rows = stored.inputs == self.inputs and stored.failed.keys() == self.failed.keys()
        return is_of_rows and is_near(stored, entries)

    @property
    def is_complete(self) -> bool:
        """Whether all items have come."""
        return len(self.places) == self.size

    def check_gapless(self) -> None:
        """Make sure that no place before the last one of the data set is missing; raises an ArgumentError."""
        if not self.places:
            condition = f"hold the places {self.start} to {self.start + self.size - 1}, since it holds later ones"
            raise ArgumentError(self.places_from, condition, [], GAPS)
        last = max(self.places)
        missing = next((place for place in range(last) if place not in self._taken), None)
        if missing is not None:
            condition = f"hold place {missing + self.start} where it holds place {last + self.start}"
            got = sorted(place + self.start for place in self.places)
            raise ArgumentError(self.places_from, condition, got, GAPS)

    @property
    def permutation(self) -> Tensor | None:
        """Which of its rows is stored first, second, ...: ``(rows,)`` int64; None for as they came."""
        places = [place for place in self.places if place not in self.failed]
        if all(before < after for before, after in pairwise(places)):
            return None
        return torch.tensor(places, dtype=torch.int64).argsort()


class RunUnits:
    """The units that are open: begun, or left out by places that came before theirs.

    `find` returns what the store holds of the unit with a number, None where it is missing.

    Attributes:
        size: how many items a unit has that is not stored.
        stored: how many rows the stored units have that were found so far.
    """

    def __init__(
        self, items: Items, find: Callable[[int], StoredUnit | None], new_unit: Callable[[], Unit], *, may_grow: bool
    ) -> None:
        assert items.size is not None
        self.size, self.stored, self._may_grow, self._places_from = items.size, 0, may_grow, items.places_from
        self._find, self._new_unit = find, new_unit
        self._starts = [0]
        self._open: dict[int, RunUnit] = {}
        self._last: RunUnit | None = None
        self._last_found: StoredUnit | None = None

    def split(self, places: Sequence[int]) -> dict[RunUnit, list[int]]:
        """The units of items at these places, each with the indices of its own; raises an ArgumentError."""
        found: dict[RunUnit, list[int]] = {}
        for index, place in enumerate(places):
            unit = self._last
            if unit is None or not unit.start <= place < unit.start + unit.size:
                unit = self._last = self._unit_of(place)
            found.setdefault(unit, []).append(index)
        return found

    def close(self, unit: RunUnit) -> None:
        """Forget a unit: its places are taken."""
        del self._open[unit.number]
        self._last = None

    @property
    def open(self) -> list[RunUnit]:
        """The units that are open, in their order."""
        return [self._open[number] for number in sorted(self._open)]

    @property
    def count(self) -> int:
        """How many units there are so far."""
        return len(self._starts) - 1

    def _unit_of(self, place: int) -> RunUnit:
        while place >= self._starts[-1]:
            self._open_next()
        unit = self._open.get(bisect_right(self._starts, place) - 1)
        if unit is None:
            raise ArgumentError(self._places_from, "hold each place once", place, GAPS)
        return unit

    def _open_next(self) -> None:
        number, start = self.count, self._starts[-1]
        stored = self._find(number)
        before = self._last_found if stored is None else None
        if before and before.items < self.size and not self._may_grow:
            before.fail(f"it goes on after the last of its {before.rows} rows, which append=True allows")
        self._last_found = stored
        size = stored.items if stored else self.size
        self.stored += stored.rows if stored else 0
        self._open[number] = RunUnit(number, start, size, stored, self._new_unit(), places_from=self._places_from)
        self._starts.append(start + size)
