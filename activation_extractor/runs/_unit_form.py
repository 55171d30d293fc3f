"""Units of a run one by one, for engines that hand out tasks: `plan_units` says which, `write_unit` computes one."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any, cast

from torch import nn

from activation_extractor._arguments import check_size
from activation_extractor._creation import check_place
from activation_extractor._format._manifest import has_manifest
from activation_extractor._format._shards import list_units, unit_name
from activation_extractor.errors import ArgumentError, ArgumentTypeError
from activation_extractor.runs._batches import BatchFields, Ids
from activation_extractor.runs._devices import is_collective
from activation_extractor.runs._extract import extract
from activation_extractor.runs._items import RowItems
from activation_extractor.runs._planned_units import PlannedUnit, Receipt
from activation_extractor.runs._sources import NumberedBatches, batches_of
from activation_extractor.runs._stored_run import manifest_of_run

_OWN_OPTIONS = ("append", "group", "progress", "resume", "rows_per_unit", "share", "unit_bytes")


def plan_units(
    batches: Any,
    *,
    rows_per_unit: int | None = None,
    out: str | os.PathLike[str] | None = None,
    ids: Ids = None,
    order: str | None = None,
) -> list[PlannedUnit]:
    """The units that a run over a data set has, for `write_unit` to compute in any process and order.

    Args:
        batches: the batches of the whole data set, as `extract` takes them, which can be asked for by their numbers: a
            list, a DataLoader over a map-style data set in a fixed order, or anything with ``__getitem__`` and
            ``__len__``, whose batches have as many rows as the first one, but for the last. Not more than the first and
            the last one are loaded.
        rows_per_unit: how many rows a unit has. Choose a multiple of the batch size: batches on a border are run for
            both units. It may be left out where `out` holds a store.
        out: the folder; units that are stored there are left out.
        ids: as for `extract`.
        order: as for `extract`.

    Raises:
        ArgumentError: how many rows batches have cannot be told, or `rows_per_unit` is needed.
        StoreError: the folder holds something else than a store of `extract`.

    Example:
        >>> import torch
        >>> from activation_extractor import plan_units
        >>> batches = [{"input": torch.randn(4, 8)} for _ in range(5)]
        >>> [(unit.number, unit.rows, list(unit.batches)) for unit in plan_units(batches, rows_per_unit=8)]
        [(0, range(0, 8), [0, 1]), (1, range(8, 16), [2, 3]), (2, range(16, 20), [4])]
    """
    folder = None if out is None else check_place("out", out)
    size, given, there = rows_per_unit, rows_per_unit, set[str]()
    if folder is not None and has_manifest(folder):
        manifest, size = manifest_of_run(folder)
        given, there = manifest.fingerprint.get("rows_per_unit"), {*list_units(folder, manifest.codec)}
        if manifest.rows_per_unit is None or rows_per_unit not in (None, size):
            advice = "Call extract to go on with it."
            raise ArgumentError("out", f"hold a store with {rows_per_unit or 'rows'} in a unit", str(folder), advice)
    if size is None:
        raise ArgumentError("rows_per_unit", "be given where there is no store yet", None)
    check_size("rows_per_unit", size)
    source = batches_of(batches)
    fields = BatchFields(ids, (), order, None)
    layout = None
    if isinstance(source, NumberedBatches):
        layout = source.layout(RowItems(size, None), fields.split, has_order=order is not None)
    if layout is None:
        advice = "Pass a list, a DataLoader in a fixed order, or what has __getitem__ and __len__."
        raise ArgumentError("batches", "be such as can be asked for by their numbers", type(batches).__name__, advice)
    count = -(-layout.items // size)
    rows = [range(start, min(start + size, layout.items)) for start in range(0, layout.items, size)]
    numbers = [number for number in range(count) if unit_name(number) not in there]
    found = {number: layout.batches_of(rows[number].start, rows[number].stop) for number in numbers}
    whole: Any = {"units": count, "size": size, "rows_per_unit": given, "all_batches": layout.batches}
    return [
        PlannedUnit(number, rows[number], {batch: layout.places(batch) for batch in found[number]}, **whole)
        for number in numbers
    ]


def write_unit(
    model: nn.Module,
    batches: Iterable[Any],
    layers: Any,
    *,
    out: str | os.PathLike[str],
    unit: PlannedUnit,
    **options: Any,
) -> Receipt:
    """Compute one unit of a run and store it, unless it is stored already.

    It may be called again, in several processes at once, and in any order of units: the store becomes that of one call
    of `extract` over all batches, byte for byte. Whoever stores the last unit that was missing says that the store is
    complete. No batch of another unit is run as a proof: what is compared is the digest of the weights and all else
    that the fingerprint has. `extract` over the finished store runs one.

    Args:
        model: the model; it is not shared by processes.
        batches: those of the unit alone, in their order; or those of the whole data set, if they can be asked for by
            their numbers.
        layers: any selection that `capture` takes.
        out: the folder, the same for all units.
        unit: one of `plan_units`.
        options: those of `extract`, the same for all units, but for what decides which units there are.

    Raises:
        ArgumentError: the batches are others than was planned, or an option has no meaning here.
        OtherRunError, StoreError: see `extract`.

    Example:
        >>> import tempfile, torch
        >>> from torch import nn
        >>> from activation_extractor import open_store, plan_units, write_unit
        >>> model, out = nn.Sequential(nn.Linear(8, 4)), tempfile.mkdtemp()
        >>> batches = [{"input": torch.randn(4, 8)} for _ in range(5)]
        >>> for unit in plan_units(batches, rows_per_unit=8):
        ...     receipt = write_unit(model, [batches[number] for number in unit.batches], "0", out=out, unit=unit)
        >>> receipt.rows, open_store(out).is_complete
        (4, True)
    """
    if not isinstance(unit, PlannedUnit):
        raise ArgumentTypeError("unit", "be one that plan_units returned", unit)
    for name in _OWN_OPTIONS:
        if name in options:
            raise ArgumentError(name, "be left out: the plan says which rows a unit has", options[name])
    if options.get("missing") == "skip" and options.get("ids") is None and options.get("order") is None:
        raise ArgumentError("missing", "be 'error' where rows have no ids", "skip")
    if is_collective(model):
        advice = "Call extract in each of them."
        raise ArgumentError("model", "run in one process", "one whose forwards wait for others", advice)
    how: Any = {**options, "rows_per_unit": unit.rows_per_unit, "progress": False, "share": unit}
    return cast("Receipt", extract(model, batches, layers, out=out, **how))
