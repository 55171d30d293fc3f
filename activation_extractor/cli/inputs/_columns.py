"""What a kept column holds, decided over all of its cells before the first of them is stored."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from activation_extractor._display import plural, shown

_EXACT = 2**53  # integers up to here are floats too


class ColumnKind(NamedTuple):
    """What a column is stored as.

    Attributes:
        dtype: of numbers; None for text.
        reads_numbers: whether numbers are written as text, which `convert` reads.
    """

    dtype: np.dtype[Any] | None
    reads_numbers: bool = False

    def convert(self, cell: Any) -> Any:
        """A cell as a Python number or text."""
        if self.dtype is None:
            return as_text(cell)
        if self.reads_numbers:
            return float(cell) if self.dtype.kind == "f" else int(cell)
        if cell is None:
            return float("nan")
        return float(cell) if self.dtype.kind == "f" else cell


def as_text(cell: Any) -> str:
    """A cell of any kind as text: nothing for a null, JSON for lists and objects, ISO 8601 for dates."""
    if isinstance(cell, str):
        return cell
    if cell is None:
        return ""
    if isinstance(cell, bool | list | tuple | dict):
        return json.dumps(cell, ensure_ascii=False, default=str)
    if isinstance(cell, bytes):
        return cell.decode()
    return cell.isoformat() if hasattr(cell, "isoformat") else str(cell)


def as_numbers(values: list[Any]) -> list[Any]:
    """Written numbers as numbers where each of them, None left out, prints back as it stood; any others as they are."""
    column = _Column("", cells_are_text=True, is_unsigned=False)
    for value in values:
        if value is not None:
            column.add(value, "")
    kind = column.kind()
    return values if kind.dtype is None else [None if value is None else kind.convert(value) for value in values]


class Survey:
    """Goes through the kept cells of all rows, and decides what their columns are.

    Attributes:
        notes: what a user should know of what was decided, a sentence each.
    """

    def __init__(self, names: Sequence[str], *, cells_are_text: bool, unsigned: Iterable[str] = ()) -> None:
        self._columns = [_Column(name, cells_are_text, name in unsigned) for name in names]

    def add(self, cells: Sequence[Any], place: str) -> None:
        """Look at the cells of a row."""
        for column, cell in zip(self._columns, cells, strict=True):
            column.add(cell, place)

    def kinds(self) -> list[ColumnKind]:
        """What each column is."""
        return [column.kind() for column in self._columns]

    @property
    def notes(self) -> tuple[str, ...]:
        return tuple(note for column in self._columns for note in column.notes())


class _Column:
    """A column that is being looked at.

    `shape` is what its cells were until now: "int", "float", "bool", "text", or "" before the first that is no null.
    """

    def __init__(self, name: str, cells_are_text: bool, is_unsigned: bool) -> None:
        self._name, self._shape_of = name, _written_shape if cells_are_text else _typed_shape
        self._reads_numbers, self._shape, self._nulls = cells_are_text, "", 0
        self._smallest, self._largest, self._is_unsigned = 0, 0, is_unsigned
        self._breaks: tuple[str, str, Any] | None = None  # what it was before, where that ended, and with which cell

    def add(self, cell: Any, place: str) -> None:
        if cell is None:
            self._nulls += 1
            return
        if self._shape == "text":
            return
        shape = self._shape_of(cell)
        if shape == "int":
            self._smallest, self._largest = min(self._smallest, int(cell)), max(self._largest, int(cell))
        if shape == self._shape:
            return
        if not self._shape or {shape, self._shape} == {"int", "float"}:
            self._shape = shape if not self._shape else "float"
        else:
            self._breaks, self._shape = (self._shape, place, cell), "text"

    def kind(self) -> ColumnKind:
        """What the column is: integers that no dtype has, or beside nulls, are text."""
        dtype: Any = None
        if self._shape == "float" and max(-self._smallest, self._largest) <= _EXACT:
            dtype = np.float64
        elif self._shape in ("int", "bool") and not self._nulls:
            dtype = np.bool_ if self._shape == "bool" else self._integers()
        return ColumnKind(None if dtype is None else np.dtype(dtype), self._reads_numbers)

    def _integers(self) -> Any:
        if self._smallest >= 0 and self._largest < 2**64 and (self._is_unsigned or self._largest >= 2**63):
            return np.uint64
        return np.int64 if self._smallest >= -(2**63) and self._largest < 2**63 else None

    def notes(self) -> Iterable[str]:
        if self._breaks is not None:
            before, place, cell = self._breaks
            yield f"The column {self._name!r} is kept as text: {place} holds {shown(cell)} after {before} values."
        if self._nulls:
            as_what = "text" if self.kind().dtype is None else "NaN"
            yield f"The column {self._name!r} has no value in {plural(self._nulls, 'row')}: it is kept as {as_what}."


def _written_shape(cell: str) -> str:
    """What a written cell is: a number only if it prints back as it stands."""
    for shape, kind in (("int", int), ("float", float)):
        try:
            if str(kind(cell)) == cell:
                return shape
        except ValueError:
            continue
    return "text"


def _typed_shape(cell: Any) -> str:
    if isinstance(cell, bool | np.bool_):
        return "bool"
    if isinstance(cell, int | np.integer):
        return "int"
    return "float" if isinstance(cell, float | np.floating) else "text"
