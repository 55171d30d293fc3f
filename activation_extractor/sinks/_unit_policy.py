"""Where a unit of a store ends."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import final

from activation_extractor.sinks._units import Unit

UNIT_BYTES = 64 * 2**20
UNIT_ROWS = 4096  # rows are hours of work where a model is large, and an unfinished unit is lost with its process


class UnitPolicy(ABC):
    """Decides when a unit is full. A sink chooses it, and `StoreWriter` asks it."""

    @property
    def stored_size(self) -> dict[str, int | None]:
        """The size of all units as a manifest stores it, None where they differ."""
        return {"batches_per_unit": None}

    @abstractmethod
    def is_full(self, unit: Unit) -> bool:
        """Whether the unit that is gathered takes no more steps."""


@final
class SizePolicy(UnitPolicy):
    """A unit is full from `rows_per_unit` on; where that is None, from `unit_bytes` of its columns or 4,096 rows on."""

    def __init__(self, unit_bytes: int, rows_per_unit: int | None) -> None:
        self._unit_bytes, self._rows_per_unit = unit_bytes, rows_per_unit

    def is_full(self, unit: Unit) -> bool:
        if self._rows_per_unit is not None:
            return unit.rows >= self._rows_per_unit
        return unit.nbytes >= self._unit_bytes or unit.rows >= UNIT_ROWS
