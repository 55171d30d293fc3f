"""Which of several processes computes which units of a data set, without a word between them.

Unit n belongs to rank n mod world. A rank that has none left takes what others have not stored, so that a rank that is
gone need not be started again. All that ranks know of each other is which shards are there.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from activation_extractor.errors import ArgumentError, ArgumentTypeError

Sharing = Literal["auto"] | tuple[int, int] | None

_VARIABLES = (  # of torchrun and those that follow it, of Slurm, Open MPI, and MPICH and its like
    ("RANK", "WORLD_SIZE"),
    ("SLURM_PROCID", "SLURM_NTASKS"),
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
    ("PMI_RANK", "PMI_SIZE"),
)
_LEAST_PATIENCE, _UNTIMED_PATIENCE = 0.5, 3.0  # seconds
_PARTS = 4  # of what others left: a rank takes this part of its share before it looks again
_MOST_AT_ONCE = 16
_MOST_AT_WORK = 4  # units that a rank computes, or has computed and not yet written


@dataclass(frozen=True)
class Share:
    """The part of a run that a process does.

    Attributes:
        rank: of the process.
        world: how many ranks there are.
        groups: the group of each unit, where units are dealt in groups; else each unit is dealt.
    """

    rank: int
    world: int
    groups: Mapping[int, int] = field(default_factory=dict)

    def owner(self, unit: int) -> int:
        """The rank whose unit it is."""
        return self.groups.get(unit, unit) % self.world

    def owns(self, unit: int) -> bool:
        """Whether a unit is one of this rank's."""
        return self.owner(unit) == self.rank

    def in_groups(self, groups: Sequence[Sequence[int]]) -> Share:
        """The same part, where units are dealt in groups."""
        return Share(self.rank, self.world, {unit: number for number, group in enumerate(groups) for unit in group})


def share_of(share: Any) -> Share | None:
    """The part that ``share=`` means; None where there are no other ranks.

    Raises:
        ArgumentTypeError: it is neither ``"auto"``, None nor a pair of integers.
        ArgumentError: there is no such rank.
    """
    if share is None:
        return None
    if share == "auto":
        return _share_of_variables()
    is_pair = isinstance(share, tuple | list) and len(share) == 2 and all(type(number) is int for number in share)
    if not is_pair:
        raise ArgumentTypeError("share", "be 'auto', None or (rank, number of ranks)", share)
    if not 0 <= share[0] < share[1]:
        raise ArgumentError("share", "be (rank, number of ranks), ranks counted from 0", tuple(share))
    return Share(*share) if share[1] > 1 else None


def _share_of_variables() -> Share | None:
    for names in _VARIABLES:
        rank, world = (os.environ.get(name, "") for name in names)
        if rank.isdecimal() and world.isdecimal():
            return Share(int(rank), int(world)) if int(rank) < int(world) and int(world) > 1 else None
    return None


class Remaining:
    """What a rank takes once it has none of its own units left: what is still missing, until nothing is.

    The units of a rank are left to it as long as some of them appear. They are taken once none has for as long as two
    units take, from the last one on, and each rank begins at another of them. Of a rank that is slow, the last unit is
    taken where it has two others to compute first; that ends once the slow rank was faster.

    Args:
        share: of this rank.
        look: returns which units are missing now, in their order.
        unit_seconds: returns how long a unit takes until it is stored; None where that is not known.
        overtaken: returns how many units had been stored by others when this rank had computed them.
    """

    def __init__(
        self,
        share: Share,
        look: Callable[[], list[int]],
        unit_seconds: Callable[[], float | None],
        overtaken: Callable[[], int],
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._share, self._look, self._unit_seconds, self._overtaken = share, look, unit_seconds, overtaken
        self._clock, self._sleep = clock, sleep
        self._begun = self._changed = clock()
        self._missing: dict[int, list[int]] = {}  # by rank
        self._moved: dict[int, float] = {}  # when that changed last
        self._quiet: set[int] = set()  # ranks that showed nothing for long: they are gone, or slow
        self._is_fast = True

    def __iter__(self) -> Iterator[list[int]]:
        """Units to compute next, until nothing is missing; each is looked for again before it is computed."""
        while missing := self._look():
            if chosen := self._choose(missing):
                before = self._overtaken()
                yield chosen
                self._is_fast = self._overtaken() == before
            else:
                self._sleep(min(max(0.01, self.patience / 20), 1.0))

    def wait(self) -> list[int]:
        """Wait for others as long as new units appear; returns what is missing then."""
        while missing := self._look():
            self._take_note(missing)
            if self._clock() - max(self._moved.values()) > 4 * self.patience:
                return missing
            self._sleep(min(max(0.01, self.patience / 20), 1.0))
        return []

    @property
    def patience(self) -> float:
        """For how many seconds a rank may show nothing before its units are taken."""
        seconds = self._unit_seconds()
        return _UNTIMED_PATIENCE if seconds is None else _LEAST_PATIENCE + 2 * seconds

    def _take_note(self, missing: list[int]) -> None:
        by_rank: dict[int, list[int]] = {}
        for unit in missing:
            by_rank.setdefault(self._share.owner(unit), []).append(unit)
        for rank, units in by_rank.items():
            if units != self._missing.get(rank):
                self._moved[rank] = self._clock() if rank in self._missing else self._begun
        self._changed = self._clock() if by_rank != self._missing else self._changed
        self._missing = by_rank

    def _choose(self, missing: list[int]) -> list[int]:
        """Units to take now; none where others are at work on all that are missing."""
        self._take_note(missing)
        now, rank, world = self._clock(), self._share.rank, self._share.world
        for other in self._missing.keys() - self._quiet:
            if now - self._moved[other] > self.patience:
                self._quiet.add(other)
        free = [unit for other, units in self._missing.items() if other in self._quiet for unit in units]
        if not free and self._is_fast and now - self._begun > self.patience:
            free = [units[-1] for units in self._missing.values() if len(units) > _MOST_AT_WORK]
        if not free:
            return []
        free.sort(reverse=True)
        begin = rank * len(free) // world
        turn = rank - -(-begin * world // len(free))  # how many ranks before this one begin at the same unit
        if now - self._changed < turn * self.patience:
            return []
        count = min(max(1, len(free) // (world * _PARTS)), _MOST_AT_ONCE)
        return [free[(begin + number) % len(free)] for number in range(count)]


def sharded_by(batches: Any) -> str | None:
    """What gives each rank a part of the data set already, as a DistributedSampler does; None where nothing does."""
    for part in _parts(batches):
        for name in ("num_replicas", "num_processes"):
            if isinstance(count := getattr(part, name, None), int) and count > 1:
                return type(part).__name__
    return None


def _parts(batches: Any, depth: int = 0) -> Iterator[Any]:
    yield batches
    names: Sequence[str] = ("batch_sampler", "sampler", "dataset") if depth < 4 else ()
    for name in names:
        part = getattr(batches, name, None)
        if part is not None:
            yield from _parts(part, depth + 1)
