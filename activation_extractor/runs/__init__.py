"""A whole data set through a model, into a store, and on from where it ended."""

from __future__ import annotations

from activation_extractor.runs._columns import Columns
from activation_extractor.runs._extract import extract
from activation_extractor.runs._length_batches import length_batches
from activation_extractor.runs._planned_units import PlannedUnit, Receipt
from activation_extractor.runs._unit_form import plan_units, write_unit
from activation_extractor.runs._windows import Window, windows

__all__ = [
    "Columns", "PlannedUnit", "Receipt", "Window", "extract", "length_batches", "plan_units", "windows", "write_unit",
]  # fmt: skip
