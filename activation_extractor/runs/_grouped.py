"""Rows that were run in windows, put together again."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor

from activation_extractor._format._stored_rows import KeptColumn, Ragged, RowId
from activation_extractor._streams import hold
from activation_extractor.errors import ArgumentError, ArgumentTypeError, MaskError, StepError, add_note
from activation_extractor.reducers import Reducer, full
from activation_extractor.reducers._mask_fit import Check
from activation_extractor.reducers._merges import merge_of
from activation_extractor.runs._windows import Window
from activation_extractor.sinks import Step
from activation_extractor.sinks._step import part_of

Key = tuple[str, str]


class Part(NamedTuple):
    """What a row of a batch is: the place of its row in the data set, the number of the window, and of how many."""

    place: int
    number: int
    windows: int


def check_parts(parts: Any) -> list[Part]:
    """What the rows of a batch are, from an int tensor or array ``(rows, 3)``, triples or `Window` objects.

    Raises:
        ArgumentTypeError: it is something else.
        ArgumentError: there is no such window.
    """
    condition = "hold for each row of a batch (place of the data set's row, number of the window, number of windows)"
    listed = parts.tolist() if isinstance(parts, Tensor | np.ndarray) else parts
    if not isinstance(listed, Iterable) or isinstance(listed, str | bytes | Mapping):
        raise ArgumentTypeError("group", condition, parts)
    triples = [(it.row, it.number, it.count) if isinstance(it, Window) else it for it in listed]
    checked = []
    for triple in triples:
        numbers = triple.tolist() if isinstance(triple, Tensor | np.ndarray) else triple
        if not isinstance(numbers, tuple | list) or len(numbers) != 3 or not all(map(_is_integer, numbers)):
            raise ArgumentTypeError("group", condition, triple)
        part = Part(*map(int, numbers))
        if part.place < 0 or not 0 <= part.number < part.windows:
            raise ArgumentError("group", "count places and windows from 0, up to the number of windows", tuple(part))
        checked.append(part)
    return checked


def _is_integer(value: Any) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


class Grouped:
    """Holds what windows were reduced to until the rows that they are of are taken.

    A window stays on the device where it was reduced.

    Args:
        reducers: of the run, by name.

    Raises:
        ArgumentTypeError: a reducer has something as `merge` that cannot be called.
    """

    def __init__(self, reducers: Mapping[str, Reducer]) -> None:
        self._merges = {name: merge_of(name, reducer) for name, reducer in reducers.items()}
        self._full = {name for name, reducer in reducers.items() if reducer is full}
        self._rows: dict[int, _HeldRow] = {}
        self._steps: list[tuple[list[int], Step]] = []  # rows of one window each, and their places
        self._ragged: set[Key] = set()
        self._checks: list[Check] = []

    def check_merges(self, parts: Iterable[Part]) -> None:
        """Raise an ArgumentError where rows have several windows, and a reducer does not say how they are merged."""
        lacking = [name for name, merge in self._merges.items() if merge is None]
        several = next((part for part in parts if part.windows > 1), None)
        if lacking and several is not None:
            advice = "Use mean, weighted_mean, max, first, last or full, or give it an attribute merge(parts, counts)."
            condition = f"say how the {several.windows} windows of row {several.place} are merged"
            raise ArgumentError("reduce", condition, lacking[0], advice)

    def hold(
        self,
        step: Step,
        parts: Sequence[Part],
        counts: Sequence[int],
        weights: Mapping[str, Sequence[float]] | None = None,
    ) -> None:
        """Hold the rows of a step, which are windows.

        Args:
            step: the step. Its ids and kept columns are those of the row, for each of its windows.
            parts: which windows they are.
            counts: how many positions count in each of them. One of several windows of a row may have none.
            weights: by reducer, what is to take the place of `counts` for it: the sums of weights.

        Raises:
            StepError: a layer gave something that windows cannot be merged of.
        """
        self._checks += step._checks
        single = [index for index, part in enumerate(parts) if part.windows == 1]
        if single:
            chosen = replace(part_of(step, single), _checks=[])
            self._steps.append(([parts[index].place for index in single], chosen))
        cut = [index for index, part in enumerate(parts) if part.windows > 1]
        if not cut:
            return
        chosen = part_of(step, cut)
        for row, index in enumerate(cut):
            kept = {name: column[row : row + 1] for name, column in chosen.keep.items()}
            held = _HeldRow(parts[index], chosen.ids and [chosen.ids[row]], kept)
            held = self._rows.setdefault(parts[index].place, held)
            held.counts[parts[index].number] = counts[index]
            for name, sums in (weights or {}).items():
                held.weights.setdefault(name, {})[parts[index].number] = sums[index]
        self._hold_values(chosen, [parts[index] for index in cut])

    def _hold_values(self, step: Step, parts: Sequence[Part]) -> None:
        for key, value in step.values.items():
            if isinstance(value, Ragged):
                self._ragged.add(key)
            elif key[1] in self._full:
                got = f"shape {tuple(value.shape)} of layer {key[0]!r}"
                raise StepError("hold sequences where a row has several windows", got, "Leave that layer out.")
            tensors = value.rows() if isinstance(value, Ragged) else value.unbind()
            for part, tensor in zip(parts, tensors, strict=True):
                self._rows[part.place].values.setdefault(key, {})[part.number] = tensor

    def take(self, places: Sequence[int]) -> list[Step]:
        """Take rows, all of whose windows are held; returns steps of them, in the order of the rows.

        Rows of one window each come as they were held, and stay until rows are dropped.

        Raises:
            ArgumentError: a reducer's `merge` returned something else than one of its parts.
            MaskError: no position of a row counts.
            StepError: a layer did not run for all windows of a row.
        """
        wanted, steps = set(places), []
        for held, step in self._steps:
            if rows := [row for row, place in enumerate(held) if place in wanted]:
                steps.append(part_of(step, rows))
        steps += [self._merged(self._rows.pop(place)) for place in places if place in self._rows]
        if steps and self._checks:
            checks, self._checks = self._checks, []
            steps[0] = replace(steps[0], _checks=checks)
        return steps

    def drop(self, places: Iterable[int]) -> None:
        """Forget rows, and all of one window each."""
        self._steps = []
        for place in places:
            self._rows.pop(place, None)

    def _merged(self, row: _HeldRow) -> Step:
        """A step of one row that is whole."""
        numbers = sorted(number for number, count in row.counts.items() if count)
        if not numbers:
            raise empty_row(row.name)
        values: dict[Key, Tensor | Ragged] = {}
        for key, by_number in row.values.items():
            if len(by_number) < row.part.windows:
                got = f"layer {key[0]!r} in {len(by_number)} of the {row.part.windows} windows of {row.name}"
                raise StepError("run a layer in all windows of a row or in none", got, "Leave that layer out.")
            tensors = [by_number[number] for number in numbers]
            hold(tensors)
            try:
                counts = row.weights.get(key[1], row.counts)
                merged = self._merges[key[1]](tensors, [counts[number] for number in numbers])  # type: ignore[misc]
            except Exception as error:
                add_note(error, f"while merging the windows of {row.name}, layer {key[0]!r} with {key[1]!r}")
                raise
            merged = _checked(key, merged, tensors[0], key in self._ragged)
            lengths = torch.tensor([len(merged)]) if key in self._ragged else None
            values[key] = merged[None] if lengths is None else Ragged(merged, lengths)
        return Step(0, 1, values, row.ids, row.keep)


@dataclass
class _HeldRow:
    """A row of the data set of which windows are held.

    Attributes:
        part: one of its windows.
        counts: how many positions count in each of them, by its number.
        weights: what takes their place, by reducer.
        values: what windows were reduced to, by column and number.
    """

    part: Part
    ids: Sequence[RowId] | None
    keep: Mapping[str, KeptColumn]
    counts: dict[int, int] = field(default_factory=dict)
    weights: dict[str, dict[int, float]] = field(default_factory=dict)
    values: dict[Key, dict[int, Tensor]] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The row for people."""
        return row_name(self.part.place, self.ids[0] if self.ids else None)


def row_name(place: int, row_id: RowId | None) -> str:
    """A row of a data set for people."""
    return f"row {place}" + ("" if row_id is None else f" (id {row_id!r})")


def empty_row(row: str) -> MaskError:
    """The error that nothing counts in a row of the data set."""
    advice = "Leave empty rows out of the data set."
    return MaskError("have a position that counts in every row", f"none in {row}", advice)


def _checked(key: Key, result: Any, like: Tensor, is_ragged: bool) -> Tensor:
    """What a `merge` returned, if it may stand in a column with other rows."""
    is_tensor = isinstance(result, Tensor) and result.dtype == like.dtype and result.dim() == like.dim()
    if is_tensor and result.shape[is_ragged:] == like.shape[is_ragged:]:
        return cast("Tensor", result)
    layer, reducer = key
    got = f"{result.dtype} of shape {tuple(result.shape)}" if isinstance(result, Tensor) else type(result).__name__
    condition = f"return a tensor like its parts for layer {layer!r}, {like.dtype} of shape {tuple(like.shape)}"
    raise ArgumentError(f"merge of reducer {reducer!r}", condition, got)
