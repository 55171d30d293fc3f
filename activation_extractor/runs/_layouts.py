"""Where the items of each batch are in a data set, before any batch is loaded."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, final

import numpy as np

_MOST_IN_GROUP = 16  # units


class BatchLayout(ABC):
    """Where the items of each batch are in a data set."""

    batches: int  # how many there are

    @property
    @abstractmethod
    def items(self) -> int:
        """How many items there are; a batch may be loaded to find out."""

    @property
    @abstractmethod
    def most_items(self) -> int:
        """How many items there are at most; no batch is loaded."""

    def may_end_at(self, items: int) -> bool:
        """Whether there may be so many items; no batch is loaded."""
        return items == self.most_items

    def reaches_end(self, stop: int) -> bool:
        """Whether the items before a place may be all that there are; no batch is loaded."""
        return stop > self.places(self.batches - 1)[0]

    @abstractmethod
    def places(self, batch: int) -> Sequence[int]:
        """The places of a batch's items."""

    @abstractmethod
    def batches_of(self, start: int, stop: int) -> Sequence[int]:
        """The numbers of the batches that hold an item from `start` up to `stop`, in their order."""

    def groups(self, spans: Mapping[int, tuple[int, int]]) -> list[list[int]]:
        """Units, by their numbers and spans, in groups that share no batch, or few; groups and units rise."""
        return [[unit] for unit in sorted(spans)]

    @abstractmethod
    def positions_of(self, places: Any) -> Any:
        """The batches of items, and which of their batch's items these are, ``(items, 2)``; None if in any order."""


@final
class Consecutive(BatchLayout):
    """Batches whose items follow each other.

    Args:
        starts: the place of the first item of each batch, and that after the last, ``(batches + 1,)``.
        last_items: loads the last batch, and returns how many items it has; until then, it has at most those of
            `starts`. None where these are exact.
    """

    def __init__(self, starts: Any, last_items: Callable[[], int] | None = None) -> None:
        self.batches, self._starts, self._last_items = len(starts) - 1, starts, last_items

    @property
    def items(self) -> int:
        if self._last_items and self.batches:
            self._starts[-1] = self._starts[-2] + self._last_items()
            self._last_items = None
        return int(self._starts[-1])

    @property
    def most_items(self) -> int:
        return int(self._starts[-1])

    def may_end_at(self, items: int) -> bool:
        least = self._starts[-2] if self._last_items and self.batches else self._starts[-1] - 1
        return bool(least < items <= self._starts[-1])

    def places(self, batch: int) -> Sequence[int]:
        return range(int(self._starts[batch]), int(self._starts[batch + 1]))

    def batches_of(self, start: int, stop: int) -> Sequence[int]:
        first, after = np.searchsorted(self._starts, start, "right") - 1, np.searchsorted(self._starts, stop, "left")
        return range(int(first), min(int(after), self.batches))

    def positions_of(self, places: Any) -> Any:
        batches = np.minimum(np.searchsorted(self._starts, places, "right") - 1, self.batches)
        return np.stack([batches, places - self._starts[batches]], 1)


@final
class Scattered(BatchLayout):
    """Batches whose items are in any order, each in one batch.

    Args:
        places: of the items of each batch.

    Raises:
        ValueError: an item is in no batch, or in two.
    """

    def __init__(self, places: Sequence[Sequence[int]]) -> None:
        self.batches, self._places = len(places), places
        flat = np.fromiter((place for batch in places for place in batch), np.int64)
        if not np.array_equal(np.sort(flat), np.arange(len(flat))):
            raise ValueError("places that are no permutation")
        self._batch_of = np.empty(len(flat), np.int64)
        self._last = np.array([max(batch, default=-1) for batch in places], dtype=np.int64)  # place of each batch
        self._batch_of[flat] = np.repeat(np.arange(len(places)), [len(batch) for batch in places])

    def reaches_end(self, stop: int) -> bool:
        return stop >= len(self._batch_of)

    @property
    def items(self) -> int:
        return len(self._batch_of)

    @property
    def most_items(self) -> int:
        return len(self._batch_of)

    def places(self, batch: int) -> Sequence[int]:
        return self._places[batch]

    def batches_of(self, start: int, stop: int) -> Sequence[int]:
        return [int(batch) for batch in np.unique(self._batch_of[start:stop])]

    def groups(self, spans: Mapping[int, tuple[int, int]]) -> list[list[int]]:
        groups: list[list[int]] = []
        last = -1  # place in the batches of the group so far
        for unit in sorted(spans):
            start, stop = spans[unit]
            if last < start or len(groups[-1]) == _MOST_IN_GROUP:
                groups.append([])
                last = -1
            groups[-1].append(unit)
            last = max(last, int(self._last[self._batch_of[start:stop]].max(initial=-1)))
        return groups

    def positions_of(self, places: Any) -> Any:  # noqa: ARG002
        return None
