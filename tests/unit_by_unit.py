"""A store's writer that has one unit at a time."""

from __future__ import annotations

from activation_extractor.sinks._store_writer import StoreWriter


class UnitByUnit(StoreWriter):
    """Adds steps to its current `unit`, and begins another one when that is committed."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.unit = self.new_unit()

    def add(self, step) -> int:
        return super().add(step, self.unit)

    def commit(self, name, metadata=None, order=None) -> None:
        unit, self.unit = self.unit, self.new_unit()
        super().commit(unit, name, metadata, order)
