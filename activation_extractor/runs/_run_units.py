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
from activation_extractor._format._stored_rows import RowId
from activation_extractor.errors import ArgumentError
from activation_extractor.runs._batch_columns import is_near
from activation_extractor.runs._items import Arrived, Items
from activation_extractor.runs._stored_unit import FAILED, FIRST_BATCH, INPUTS, StoredUnit, StoredUnits
from activation_extractor.runs._unit_data import UnitData, ids_digest
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
        stored: what the store holds of it, where it is compared.
        gathered: its rows, where it is computed.
        is_passed: whether it is neither compared, but for its ids, nor computed.
        data: what the journal says of it, where it is stored and passed.
        places: of the items that have come, counted from its first one.
        ids: of the same items, where it is stored and passed.
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
    is_passed: bool = False
    data: UnitData | None = None
    places: list[int] = field(default_factory=list)
    ids: list[RowId] = field(default_factory=list)
    inputs: str = "0"
    first_batch: str = ""
    failed: dict[int, str] = field(default_factory=dict)
    places_from: str = "order"
    _taken: set[int] = field(default_factory=set)
    _is_first: bool = True  # whether the last batch gave its first item
    _first: str = ""
    _begins: tuple[int, int] | None = None
    _ends: tuple[int, int] | None = None
    _ids_digest: str = ""
    _ids_count: int = 0

    def take(self, batch: Arrived, indices: Sequence[int], items: Items) -> None:
        """Take some items of a batch; raises an ArgumentError where one was taken before."""
        own = [batch.places[index] - self.start for index in indices]
        self._is_first = not self.places
        for place in own:
            if place in self._taken:
                raise ArgumentError(self.places_from, "hold each place once", place + self.start, GAPS)
            self._taken.add(place)
        self.places += own
        if not self.is_passed or (self.data and self.data.ids):
            self._take_ids(items.ids(batch.batch, indices), own)
        if self.is_passed:
            return
        self.inputs = items.digest(self.inputs, batch.digests[indices], own)
        if self._is_first:
            self.first_batch, self._first = batch.relative_to(self.start), self.inputs
            self._begins = (batch.number, indices[0]) if batch.is_in_order and not own[0] else None
        self._ends = (batch.number, indices[-1]) if self._begins else None

    def _take_ids(self, ids: Sequence[RowId] | None, places: Sequence[int]) -> None:
        if ids is not None:
            places = places if len(places) == len(ids) else range(self._ids_count, self._ids_count + len(ids))
            self._ids_digest, self._ids_count = ids_digest(self._ids_digest, ids, places), self._ids_count + len(ids)
            self.ids += ids if self.is_passed else ()

    @property
    def is_computed(self) -> bool:
        """Whether its rows are computed."""
        return self.stored is None and not self.is_passed

    @property
    def told(self) -> UnitData:
        """What the journal is to say of it."""
        return UnitData(len(self.places), self._begins, self._ends, self._ids_digest, self._first)

    def differs(self, data: UnitData) -> bool:
        """Whether something else has come than what the journal says of it."""
        return len(self.places) != data.items or (bool(data.ids) and data.ids != self._ids_digest)

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

    def check_complete(self) -> None:
        """Make sure that no place is missing; raises an ArgumentError."""
        missing = next((place for place in range(self.size) if place not in self._taken), None)
        if missing is not None:
            got = sorted(place + self.start for place in self.places)
            raise ArgumentError(self.places_from, f"hold place {missing + self.start}", got, GAPS)

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

    Args:
        items: what units are counted in.
        stored: the units that the store holds.
        begin: makes a unit that begins, of its number, place and size.
        may_grow: whether the data set may go on after a stored unit that is not full.

    Attributes:
        size: how many items a unit has that is not stored.
        starts: the places of the first items of the units so far, and that after the last.
    """

    def __init__(
        self, items: Items, stored: StoredUnits, begin: Callable[[int, int, int], RunUnit], *, may_grow: bool
    ) -> None:
        assert items.size is not None
        self.size, self.starts = items.size, [0]
        self._limit: int | None = None  # how many items the data set has, where that is known
        self._may_grow, self._places_from, self._stored, self._begin = may_grow, items.places_from, stored, begin
        self._open: dict[int, RunUnit] = {}
        self._begun = 0  # those before are open or closed
        self._is_scattered = False  # whether units begin in any order, and `_closed` holds those that were closed
        self._closed: set[int] = set()
        self._last: RunUnit | None = None

    def end_at(self, items: int) -> None:
        """End the last unit where the data set ends, which has so many items."""
        self._limit = items
        for unit in self._open.values():
            unit.size = min(unit.size, items - unit.start)

    def scatter(self) -> None:
        """Go on with any batches of the data set, rather than with those that follow."""
        self._is_scattered = True

    def begin_pass(self, *, is_scattered: bool) -> None:
        """Begin to go through the data set again: through all of it, or through any batches of it."""
        self._open, self._closed, self._begun, self._last = {}, set(), 0, None
        self._is_scattered = is_scattered

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
        if self._is_scattered:
            self._closed.add(unit.number)
        self._last = None

    @property
    def open(self) -> list[RunUnit]:
        """The units that are open, in their order."""
        return [self._open[number] for number in sorted(self._open)]

    @property
    def count(self) -> int:
        """How many units there are so far."""
        return len(self.starts) - 1

    @property
    def is_even(self) -> bool:
        """Whether all units so far begin at a multiple of their size."""
        return self.starts[-1] == self.count * self.size or self.starts[-2] == (self.count - 1) * self.size

    def assume(self, count: int) -> None:
        """Take so many units for full ones, without a look at the store."""
        self.starts = [number * self.size for number in range(count)]

    def first_places(self, count: int) -> list[int]:
        """The places of the first items of so many units."""
        self._find(count)
        return self.starts[:count]

    def span(self, number: int) -> tuple[int, int]:
        """The place of the first item of a unit, and that after its last."""
        self._find(number + 2)
        stop = self.starts[number + 1]
        return self.starts[number], stop if self._limit is None else min(stop, self._limit)

    def number_of(self, place: int) -> int:
        """The number of the unit of an item."""
        while place >= self.starts[-1]:
            self._find_next()
        return bisect_right(self.starts, place) - 1

    def _unit_of(self, place: int) -> RunUnit:
        number = self.number_of(place)
        for begun in [number] if self._is_scattered else range(self._begun, number + 1):
            if begun not in self._open and begun not in self._closed:
                start, stop = self.span(begun)
                unit = self._open[begun] = self._begin(begun, start, stop - start)
                unit.places_from = self._places_from
                self._begun = max(self._begun, begun + 1)
        if number not in self._open:
            raise ArgumentError(self._places_from, "hold each place once", place, GAPS)
        return self._open[number]

    def _find(self, count: int) -> None:
        while len(self.starts) < count:
            self._find_next()

    def _find_next(self) -> None:
        number, start = self.count, self.starts[-1]
        size = self._stored.items(number) if self._stored.has(number) else self.size
        is_short = number > 0 and start - self.starts[-2] < self.size
        if is_short and not self._may_grow and not self._stored.has(number):
            before = self._stored[number - 1]
            before.fail(f"it goes on after the last of its {before.rows} rows, which append=True allows")
        self.starts.append(start + size)
