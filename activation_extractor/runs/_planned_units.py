"""Units that were planned, each for a task of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from activation_extractor._format._shards import unit_name


@dataclass(frozen=True)
class PlannedUnit:
    """A unit of a run, for a task to compute; it can be sent to other processes.

    Attributes:
        number: of the unit, from 0.
        rows: its rows, by their places in the data set.
        batches: the numbers of the batches that hold its rows, each with the places of the batch's rows. The first and
            the last batch may have rows of other units, too.
        units: how many units the run has.
        size: how many rows a unit has, the last one fewer.
        rows_per_unit: that argument of `extract`.
        all_batches: how many batches the data set has.
    """

    number: int
    rows: range
    batches: Mapping[int, Sequence[int]]
    units: int
    size: int
    rows_per_unit: int | None
    all_batches: int

    @property
    def name(self) -> str:
        """The name of its shard, without suffix."""
        return unit_name(self.number)


@dataclass(frozen=True)
class Receipt:
    """What became of a unit.

    Attributes:
        unit: its name.
        rows: how many rows it has, without those that were left out.
        nbytes: its size on disk.
        path: its shard.
        is_new: whether this call computed it; False where it was stored before.
    """

    unit: str
    rows: int
    nbytes: int
    path: Path
    is_new: bool
