"""Which units a run computes, which it compares with the store, and which it passes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from functools import partial

from activation_extractor._format._shards import unit_name
from activation_extractor.runs._proof import Proof
from activation_extractor.runs._run_units import RunUnit
from activation_extractor.runs._stored_unit import BATCHES, INPUTS, StoredUnits
from activation_extractor.sinks._store_writer import StoreWriter

_MOST_UNSEEN = 3  # units that were computed and are not on the disk, where others would compute them too


class UnitChoice:
    """Begins units: a unit that is stored is compared, or passed but for its ids; one that is missing is computed.

    Attributes:
        computes: whether a unit that is missing is computed, by its number; else it is left to others.
        compares: whether a unit that is stored is compared in full, by its number; else by its ids alone.
        stored_rows: how many rows the units have that were found in the store.
        committed: the units that were computed.
        overtaken: how many of these others had stored by then, where other ranks look for them.
        is_shared: whether other ranks look for what is computed here.
        is_first: whether all batches come, for the first time: the rows and ids of units that are stored are noted.
    """

    def __init__(self, stored: StoredUnits, writer: StoreWriter, proof: Proof) -> None:
        self._stored, self._writer, self._proof = stored, writer, proof
        self._passed = writer.new_unit()  # in place of the rows of units that are not computed
        self._unseen: list[int] = []  # units that may not be on the disk yet
        self.computes: Callable[[int], bool] = lambda _: True
        self.compares: Callable[[int], bool] = lambda _: True
        self.committed: set[int] = set()
        self.stored_rows = self.overtaken = 0
        self.is_shared, self.is_first = False, True

    def begin(self, number: int, start: int, size: int) -> RunUnit:
        """The unit with a number, which begins at a place and has so many items.

        As long as the proof is open, each unit that is stored is compared.
        """
        begin = partial(RunUnit, number, start, size)
        if number in self.committed:
            return begin(None, self._passed, is_passed=True)
        if not self._stored.has(number):
            if self.computes(number):
                return begin(None, self._writer.new_unit())
            return begin(None, self._passed, is_passed=True)
        self.stored_rows += self._stored.rows(number) if self.is_first else 0
        if self._proof.is_open or self.compares(number):
            return begin(self._stored[number], self._passed)
        return begin(None, self._passed, is_passed=True, data=self._stored.data.get(number))

    def commit(self, unit: RunUnit, *, is_of_batches: bool) -> None:
        """Hand a unit over to be written, once all of its items have come; waits while ranks see too few of them.

        Raises:
            ArgumentError: a place before the last one is missing.
            StoreError: an earlier unit could not be written.
        """
        unit.check_gapless()
        metadata, order = unit.metadata, unit.permutation
        if is_of_batches:
            metadata, order = {BATCHES: str(len(unit.places)), INPUTS: unit.inputs}, None
        name, is_same = unit_name(unit.number), partial(unit.is_same, self._stored)
        self.overtaken += self.is_shared and self._stored.has(unit.number)  # before it is written here
        self._writer.commit(unit.gathered, name, metadata, order, is_same, unit.told.to_text())
        self.committed.add(unit.number)
        self._unseen.append(unit.number)
        while self.is_shared and len(self._unseen) > _MOST_UNSEEN and not self._writer.hold_back:
            self._writer.check()
            self._unseen = [unit for unit in self._unseen if not self._stored.has(unit)]
            if len(self._unseen) > _MOST_UNSEEN:
                time.sleep(0.001)

    def missing(self, units: Iterable[int]) -> list[int]:
        """Which of these units neither this run has computed nor anybody else stored."""
        there = self._stored.numbers() | self.committed
        return [number for number in units if number not in there]

    def is_missing(self, unit: int) -> bool:
        """Whether nobody has computed a unit yet."""
        return unit not in self.committed and not self._stored.has(unit)
