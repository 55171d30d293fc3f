"""Which row of the data set each row of a store is."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from activation_extractor._format._end import read_ends
from activation_extractor._format._gaps import Gap
from activation_extractor._format._reader import Reader
from activation_extractor._format._shards import REPAIR, Shard
from activation_extractor._format._unit_table import UnitTable
from activation_extractor._storage import for_each
from activation_extractor.errors import StoreError

_FAILED = "failed"  # the metadata of rows that the model could not run, by their places in the unit
_ADVICE = "Run extract again with the same arguments, which makes what is missing anew."


def row_numbers(folder: Path, reader: Reader, units: UnitTable, gaps: Sequence[Gap], unit_rows: int | None) -> Tensor:
    """The number of each row in the data set, ``(rows,)`` int64.

    Args:
        folder: the store.
        reader: of its shards.
        units: that are there.
        gaps: what is missing.
        unit_rows: how many rows of the data set a unit has, the last one fewer; None where units are not ranges of
            rows.

    Raises:
        StoreError: rows are behind a missing unit of which nobody knows how many rows it had; or a shard is damaged.
    """
    rows, at_unit = units.rows, units.numbers
    if unit_rows is None:
        _check_none_behind(folder, units, gaps)
        return torch.arange(int(rows.sum()))
    _check_sizes(folder, int(at_unit[-1]) if len(units) else -1, gaps)
    items = rows.copy()  # of the data set, of which each unit is made
    failed: dict[int, np.ndarray[Any, Any]] = {}
    short = np.flatnonzero(rows < unit_rows).tolist()
    found = for_each(folder, lambda at: _failed_places(reader.shard(units.path(at))), short)
    for at, places in zip(short, found, strict=True):
        if len(places):
            failed[at] = places
            items[at] += len(places)
    missing = at_unit - np.arange(len(units))  # before each unit
    firsts, starts = items.cumsum() - items + missing * unit_rows, units.starts[:-1]
    numbers = np.repeat(firsts - starts, rows) + np.arange(rows.sum())
    for at, places in failed.items():
        numbers[starts[at] : starts[at] + rows[at]] = firsts[at] + np.setdiff1d(np.arange(items[at]), places)
    return torch.from_numpy(numbers)


def _check_none_behind(folder: Path, units: UnitTable, gaps: Sequence[Gap]) -> None:
    """Raise a StoreError where rows are behind a unit that is missing, whose number of rows nobody knows."""
    last = Path(units.path(len(units) - 1)).stem if len(units) else ""
    unit = next((name for gap in gaps for name in islice(gap, 1) if name < last), None)
    if unit is not None:
        condition = "have every unit for the rows behind it to be numbered"
        raise StoreError(folder, condition, f"{unit!r} missing, whose number of rows is not known", _ADVICE)


def _check_sizes(folder: Path, last: int, gaps: Sequence[Gap]) -> None:
    """Raise a StoreError where a unit is missing behind which rows were added: it may have had fewer than others."""
    for end in read_ends(folder):
        unit = end.units - 1
        if unit < last and any(gap.start <= unit < gap.stop for gap in gaps):
            condition = "have every unit for the rows behind it to be numbered"
            raise StoreError(folder, condition, f"'{unit:08d}' missing, behind which rows were added", _ADVICE)


def _failed_places(shard: Shard) -> np.ndarray[Any, Any]:
    """The places of the rows of a unit that the model could not run, in order."""
    try:
        places = np.unique(np.array([int(place) for place in json.loads(shard.metadata.get(_FAILED, "{}"))], np.int64))
        if len(places) and not 0 <= places[0] <= places[-1] < shard.rows + len(places):
            raise ValueError("places that the unit does not have")
    except Exception as error:
        raise StoreError(shard.path, f"list its {_FAILED!r} rows by their places", "something else", REPAIR) from error
    return places
