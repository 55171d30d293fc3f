"""Units that a store should have and has not."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, groupby, islice
from pathlib import Path

import numpy as np

from activation_extractor._format._shards import is_unit
from activation_extractor.errors import StoreError

_DIGITS = 8  # of the number that a unit's name ends in
_NAMED = 3  # units in an error


@dataclass(frozen=True)
class Gap:
    """Units that are missing one after another: those of the numbers from `start` up to `stop`.

    `prefix` is what their names begin with, in a store of with-blocks the writer.
    """

    prefix: str
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start

    def __iter__(self) -> Iterator[str]:
        return (f"{self.prefix}{number:0{_DIGITS}d}" for number in range(self.start, self.stop))


def find_gaps(units: Sequence[str], listed: Iterable[str] = (), count: int = 0) -> list[Gap]:
    """The gaps in the units of a store: what is missing before the last one.

    Args:
        units: those that are there, sorted.
        listed: others that should be there, too.
        count: how many units a data set has, where that is known.
    """
    listed = list(listed)
    may_be_whole = units and not listed and count <= len(units) and units[0][:-_DIGITS] == units[-1][:-_DIGITS]
    if may_be_whole and int(units[-1][-_DIGITS:]) == len(units) - 1:  # as many numbers as units
        return []
    stops = {"": count} if count else {}
    numbers: dict[str, list[int]] = {}
    for prefix, names in groupby(units, key=lambda unit: unit[:-_DIGITS]):
        numbers[prefix] = [int(name[-_DIGITS:]) for name in names]
        stops[prefix] = max(stops.get(prefix, 0), numbers[prefix][-1] + 1)
    for unit in listed:
        prefix = unit[:-_DIGITS]
        stops[prefix] = max(stops.get(prefix, 0), int(unit[-_DIGITS:]) + 1)
    gaps = []
    for prefix, stop in sorted(stops.items()):
        edges = np.array([-1, *numbers.get(prefix, ()), stop])
        before = np.flatnonzero(np.diff(edges) > 1)
        gaps += [Gap(prefix, int(edges[at]) + 1, int(edges[at + 1])) for at in before]
    return gaps


def with_gaps(list_units: Callable[[], list[str]], listed: Iterable[str], count: int) -> tuple[list[str], list[Gap]]:
    """The units that have a shard, in order, and the gaps among them; see `find_gaps`.

    What journals list, and the count, must have been read before: a writer may be at work.
    """
    found: set[str] = set()
    while True:
        units = sorted(found.union(list_units())) if found else sorted(list_units())
        gaps = find_gaps(units, filter(is_unit, {*listed}.difference(units)), count)
        if not gaps or len(units) == len(found):
            return units, gaps
        found = {*units}  # a file that appears while a folder is listed may be left out, and a later one be there


def check_gaps(folder: Path, gaps: Sequence[Gap], found: int, *, is_of_data: bool) -> None:
    """Raise a StoreError that names the missing units, where there are some; `found` is how many units are there."""
    missing = sum(map(len, gaps))
    if not missing:
        return
    named = ", ".join(map(repr, islice(chain.from_iterable(gaps), _NAMED)))
    more = f" and {missing - _NAMED:,} more" if missing > _NAMED else ""
    them = "it" if missing == 1 else "them"
    again = f"Run extract again with the same arguments, which makes {them} anew," if is_of_data else ""
    advice = f"{again or f'Restore {them} from a copy,'} or read what is there with open_store(path, partial=True)."
    got = f"{missing:,} of {found + missing:,} missing: {named}{more}"
    raise StoreError(folder, "have all of its units", got, advice)
