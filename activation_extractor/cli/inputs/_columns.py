"""What a kept column holds, decided over all of its cells before the first of them is stored."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from activation_extractor._display import plural, shown

_EXACT = 2**53  # integers up to here are floats too


class ColumnKind(NamedTuple):
    """What a column is stored as.

    Attributes:
        dtype: of numbers; None for text.
        convert: makes a Python number or text of a cell; ``str`` where cells are text already.
    """

    dtype: np.dtype[Any] | None
    convert: Callable[[Any], Any]


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


def _as_float(cell: Any) -> float:
    return float("nan") if cell is None else float(cell)


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
        self._name, self._cells_are_text, self._is_unsigned = name, cells_are_text, is_unsigned
        self._shape, self._nulls, self._smallest, self._largest = "", 0, 0, 0
        self._breaks: tuple[str, str, Any] | None = None  # what it was before, where that ended, and with which cell

    def add(self, cell: Any, place: str) -> None:
        if cell is None:
            self._nulls += 1
            return
        if self._shape == "text":
            return
        shape = _written_shape(cell) if self._cells_are_text else _typed_shape(cell)
        if shape == "int":
            number = int(cell)
            if number > self._largest:
                self._largest = number
            elif number < self._smallest:
                self._smallest = number
        if shape == self._shape:
            return
        if not self._shape or {shape, self._shape} == {"int", "float"}:
            self._shape = shape if not self._shape else "float"
        else:
            self._breaks, self._shape = (self._shape, place, cell), "text"

    def kind(self) -> ColumnKind:
        """What the column is: integers that no dtype has, or beside nulls, are text."""
        if self._shape == "float" and max(-self._smallest, self._largest) <= _EXACT:
            return ColumnKind(np.dtype(np.float64), _as_float)
        if self._shape == "int" and not self._nulls and self._integers() is not None:
            return ColumnKind(np.dtype(self._integers()), int)
        if self._shape == "bool" and not self._nulls:
            return ColumnKind(np.dtype(np.bool_), bool)
        return ColumnKind(None, str if self._cells_are_text else as_text)

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
    try:
        if str(int(cell)) == cell:
            return "int"
    except ValueError:  # no integer, or one of thousands of digits
        pass
    try:
        return "float" if repr(float(cell)) == cell else "text"
    except ValueError:
        return "text"


def _typed_shape(cell: Any) -> str:
    if isinstance(cell, bool | np.bool_):
        return "bool"
    if isinstance(cell, int | np.integer):
        return "int"
    return "float" if isinstance(cell, float | np.floating) else "text"
