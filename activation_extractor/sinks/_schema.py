"""What the columns of a store are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from activation_extractor._format._codecs import Codec
from activation_extractor._format._entries import entry_name, keep_entry
from activation_extractor._format._rows import Ragged, as_bytes
from activation_extractor.errors import ArgumentError, StoreError
from activation_extractor.sinks._steps import Step

Described = dict[str, Any]


class Layout:
    """What the columns and ids of a store are: fixed by the steps that came first.

    Attributes:
        ids: the type of the row ids, ``"str"`` or ``"int"``, None when steps have none; unknown before the first row.
    """

    def __init__(self, codec: Codec) -> None:
        self.codec = codec
        self.ids: str | None = None
        self._knows_ids = False
        self._columns: dict[str, Described] = {}
        self._keep: dict[str, Described] = {}

    @classmethod
    def of(cls, codec: Codec, content: Mapping[str, Any]) -> Layout:
        """The layout that a manifest tells."""
        layout = cls(codec)
        layout.ids, layout._knows_ids = content["ids"], True
        layout._columns = {entry_name(one["layer"], one["reducer"]): one for one in content["columns"]}
        layout._keep = {keep_entry(one["name"]): one for one in content["keep"]}
        return layout

    @property
    def columns(self) -> list[Described]:
        """Each column: layer, reducer, dtype, row shape, raggedness, and the dtype that it was converted from."""
        return list(self._columns.values())

    @property
    def keep(self) -> list[Described]:
        """The same of the kept columns."""
        return list(self._keep.values())

    def fit(self, step: Step) -> dict[str, Tensor | Ragged]:
        """The columns of a step as they are stored, by entry, each on its device still.

        Raises:
            StoreError: a column changed its dtype or row shape, or the ids their type.
            ArgumentError: a dtype that the format lacks, or a name that is no text.
        """
        kind = self._id_type(step)
        found: dict[str, Tensor | Ragged] = {}
        columns, keep = dict(self._columns), dict(self._keep)
        for (layer, reducer), value in step.values.items():
            entry = entry_name(layer, reducer)
            found[entry], described = _stored(self.codec, value)
            _fix(columns, entry, {"layer": layer, "reducer": reducer, **described})
        for name, kept in step.keep.items():
            entry = keep_entry(name)
            found[entry], described = _stored(self.codec, as_bytes(kept) if isinstance(kept, list) else kept)
            _fix(keep, entry, {"name": name, **described})
        self._columns, self._keep = columns, keep  # only now that all of them fit
        self.ids, self._knows_ids = kind, self._knows_ids or step.rows > 0
        return found

    def check(self, other: Layout) -> None:
        """Make sure that the columns and ids of another layout fit this one.

        Raises:
            StoreError: a column has another dtype or row shape, or ids are of another type.
        """
        for entry, described in (other._columns | other._keep).items():
            _fix(self._columns | self._keep, entry, described)
        self._check_id_type(other.ids)

    def _id_type(self, step: Step) -> str | None:
        """The type of the ids: one in the whole store, or there are none in all of it."""
        kind = type(step.ids[0]).__name__ if step.ids else None
        if not step.rows:
            return self.ids
        if self._knows_ids:
            self._check_id_type(kind)
        return kind

    def _check_id_type(self, kind: str | None) -> None:
        if kind != self.ids and None in (kind, self.ids):
            raise StoreError("ids", "be given for every step or for none", "some", "Give each step its ids.")
        if kind != self.ids:
            raise StoreError("ids", "be of one type in a store", f"{kind} after {self.ids}", "Convert one of them.")


def _chunk(value: Tensor | Ragged) -> Tensor:
    return value.values if isinstance(value, Ragged) else value


def _stored(codec: Codec, value: Tensor | Ragged) -> tuple[Tensor | Ragged, Described]:
    """A column's rows as they are stored, and their description."""
    given = _chunk(value)
    chunk = codec.convert(given)
    described: Described = {
        "dtype": str(chunk.dtype).removeprefix("torch."),
        "row_shape": list(chunk.shape[1:]),
        "ragged": isinstance(value, Ragged),
    }
    if chunk.dtype != given.dtype:
        described["converted_from"] = str(given.dtype).removeprefix("torch.")
    return (Ragged(chunk, value.lengths) if isinstance(value, Ragged) else chunk), described


def _fix(known: dict[str, Described], entry: str, described: Described) -> None:
    if entry not in known:
        _check_text(entry)
    before = known.setdefault(entry, described)
    if before != described:
        advice = "Reduce it, or capture with batches of one shape."
        got, was = map(_shown, (described, before))
        raise StoreError(entry, "keep one dtype and row shape in a store", f"{got} after {was}", advice)


def _shown(described: Described) -> str:
    dtype = described.get("converted_from", described["dtype"])
    return f"{dtype} {tuple(described['row_shape'])}{' ragged' * described['ragged']}"


def _check_text(entry: str) -> None:
    try:
        entry.encode()
    except UnicodeEncodeError:  # half of a surrogate pair
        raise ArgumentError("the name of a column", "be UTF-8 text", entry, "Give the layer another name.") from None
