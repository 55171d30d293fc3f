"""What a comparison found: a row for each layer, and the first that differs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import overload

import torch

from activation_extractor import _display
from activation_extractor._display import dtype_name, printable

_HEADER = ("", "layer", "reducer", "max abs", "max rel", "cosine", "dtype", "shape", "differs in")
_ROWS_ABOVE = 3  # of a long table, above the first that differs
_MISSING = "-"


@dataclass(frozen=True)
class LayerComparison:
    """How close a layer's values are on two sides. What is not finite on both sides is left out of the numbers.

    Attributes:
        layer: its name on the left; on the right, where it is missing on the left.
        reducer: the reducer's name; None where neither side has one.
        other: its name on the right; None where it is missing there.
        dtypes: on the left and on the right; None where it is missing.
        shapes: on the left and on the right; None where it is missing, and for an axis along which rows differ.
        max_abs: the largest ``|right - left|``; NaN where shapes differ or a side is missing, as are the next two.
        max_rel: the largest ``|right - left| / |left|``, where left is not 0.
        cosine: of the angle between all values on the left and on the right; NaN too where one side is all zeros,
            or squares overflow.
        nan_count: how many values are NaN on one side only.
        inf_count: how many are infinite on one side, and finite or of the other sign on the other.
        rtol: the relative tolerance that was used.
        atol: the absolute tolerance that was used.
        differences: what it differs in: ``"missing on the left"``, ``"missing on the right"``, ``"rows"`` (other ones),
            ``"shape"``, ``"dtype"``, ``"NaN"``, ``"infinity"``, ``"values"``; empty when it is the same.
    """

    layer: str
    reducer: str | None
    other: str | None
    dtypes: tuple[torch.dtype | None, torch.dtype | None]
    shapes: tuple[tuple[int | None, ...] | None, tuple[int | None, ...] | None]
    max_abs: float = math.nan
    max_rel: float = math.nan
    cosine: float = math.nan
    nan_count: int = 0
    inf_count: int = 0
    rtol: float = math.nan
    atol: float = math.nan
    differences: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether it is the same on both sides, within the tolerances."""
        return not self.differences


class Comparison(Sequence[LayerComparison]):
    """The rows of a `compare`, in the order in which layers ran; true when all of them are the same.

    It shows itself as a table, in which ``>`` marks the first layer that differs, and ``x`` the others that do.
    """

    def __init__(self, rows: Sequence[LayerComparison]) -> None:
        self._rows = tuple(rows)

    @overload
    def __getitem__(self, index: int) -> LayerComparison: ...
    @overload
    def __getitem__(self, index: slice) -> Comparison: ...
    def __getitem__(self, index: int | slice) -> LayerComparison | Comparison:
        """A row, or a comparison of several."""
        return Comparison(self._rows[index]) if isinstance(index, slice) else self._rows[index]

    def __len__(self) -> int:
        return len(self._rows)

    def __bool__(self) -> bool:
        return self.ok

    @property
    def ok(self) -> bool:
        """Whether every layer is the same on both sides, within the tolerances."""
        return self._first is None

    @property
    def first_difference(self) -> str | None:
        """The name on the left of the first layer that differs; None when all are the same."""
        return None if self._first is None else self._rows[self._first].layer

    def table(self) -> str:
        """All rows as a table of text; the ``repr`` is cut to forty, from a little above the first that differs."""
        return _display.table(self._caption(), self._cells(), header=_HEADER, most=len(self))

    def __repr__(self) -> str:
        return _display.table(self._caption(), self._cells(), header=_HEADER, first=self._shown_from)

    def _repr_html_(self) -> str:
        return _display.html_table(self._caption(), self._cells(), header=_HEADER, first=self._shown_from)

    @property
    def _first(self) -> int | None:
        return next((index for index, row in enumerate(self._rows) if not row.ok), None)

    @property
    def _shown_from(self) -> int:
        return max(0, (self._first or 0) - _ROWS_ABOVE)

    @property
    def _has_reducers(self) -> bool:
        return len({row.reducer for row in self._rows}) > 1

    def _caption(self) -> str:
        head = f"Comparison of {_display.plural(len(self), 'value' if self._has_reducers else 'layer')}"
        if self._first is None:
            return f"{head}: no difference"
        first, differing = self._rows[self._first], sum(not row.ok for row in self._rows)
        name = repr((first.layer, first.reducer) if self._has_reducers else first.layer)
        verb = "differs" if differing == 1 else "differ"
        return f"{head}: {differing} {verb}, first {name} ({', '.join(first.differences)})"

    def _cells(self) -> list[tuple[str, ...]]:
        first_index, has_reducers = self._first, self._has_reducers
        return [
            (
                "" if row.ok else ">" if index == first_index else "x",
                _both(_name(row.layer), _name(row.layer if row.other is None else row.other)),
                printable(row.reducer or "") if has_reducers else "",
                *(_MISSING if math.isnan(value) else f"{value:.3g}" for value in (row.max_abs, row.max_rel)),
                _MISSING if math.isnan(row.cosine) else f"{row.cosine:.6f}",
                _both(*(_MISSING if dtype is None else dtype_name(dtype) for dtype in row.dtypes)),
                _both(*(_MISSING if shape is None else str(shape).replace("None", "*") for shape in row.shapes)),
                ", ".join(
                    {"NaN": f"{row.nan_count:,} NaN", "infinity": f"{row.inf_count:,} infinite"}.get(what, what)
                    for what in row.differences
                ),
            )
            for index, row in enumerate(self._rows)
        ]


def _name(layer: str) -> str:
    return printable(layer) or "(the model)"


def _both(left: str, right: str) -> str:
    return left if left == right else f"{left} / {right}"
