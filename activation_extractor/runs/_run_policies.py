"""Where the units of a data set end: after a number of batches, or where rows leave no gap in their order."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, final

import numpy as np
import torch
from torch import Tensor

from activation_extractor._format._manifest import LEAST_ROWS
from activation_extractor.errors import ArgumentError, ArgumentTypeError, StepError
from activation_extractor.sinks._unit_policy import UNIT_BYTES, UNIT_ROWS, UnitPolicy
from activation_extractor.sinks._units import Unit

_GAPS = "Sort rows within windows that follow each other, as length_batches does."


class RunPolicy(UnitPolicy):
    """Decides when a unit of a data set is full; counts batches itself, since the writer sees no stored ones.

    A unit has `rows_per_unit` rows; where that is None, about 64 MiB of them, and at most 4,096.
    """

    def __init__(self, rows_per_unit: int | None) -> None:
        self.size: int | None = None  # of all units, which the store keeps; chosen by the first batch
        self.batches = 0  # of the current unit
        self._rows_per_unit = rows_per_unit

    @abstractmethod
    def choose_size(self, rows: int, nbytes: int) -> None:
        """Choose the size of all units by the first batch of the run, which has so many rows and bytes."""

    def begin_batch(self, places: Any) -> list[int] | None:  # noqa: ARG002 - for units in order
        """Count a batch; returns its rows in the unit, or None when they follow those of the batch before."""
        self.batches += 1
        return None

    def begin_unit(self) -> None:
        """Begin to count anew."""
        self.batches = 0

    def permutation(self, rows: int) -> Tensor | None:  # noqa: ARG002 - for units in order
        """Which of the unit's rows is stored first, second, ...: ``(rows,)`` int64, or None for as they came."""
        return None


@final
class BatchPolicy(RunPolicy):
    """A unit has a fixed number of batches."""

    @property
    def stored_size(self) -> dict[str, int | None]:
        return {"batches_per_unit": self.size}

    def is_full(self, unit: Unit) -> bool:  # noqa: ARG002
        return self.batches == self.size

    def choose_size(self, rows: int, nbytes: int) -> None:
        if self._rows_per_unit is not None:
            size = -(-self._rows_per_unit // rows)
        else:
            size = max(1, min(UNIT_BYTES // nbytes, UNIT_ROWS // rows))
        self.size = max(size, self.batches)  # batches before it may have had nothing to store


@final
class OrderPolicy(RunPolicy):
    """A unit has at least a number of rows, and ends with the first batch that leaves no gap in the data set's order.

    Batches come with the places of their rows in the data set, counted from 0.
    """

    def __init__(self, rows_per_unit: int | None) -> None:
        super().__init__(rows_per_unit)
        self._first_place, self._places = 0, list[int]()
        self._taken: set[int] = set()

    @property
    def stored_size(self) -> dict[str, int | None]:
        return super().stored_size | ({LEAST_ROWS: self.size} if self.size else {})

    def is_full(self, unit: Unit) -> bool:  # noqa: ARG002
        return self.size is not None and len(self._places) >= self.size and self._is_gapless

    def choose_size(self, rows: int, nbytes: int) -> None:
        self.size = self._rows_per_unit or max(1, min(UNIT_BYTES * rows // nbytes, UNIT_ROWS))

    def begin_batch(self, places: Any) -> list[int]:
        """Count a batch and the places of its rows; returns these counted from the unit's first place.

        Raises:
            ArgumentTypeError: a place is not an integer.
            ArgumentError: a place was taken before.
        """
        super().begin_batch(places)
        listed = places.tolist() if isinstance(places, Tensor | np.ndarray) else list(places)
        if not all(type(place) is int for place in listed):
            raise ArgumentTypeError("order", "hold the place of each row, counted from 0", places)
        for place in listed:
            if place < self._first_place or place in self._taken:
                raise ArgumentError("order", "hold each place once", place, _GAPS)
            self._taken.add(place)
        self._places += listed
        return [place - self._first_place for place in listed]

    def begin_unit(self) -> None:
        super().begin_unit()
        self._first_place += len(self._places)
        self._places, self._taken = [], set()

    def permutation(self, rows: int) -> Tensor:
        """Which of the unit's rows comes first, second, ... in the data set: ``(rows,)`` int64.

        Raises:
            ArgumentError: a place before the last one is missing.
            StepError: there are not as many rows as places.
        """
        if not self._is_gapless:
            last = max(self._taken)
            missing = next(place for place in range(self._first_place, last) if place not in self._taken)
            raise ArgumentError(
                "order", f"hold place {missing} where it holds place {last}", sorted(self._taken), _GAPS
            )
        if rows != len(self._places):
            got = f"{rows} rows for {len(self._places)} places"
            raise StepError("have a row for each place in order", got, "Check order=, and give each row an id.")
        return torch.tensor(self._places, dtype=torch.int64).argsort()

    @property
    def _is_gapless(self) -> bool:
        return not self._places or max(self._taken) - self._first_place + 1 == len(self._taken)
