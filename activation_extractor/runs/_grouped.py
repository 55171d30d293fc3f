"""Rows that were run in windows, put together again."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor

from activation_extractor._format._digests import bytes_where_they_are
from activation_extractor._format._stored_rows import KeptColumn, Ragged, RowId
from activation_extractor._streams import hold
from activation_extractor.errors import ArgumentError, ArgumentTypeError, MaskError, StepError, add_note
from activation_extractor.reducers import Reducer, full
from activation_extractor.reducers._mask_fit import Check
from activation_extractor.reducers._merges import merge_of
from activation_extractor.runs._windows import Window
from activation_extractor.sinks import Step

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


class WholeRows(NamedTuple):
    """A step of whole rows, and their places in the data set."""

    places: list[int]
    step: Step


class Grouped:
    """Takes steps whose rows are windows, and gives steps whose rows are those of the data set.

    The windows of a row may come in any order, in any number of steps. What they were reduced to is held, on its
    device, until the last of them has come.

    Args:
        reducers: of the run, by name.

    Raises:
        ArgumentTypeError: a reducer has something as `merge` that cannot be called.
    """

    def __init__(self, reducers: Mapping[str, Reducer]) -> None:
        self._merges = {name: merge_of(name, reducer) for name, reducer in reducers.items()}
        self._full = {name for name, reducer in reducers.items() if reducer is full}
        self._open: dict[int, _OpenRow] = {}
        self._ragged: set[Key] = set()
        self._checks: list[Check] = []

    def check_merges(self, parts: Iterable[Part]) -> None:
        """Raise an ArgumentError where rows have several windows, and a reducer does not say how they are merged."""
        lacking = [name for name, merge in self._merges.items() if merge is None]
        several = next((part for part in parts if part.windows > 1), None)
        if lacking and several is not None:
            advice = "Use mean, max, first, last or full, or give the reducer an attribute merge(parts, counts)."
            condition = f"say how the {several.windows} windows of row {several.place} are merged"
            raise ArgumentError("reduce", condition, lacking[0], advice)

    def add(self, step: Step, parts: Sequence[Part], counts: Sequence[int]) -> list[WholeRows]:
        """Add a step of windows; returns steps of the rows that are whole with it.

        Args:
            step: its rows are windows. Their ids and kept columns are those of the row.
            parts: which windows they are.
            counts: how many positions count in each of them. One of several windows of a row may have none.

        Raises:
            ArgumentError: a window comes twice; its row has another id, kept value or number of windows than before; a
                reducer's `merge` returned something else than one of its parts.
            MaskError: no position of a row counts.
            StepError: a layer gave something that windows cannot be merged of, or did not run for all windows of a row.
        """
        if not step.rows == len(parts) == len(counts):
            raise ArgumentError("group", f"hold a window for each of the {step.rows} rows of a batch", len(parts))
        self._checks += step._checks
        whole = [index for index, part in enumerate(parts) if part.windows == 1]
        cut = [index for index, part in enumerate(parts) if part.windows > 1]
        self._hold(step, cut, parts, counts)
        finished = []
        if whole:
            step_of_whole = Step(step.index, len(whole), *_selected(step, whole), self._take_checks())
            finished.append(WholeRows([parts[index].place for index in whole], step_of_whole))
        ended: dict[tuple[Key, ...], list[_OpenRow]] = {}
        for place in dict.fromkeys(parts[index].place for index in cut):
            if len(self._open[place].counts) == self._open[place].part.windows:
                row = self._open.pop(place)
                ended.setdefault(row.columns(), []).append(row)
        for columns, rows in ended.items():
            values = {key: self._merged(key, rows) for key in columns}
            keep = {name: _stacked([row.keep[name] for row in rows]) for name in step.keep}
            ids = None if step.ids is None else [row.row_id for row in rows if row.row_id is not None]
            merged = Step(step.index, len(rows), values, ids, keep, self._take_checks())
            finished.append(WholeRows([row.part.place for row in rows], merged))
        return finished

    def end(self) -> None:
        """Raise an ArgumentError where a row lacks a window, after the last step."""
        if self._open:
            row = self._open[min(self._open)]
            missing = next(number for number in range(row.part.windows) if number not in row.counts)
            condition = f"hold window {missing} of {row.name}, which has {row.part.windows}"
            advice = f"{len(self._open)} rows lack windows." if len(self._open) > 1 else ""
            raise ArgumentError("group", condition, sorted(row.counts), advice)

    def _take_checks(self) -> list[Check]:
        checks, self._checks = self._checks, []
        return checks

    def _hold(self, step: Step, cut: Sequence[int], parts: Sequence[Part], counts: Sequence[int]) -> None:
        """Hold the windows of a step, until their rows are whole."""
        values, ids, keep = _selected(step, cut)
        for row, index in enumerate(cut):
            kept = {name: column[row] for name, column in keep.items()}
            new = _OpenRow(parts[index], ids[row] if ids is not None else None, kept)
            self._open.setdefault(parts[index].place, new).expect(new, counts[index])
        for key, value in values.items():
            if isinstance(value, Ragged):
                self._ragged.add(key)
            elif key[1] in self._full and cut:
                got = f"shape {tuple(value.shape)} of layer {key[0]!r}"
                raise StepError("hold sequences where a row has several windows", got, "Leave that layer out.")
            tensors = value.rows() if isinstance(value, Ragged) else value.unbind()
            for index, tensor in zip(cut, tensors, strict=True):
                self._open[parts[index].place].values.setdefault(key, {})[parts[index].number] = tensor

    def _merged(self, key: Key, rows: Sequence[_OpenRow]) -> Tensor | Ragged:
        """A column of rows that are whole."""
        merged = []
        for row in rows:
            numbers = sorted(number for number, count in row.counts.items() if count)
            tensors = [row.values[key][number] for number in numbers]
            hold(tensors)
            try:
                result = self._merges[key[1]](tensors, [row.counts[number] for number in numbers])  # type: ignore[misc]
            except Exception as error:
                add_note(error, f"while merging the windows of {row.name}, layer {key[0]!r} with {key[1]!r}")
                raise
            merged.append(_checked(key, result, tensors[0], key in self._ragged))
        if key not in self._ragged:
            return torch.stack(merged)
        return Ragged(torch.cat(merged), torch.tensor(list(map(len, merged)), dtype=torch.int64))


@dataclass
class _OpenRow:
    """A row of the data set of which windows are still to come.

    Attributes:
        part: one of its windows.
        counts: how many positions count in each window that has come, by its number.
        values: what windows were reduced to, by column and number.
    """

    part: Part
    row_id: RowId | None
    keep: dict[str, Tensor | str]
    counts: dict[int, int] = field(default_factory=dict)
    values: dict[Key, dict[int, Tensor]] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The row for people."""
        return f"row {self.part.place}" + ("" if self.row_id is None else f" (id {self.row_id!r})")

    def expect(self, other: _OpenRow, count: int) -> None:
        """Add a window, in which `count` positions count; `other` is what it says of the row."""
        if other.part.windows != self.part.windows:
            raise ArgumentError("group", f"give {self.name} {self.part.windows} windows, as before", tuple(other.part))
        if other.part.number in self.counts:
            raise ArgumentError("group", f"hold window {other.part.number} of {self.name} once", tuple(other.part))
        if other.row_id != self.row_id:
            raise ArgumentError("ids", f"be the same for all windows of {self.name}", other.row_id)
        for name in self.keep.keys() | other.keep.keys():
            before, now = self.keep.get(name), other.keep.get(name)
            if not _is_same(before, now):
                raise ArgumentError("keep", f"hold one {name!r} for all windows of {self.name}, {before!r}", now)
        self.counts[other.part.number] = count

    def columns(self) -> tuple[Key, ...]:
        """The columns that the row has."""
        for (layer, _), by_number in self.values.items():
            if len(by_number) < self.part.windows:
                got = f"layer {layer!r} in {len(by_number)} of the {self.part.windows} windows of {self.name}"
                raise StepError("run a layer in all windows of a row or in none", got, "Leave that layer out.")
        if not any(self.counts.values()):
            advice = "Leave empty rows out of the data set."
            raise MaskError("have a position that counts in every row", f"none in {self.name}", advice)
        return tuple(self.values)


Columns = tuple[Mapping[Key, Tensor | Ragged], "list[RowId] | None", dict[str, KeptColumn]]


def _selected(step: Step, indices: Sequence[int]) -> Columns:
    """The values, ids and kept columns of some rows of a step."""
    ids = None if step.ids is None else [step.ids[index] for index in indices]
    if len(indices) == step.rows:
        return step.values, ids, dict(step.keep)
    keep = {name: _rows_of(column, indices) for name, column in step.keep.items()}
    return {key: _rows_of(value, indices) for key, value in step.values.items()}, ids, keep


def _rows_of(column: Any, indices: Sequence[int]) -> Any:
    if isinstance(column, list):
        return [column[index] for index in indices]
    if isinstance(column, Tensor):
        hold([column])
        return column[list(indices)]
    hold([column.values])
    rows = column.rows()
    chosen = [rows[index] for index in indices] or [column.values[:0]]
    return Ragged(torch.cat(chosen), column.lengths[list(indices)])


def _stacked(values: Sequence[Any]) -> Any:
    return list(values) if isinstance(values[0], str) else torch.stack([*values])


def _is_same(before: Any, now: Any) -> bool:
    """Whether two kept values are equal, NaN being equal to itself."""
    if not isinstance(before, Tensor) or not isinstance(now, Tensor):
        return isinstance(before, str) and before == now
    if before.dtype != now.dtype or before.shape != now.shape:
        return False
    return torch.equal(before, now) or torch.equal(bytes_where_they_are(before), bytes_where_they_are(now))


def _checked(key: Key, result: Any, like: Tensor, is_ragged: bool) -> Tensor:
    """What a `merge` returned, if it may stand in a column with other rows."""
    is_tensor = isinstance(result, Tensor) and result.dtype == like.dtype and result.dim() == like.dim()
    if is_tensor and result.shape[is_ragged:] == like.shape[is_ragged:]:
        return cast("Tensor", result)
    layer, reducer = key
    got = f"{result.dtype} of shape {tuple(result.shape)}" if isinstance(result, Tensor) else type(result).__name__
    condition = f"return a tensor like its parts for layer {layer!r}, {like.dtype} of shape {tuple(like.shape)}"
    raise ArgumentError(f"merge of reducer {reducer!r}", condition, got)
