"""Measuring: systems interleaved in one run, and the median of their ratios with its interval."""

from __future__ import annotations

import importlib.util
import math
import statistics
import time
import timeit
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from time import monotonic

from torch.utils.benchmark import Timer
from torch.utils.benchmark.utils.timer import timer as wall_clock  # waits for an accelerator

from benchmarks.sizes import Size

Run = Callable[[], object]
System = Callable[[], AbstractContextManager[Run]]  # entering prepares, what it yields is timed, leaving cleans up
CONFIDENCE = 0.95
LEAST_ROUNDS = 6  # the fewest that have an interval


class UnavailableError(Exception):
    """What a case needs is not on this machine. The case is left out, which is no failure."""


def require(package: str) -> None:
    """Refuse to make cases that need a package which is not installed; nothing is imported.

    Raises:
        UnavailableError: it is not.
    """
    if importlib.util.find_spec(package) is None:
        raise UnavailableError(f"needs {package}, which is not installed")


@dataclass(frozen=True)
class Case:
    """One question: how much more one system costs than another.

    Attributes:
        name: dotted, its group first.
        about: the question in a few words.
        ours: what is measured.
        reference: what it is compared with, the cheapest thing that does the job by hand.
        calls: how many captured calls (or layers) one run holds; times are given for one of them.
        loops: how many runs one timing holds.
        floor: what both do anyway and what is subtracted from both; None when there is nothing to subtract.
        reference_floor: what is subtracted from the reference, where it does something else anyway.
        second_reference: something else that the job cannot be faster than; the longer of the two references counts.
        target: the ratio that is demanded; None where none is.
        allowed_us: microseconds of a run that ours may take beside, before the ratio is held against the target.
        most_rounds: of a case that takes long; None for as many as are asked for.
    """

    name: str
    about: str
    ours: System
    reference: System
    calls: int
    loops: int
    floor: System | None = None
    reference_floor: System | None = None
    second_reference: System | None = None
    target: float | None = None
    allowed_us: float = 0.0
    most_rounds: int | None = None


# What the names of cases begin with, before the first dot, and what makes the cases when it is their turn.
Group = tuple[str, Callable[[Size], Iterable[Case]]]


@dataclass(frozen=True)
class Seconds:
    """The time of one run, by the clock on the wall and in this process's threads."""

    wall: float
    cpu: float


@dataclass(frozen=True)
class Spread:
    """A median and the interval that holds the true one with 95 % confidence."""

    median: float
    low: float
    high: float


@dataclass
class Rounds:
    """What one case took, round by round; each list has one entry a round."""

    floor: list[Seconds] = field(default_factory=list)
    reference_floor: list[Seconds] = field(default_factory=list)
    reference: list[Seconds] = field(default_factory=list)
    ours: list[Seconds] = field(default_factory=list)
    second_reference: list[Seconds] = field(default_factory=list)

    def ratios(self, clock: str, allowed_us: float = 0.0) -> list[float]:
        """(ours - floor - what ours is allowed) / (the longer reference - its floor), each from one round's timings."""
        allowed = allowed_us / 1e6
        return [_divide(ours - allowed, reference) for ours, reference in zip(*self._added(clock), strict=True)]

    def added(self, system: str, clock: str) -> list[float]:
        """Seconds that ``"ours"`` or ``"reference"`` adds to the floor in one run."""
        ours, reference = self._added(clock)
        return ours if system == "ours" else reference

    def _added(self, clock: str) -> tuple[list[float], list[float]]:
        ours = _above(self.ours, self.floor, clock)
        longer = [
            max(pair, key=_wall) for pair in zip(self.reference, self.second_reference or self.reference, strict=True)
        ]
        return ours, _above(longer, self.reference_floor or self.floor, clock)


def _above(timings: Sequence[Seconds], floor: Sequence[Seconds], clock: str) -> list[float]:
    least = [getattr(one, clock) for one in floor] or [0.0] * len(timings)
    return [getattr(one, clock) - nothing for one, nothing in zip(timings, least, strict=True)]


def _wall(timing: Seconds) -> float:
    return timing.wall


def measure(case: Case, rounds: int, seconds: float = math.inf) -> Rounds:
    """Time the systems of a case in turn, `rounds` times; the order is reversed from round to round.

    When `seconds` are over no further round is begun, but `LEAST_ROUNDS` are run however long they take.
    """
    names = ("floor", "reference_floor", "reference", "second_reference", "ours")
    order = [(name, getattr(case, name)) for name in names if getattr(case, name) is not None]
    result, rounds, began = Rounds(), min(rounds, case.most_rounds or rounds), monotonic()
    for _, system in order:  # once for nothing: allocators, caches, lazy imports
        time_system(system, case.loops)
    for number in range(rounds):
        if number >= LEAST_ROUNDS and monotonic() - began >= seconds:
            break
        for name, system in order if number % 2 == 0 else reversed(order):
            getattr(result, name).append(time_system(system, case.loops))
    return result


def time_system(system: System, loops: int) -> Seconds:
    """The mean time of a run, over `loops` runs."""
    with system() as run:
        clocks = _Clocks()
        if loops == 1:  # a long run needs no run before it, which `Timer` would make two of
            return Seconds(timeit.Timer(run, timer=clocks).timeit(1), clocks.cpu)
        measured = Timer("run()", globals={"run": run}, timer=clocks).timeit(loops)
    return Seconds(measured.median, clocks.cpu / loops)


def median_interval(values: Sequence[float]) -> Spread:
    """The median with its distribution-free interval, between two order statistics.

    The k-th smallest and the k-th greatest value enclose the true median with a probability of
    ``1 - 2 * P(Binomial(n, 1/2) < k)``. The interval is the narrowest that has 95 %; six values are the fewest that
    have one, and fewer give their whole range.
    """
    if not values:
        raise ValueError("A median must be of at least one value, got none.")
    ordered, count = sorted(values), len(values)
    outside, rank = 0.0, 0
    while True:
        outside += 2 * math.comb(count, rank) / 2**count
        if outside > 1 - CONFIDENCE:
            break
        rank += 1
    rank = max(rank, 1)
    return Spread(statistics.median(ordered), ordered[rank - 1], ordered[-rank])


class _Clocks:
    """A clock for `Timer` that notes the CPU time of the interval that it measured last."""

    def __init__(self) -> None:
        self._stamps = [0.0, 0.0]

    def __call__(self) -> float:
        now = wall_clock()
        self._stamps = [self._stamps[1], time.process_time()]
        return float(now)

    @property
    def cpu(self) -> float:
        return self._stamps[1] - self._stamps[0]


def _divide(numerator: float, denominator: float) -> float:
    return numerator / denominator if denominator > 0 else math.inf  # noise swallowed what the reference adds
