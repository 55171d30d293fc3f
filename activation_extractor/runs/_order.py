"""The order of a data set, for units whose rows come in another one."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from activation_extractor.errors import ArgumentError, ArgumentTypeError

_GAPS = "Sort rows within windows that follow each other, as length_batches does."


class Order:
    """The places that the rows of the unit under way take in their data set, counted from 0."""

    def __init__(self) -> None:
        self._first, self._places = 0, list[int]()
        self._taken: set[int] = set()

    @property
    def rows(self) -> int:
        """How many rows the unit has."""
        return len(self._places)

    @property
    def is_gapless(self) -> bool:
        """Whether the unit's rows follow each other, and the rows of the unit before."""
        return not self._places or max(self._taken) - self._first + 1 == len(self._taken)

    def take(self, places: Any) -> list[int]:
        """Note the places of a batch's rows; returns them counted from the unit's first row.

        Raises:
            ArgumentTypeError: they are no integers.
            ArgumentError: a place was taken before.
        """
        found = places.tolist() if isinstance(places, Tensor | np.ndarray) else list(places)
        if not all(type(place) is int for place in found):
            raise ArgumentTypeError("order", "hold the place of each row, counted from 0", places)
        for place in found:
            if place < self._first or place in self._taken:
                raise ArgumentError("order", "hold each place once", place, _GAPS)
            self._taken.add(place)
        self._places += found
        return [place - self._first for place in found]

    def permutation(self) -> Tensor:
        """Which of the unit's rows, as they came, comes first, second, ... in order; ``(rows,)`` int64.

        Raises:
            ArgumentError: a place is left out.
        """
        if not self.is_gapless:
            missing = next(place for place in range(self._first, max(self._taken)) if place not in self._taken)
            raise ArgumentError("order", f"hold every place up to {max(self._taken)}", f"none of {missing}", _GAPS)
        return torch.tensor(self._places, dtype=torch.int64).argsort()

    def begin_unit(self) -> None:
        """The unit is complete: what follows belongs to the next one."""
        self._first += len(self._places)
        self._places, self._taken = [], set()
