"""Running cases one behind the other: one that fails costs itself alone, and a bound on time holds for all."""

from __future__ import annotations

import math
import re
import sys
import traceback
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import partial
from time import monotonic
from typing import Any

from benchmarks.counts import Count
from benchmarks.measure import Case, Group, UnavailableError, measure
from benchmarks.results import describe_case, describe_count, describe_failure
from benchmarks.sizes import Size

NO_TIME = "no time was left"


@dataclass
class Found:
    """What a run has found so far, as a document holds it."""

    results: list[dict[str, Any]] = field(default_factory=list)
    counts: list[dict[str, Any]] = field(default_factory=list)
    failed: list[dict[str, str]] = field(default_factory=list)
    left_out: list[dict[str, str]] = field(default_factory=list)

    def leave_out(self, name: str, why: str) -> None:
        """List a case, or a group, that is not measured."""
        entry = {"name": name, "why": why}
        if entry not in self.left_out:  # several groups may go by one name
            self.left_out.append(entry)


class Budget:
    """The time that a run may take. What is left is shared equally among those whose turn is still to come."""

    def __init__(self, seconds: float = math.inf) -> None:
        self._end = monotonic() + seconds

    @property
    def left(self) -> float:
        """Seconds that are left."""
        return max(0.0, self._end - monotonic())

    def share(self, waiting: int) -> Budget:
        """The part of one of several that wait."""
        return Budget(self.left / waiting)


class Suite:
    """Measures what is wanted, and calls `save` whenever more is known.

    Groups and counts share the time that is left equally, and so do the cases of a group. A case whose share is over
    begins no further round, and what was not begun when all of the time is over is left out.

    Args:
        size: how much work, and where.
        rounds: of each case, at most.
        patterns: the names that are wanted, None for all.
        save: is given everything that is known.
        seconds: for all of it.
    """

    def __init__(
        self,
        size: Size,
        rounds: int,
        patterns: Sequence[str] | None,
        save: Callable[[Found], None],
        seconds: float = math.inf,
    ) -> None:
        self.found = Found()
        self._size, self._rounds, self._patterns, self._save = size, rounds, patterns, save
        self._budget = Budget(seconds)

    def run(self, groups: Sequence[Group], counts: Sequence[Count]) -> Found:
        """Measure the cases of all groups, and count what is to be counted."""
        wanted_groups = [group for group in groups if may_match(group[0], self._patterns)]
        wanted_counts = [count for count in counts if self._wants(count.name)]
        waiting = len(wanted_groups) + len(wanted_counts)
        self._save(self.found)
        for number, group in enumerate(wanted_groups):
            self._run_group(*group, self._budget.share(waiting - number))
        for count in wanted_counts:
            self._attempt(count.name, partial(self._count, count), count.about)
        return self.found

    def _run_group(self, name: str, make: Callable[[Size], Iterable[Case]], budget: Budget) -> None:
        cases: list[Case] = []

        def collect() -> None:  # one by one: what a group yields before it raises is measured
            for case in make(self._size):
                if self._wants(case.name):
                    cases.append(case)

        self._attempt(f"{name}.*", collect)
        for number, case in enumerate(cases):
            share = budget.share(len(cases) - number)
            self._attempt(case.name, partial(self._measure, case, share), case.about)

    def _measure(self, case: Case, share: Budget) -> None:
        self.found.results.append(describe_case(case, measure(case, self._rounds, share.left)))

    def _count(self, count: Count) -> None:
        self.found.counts.append(describe_count(count, count.count(self._size)))

    def _attempt(self, name: str, act: Callable[[], None], about: str = "") -> None:
        """Do what may raise, if there is time for it."""
        if self._budget.left:
            if about:
                print(f"{name}: {about}", file=sys.stderr)
            try:
                act()
            except UnavailableError as error:
                self.found.leave_out(name, str(error))
            except Exception as error:
                traceback.print_exc()
                self.found.failed.append(describe_failure(name, error))
        else:
            self.found.leave_out(name, NO_TIME)
        self._save(self.found)

    def _wants(self, name: str) -> bool:
        return self._patterns is None or any(fnmatchcase(name, pattern) for pattern in self._patterns)


def may_match(group: str, patterns: Sequence[str] | None) -> bool:
    """Whether a pattern may be meant for cases of a group, as far as it says before its first wildcard."""
    starts = [re.split(r"[*?[]", pattern, maxsplit=1)[0] for pattern in patterns or [""]]
    return any(start.startswith(f"{group}.") or f"{group}.".startswith(start) for start in starts)
