"""Where a unit of a store ends."""

from __future__ import annotations

from dataclasses import dataclass

from activation_extractor.sinks._units import Unit

UNIT_BYTES = 64 * 2**20
UNIT_ROWS = 4096  # rows are hours of work where a model is large, and an unfinished unit is lost with its process


@dataclass(frozen=True)
class UnitPolicy:
    """A unit is full from `rows_per_unit` on; where that is None, from `unit_bytes` of its columns or 4,096 rows on."""

    unit_bytes: int
    rows_per_unit: int | None

    def is_full(self, unit: Unit) -> bool:
        """Whether a unit takes no more steps."""
        if self.rows_per_unit is not None:
            return unit.rows >= self.rows_per_unit
        return unit.nbytes >= self.unit_bytes or unit.rows >= UNIT_ROWS
