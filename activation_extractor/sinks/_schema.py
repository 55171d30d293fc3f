"""The schema of a store: what its columns and ids are."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from torch import Tensor

from activation_extractor._display import dtype_name
from activation_extractor._format._codecs import Codec
from activation_extractor._format._fields import Field
from activation_extractor._format._manifest import Manifest
from activation_extractor._format._stored_rows import Ragged, as_bytes
from activation_extractor.errors import ArgumentError, StoreError
from activation_extractor.sinks._step import Step
from activation_extractor.sinks._stored_dtype import OverflowCheck

Key = tuple[str, str] | str  # the layer and reducer; the name alone, where the column is a kept one


@dataclasses.dataclass(frozen=True)
class Schema:
    """What the columns and ids of a store are: fixed by the steps that came first."""

    codec: Codec
    fields: Mapping[Key, Field] = dataclasses.field(default_factory=dict)  # columns and kept columns, by key
    ids: str | None = None  # their type, ``"str"`` or ``"int"``; None where steps have none, and before the first row
    has_rows: bool = False  # whether a step had rows, so that `ids` is fixed

    @classmethod
    def of(cls, manifest: Manifest, codec: Codec | None = None) -> Schema:
        """The schema of the store that a manifest describes; `codec` may say in which dtype more is stored."""
        fields = {field.key: field for field in (*manifest.columns, *manifest.keep)}
        return cls(codec or manifest.codec, fields, manifest.ids, has_rows=True)

    @property
    def columns(self) -> list[Field]:
        """The columns, in the order in which they came."""
        return [field for field in self.fields.values() if isinstance(field.key, tuple)]

    @property
    def keep(self) -> list[Field]:
        """The kept columns, in the order in which they came."""
        return [field for field in self.fields.values() if isinstance(field.key, str)]

    def fit(self, step: Step) -> tuple[Schema, dict[str, Tensor | Ragged]]:
        """The schema with the columns that a step adds; and the step's columns as they are stored, on their devices.

        What is still to be checked of values on an accelerator is added to the step's checks.

        Raises:
            StoredDtypeError: a finite value is too large for the dtype that is stored.
            StoreError: a column changed its dtype or row shape, or the ids their type.
            ArgumentError: a dtype that the format lacks, or a name that is not UTF-8 text.
        """
        kept = {name: as_bytes(value) if isinstance(value, list) else value for name, value in step.keep.items()}
        values: list[tuple[Key, Tensor | Ragged]] = [*step.values.items(), *kept.items()]
        columns: dict[str, Tensor | Ragged] = {}
        fields = dict(self.fields)
        for key, value in values:
            known, is_ragged = fields.get(key), isinstance(value, Ragged)
            rows = value.values if isinstance(value, Ragged) else value
            if self.codec.dtype is None and known is not None and known.is_of(rows, is_ragged=is_ragged):
                columns[known.entry] = value  # as nearly all are
                continue
            column, field = _stored(self.codec, key, value, step)
            columns[_add(fields, field)] = column
        if not step.rows:
            return Schema(self.codec, fields, self.ids, self.has_rows), columns
        ids = type(step.ids[0]).__name__ if step.ids else None
        if self.has_rows:
            self._check_id_type(ids)
        return Schema(self.codec, fields, ids, has_rows=True), columns

    def check(self, other: Schema) -> None:
        """Make sure that the columns and ids of another schema fit this one; a StoreError where they do not."""
        fields = dict(self.fields)
        for field in other.fields.values():
            _add(fields, field)
        self._check_id_type(other.ids)

    def _check_id_type(self, ids: str | None) -> None:
        if ids != self.ids and None in (ids, self.ids):
            raise StoreError("ids", "be given for every step or for none", "some", "Give each step its ids.")
        if ids != self.ids:
            raise StoreError("ids", "be of one type in a store", f"{ids} after {self.ids}", "Convert one of them.")


def _stored(codec: Codec, key: Key, value: Tensor | Ragged, step: Step) -> tuple[Tensor | Ragged, Field]:
    """A column's rows as they are stored, and its field."""
    computed = value.values if isinstance(value, Ragged) else value
    stored = codec.convert(computed, key[0] if isinstance(key, tuple) else None, "in a store")
    if codec.dtype is not None and isinstance(key, tuple) and stored.is_floating_point():
        plain, stored = stored, stored.to(codec.dtype)
        OverflowCheck.add(key, plain, stored, value.lengths if isinstance(value, Ragged) else None, step)
    is_converted = stored.dtype != computed.dtype
    converted_from = dtype_name(computed.dtype) if is_converted else None
    field = Field(key, stored.dtype, tuple(stored.shape[1:]), isinstance(value, Ragged), converted_from)
    return (Ragged(stored, value.lengths) if isinstance(value, Ragged) else stored), field


def _add(fields: dict[Key, Field], field: Field) -> str:
    """Add a field to those of a store, or make sure that it is the one that the store has; returns its entry."""
    entry = field.entry
    known = fields.get(field.key)
    if known is None:
        try:
            entry.encode()
        except UnicodeEncodeError:  # half of a surrogate pair
            advice = "Give the layer another name."
            raise ArgumentError("the name of a column", "be UTF-8 text", entry, advice) from None
        fields[field.key] = field
    elif known != field:
        advice = "Reduce it, or capture with batches of one shape."
        raise StoreError(entry, "keep one dtype and row shape in a store", f"{field} after {known}", advice)
    return entry
