"""The columns of one batch, as they are stored and as they are computed, and the first one that differs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from activation_extractor._display import dtype_name
from activation_extractor._format._codecs import Codec
from activation_extractor._format._digests import bytes_where_they_are
from activation_extractor._format._entry_names import OFFSETS, column_key
from activation_extractor._format._fields import Field
from activation_extractor._format._headers import Entries
from activation_extractor._format._stored_rows import Ragged
from activation_extractor._format._unit_table import UnitTable
from activation_extractor._streams import hold
from activation_extractor.comparison._closeness import Closeness
from activation_extractor.comparison._tolerances import Tolerance, default_rtol
from activation_extractor.runs._stored_unit import StoredUnit
from activation_extractor.sinks import Step
from activation_extractor.sinks._schema import Schema
from activation_extractor.store._columns import Column
from activation_extractor.store._rows_on_disk import Parts


@dataclass(frozen=True)
class BatchColumn:
    """The rows of a batch in one column, on the CPU, in the dtype on disk."""

    rows: Tensor | Sequence[Tensor]  # ``(rows, *row)``; ragged, ``(positions, *features)`` for each row
    field: Field

    @property
    def kind(self) -> str:
        """The dtype on disk and the shape of a row."""
        dtype = dtype_name(self.field.dtype)
        return f"{dtype} {self.field.row_shape}{' ragged' * self.field.is_ragged}"


BatchColumns = Mapping[str, BatchColumn]  # by entry


@dataclass(frozen=True)
class Difference:
    """The first column in which a batch differs, in the order in which layers ran."""

    entry: str
    row: int | None  # of the batch, the one that differs most; None where the whole column differs
    how: str

    def describe(self, rows: Sequence[str]) -> str:
        """The difference for people; `rows` are the names of the batch's rows."""
        layer, reducer = column_key(self.entry) or (self.entry, "")
        where = "" if self.row is None else f" in {rows[self.row]}"
        return f"layer {layer!r} with {reducer!r} {self.how}{where}"


def find_difference(reference: BatchColumns, values: BatchColumns, *, is_exact: bool) -> Difference | None:
    """The first column that differs: in a single value if `is_exact`, else by more than `compare` allows its dtype."""
    for entry in dict.fromkeys([*values, *reference]):
        if entry not in values or entry not in reference:
            did, did_not = ("now", "then") if entry in values else ("then", "now")
            return Difference(entry, None, f"ran {did} and did not run {did_not}")
        before, now = reference[entry], values[entry]
        if before.kind != now.kind or len(before.rows) != len(now.rows):
            how = f"has {len(now.rows)} rows of {now.kind} in place of {len(before.rows)} of {before.kind}"
            return Difference(entry, None, how)
        found = None if _has_same_bits(before, now) else _difference(entry, before, now, is_exact)
        if found is not None:
            return found
    return None


def computed_columns(step: Step, codec: Codec) -> BatchColumns:
    """The columns that a step would be stored as."""
    schema, columns = Schema(codec).fit(step)
    step.check_masks()
    fields = {field.entry: field for field in schema.columns}
    return {entry: BatchColumn(_rows_on_host(columns[entry]), field) for entry, field in fields.items()}


def _rows_on_host(column: Tensor | Ragged) -> Tensor | Sequence[Tensor]:
    if isinstance(column, Tensor):
        hold([column])
        return column.cpu()
    hold([column.values])
    return Ragged(column.values.cpu(), column.lengths.cpu()).rows()


def stored_columns(unit: StoredUnit, rows: Sequence[int]) -> BatchColumns:
    """What a unit holds of some of its rows; a column that has none of them is left out."""
    reader = unit.reader
    shard = reader.shard(unit.path)
    found: dict[str, BatchColumn] = {}
    units = UnitTable.of_shard(shard)
    for entry in filter(column_key, shard.columns):
        column = Column(Parts(shard.field(entry), reader, units))
        places = [row for row in rows if row < shard.rows]
        if len(column) < shard.rows:
            numbers = column.rows.tolist()
            places = [numbers.index(row) for row in rows if row in numbers]
        if places:
            found[entry] = BatchColumn(column[places], shard.field(entry))
    return found


def is_near(unit: StoredUnit, entries: Entries) -> bool:
    """Whether a unit that is there by now holds the values of entries that were to be written as that unit."""
    stored = stored_columns(unit, range(unit.rows))
    return find_difference(stored, _given_columns(unit, entries), is_exact=False) is None


def _given_columns(unit: StoredUnit, entries: Entries) -> BatchColumns:
    shard = unit.reader.shard(unit.path)
    found: dict[str, BatchColumn] = {}
    for entry in filter(column_key, shard.columns):
        if entry in entries:
            values, offsets = torch.cat(list(entries[entry])), entries.get(entry + OFFSETS)
            rows = values if offsets is None else torch.split(values, torch.cat(list(offsets)).diff().tolist())
            found[entry] = BatchColumn(rows, shard.field(entry))
    return found


def _has_same_bits(before: BatchColumn, now: BatchColumn) -> bool:
    sides = ([column.rows] if isinstance(column.rows, Tensor) else column.rows for column in (before, now))
    return all(
        reference.shape == values.shape and torch.equal(bytes_where_they_are(reference), bytes_where_they_are(values))
        for reference, values in zip(*sides, strict=True)
    )


def _difference(entry: str, before: BatchColumn, now: BatchColumn, is_exact: bool) -> Difference | None:
    computed = getattr(torch, now.field.converted_from or "", now.field.dtype)
    tolerance = Tolerance(0.0, 0.0) if is_exact else Tolerance(default_rtol(computed, now.field.dtype))
    whole, sizes = Closeness(tolerance), []
    for row, (reference, values) in enumerate(zip(before.rows, now.rows, strict=True)):
        if reference.shape != values.shape:
            how = f"gives shape {tuple(values.shape)} in place of {tuple(reference.shape)}"
            return Difference(entry, row, how)
        one = Closeness(tolerance)
        for closeness in (one, whole):
            closeness.add(reference, values)
        sizes.append(one.max_abs if not one.nan_count + one.inf_count else float("inf"))
    if whole.is_close and not whole.nan_count + whole.inf_count:
        return None
    row = sizes.index(max(sizes))
    return Difference(
        entry, row, f"differs by {sizes[row]:.3g}" if sizes[row] < float("inf") else "differs in what is finite"
    )
