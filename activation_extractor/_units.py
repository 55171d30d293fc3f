"""A unit of a store: whole steps gathered until they are written as one shard."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from activation_extractor._arena import Arena
from activation_extractor._entries import IDS, OFFSETS, ROWS, entry_name, keep_entry
from activation_extractor._mask_values import MaskCheck
from activation_extractor._shards import Codec
from activation_extractor._steps import Ragged, RowId, Step
from activation_extractor._transfer import Arrival, Transfer
from activation_extractor.errors import ArgumentError, MaskError, StoreError, add_note

Described = dict[str, Any]
_SMALL_CHUNK_BYTES = 64 * 2**10


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


class Unit:
    """Consecutive whole steps that become one shard, on the CPU or on their way to it.

    Attributes:
        rows: how many rows they have.
        nbytes: how many bytes their columns have.

    Args:
        transfer: what brings columns to the CPU.
    """

    def __init__(self, transfer: Transfer) -> None:
        self.rows = self.nbytes = 0
        self._transfer, self._arrival = transfer, Arrival()
        self._arena = Arena()
        self._columns: dict[str, _Column] = {}
        self._ids: list[RowId] = []
        self._checks: list[tuple[int, MaskCheck, Tensor]] = []

    def add(self, columns: Mapping[str, Tensor | Ragged], step: Step) -> int:
        """Add the columns of a step, without waiting for their device; returns their size in bytes."""
        before = self.nbytes
        verdicts = {str(number): check.verdict for number, check in enumerate(step.checks)}
        chunks = {name: _chunk(value) for name, value in columns.items()}
        hosts = self._transfer.to_host(chunks | verdicts, self._arrival)
        self._checks += [
            (step.index, check, hosts[number]) for number, check in zip(verdicts, step.checks, strict=True)
        ]
        for name, value in columns.items():
            host = self._arena.keep(hosts[name]) if hosts[name] is chunks[name] else hosts[name]
            lengths = value.lengths.cpu() if isinstance(value, Ragged) else None
            self.nbytes += self._columns.setdefault(name, _Column()).add(host, lengths, self.rows)
        self._ids += step.ids or ()
        self.rows += step.rows
        return self.nbytes - before

    def entries(self, order: Tensor | None = None) -> dict[str, list[Tensor]]:
        """What goes into the shard, as chunks; waits until they have arrived.

        Args:
            order: which of the rows comes first, second, ..., ``(rows,)`` int64; None leaves them as they came.

        Raises:
            MaskError: a step's values were reduced with a mask that is none.
        """
        self._arrival.wait()
        for step, check, verdict in self._checks:
            _settle(step, check, verdict)
        entries = _id_entries(self._ids if order is None or not self._ids else [self._ids[row] for row in order])
        for name, column in self._columns.items():
            entries |= column.entries(name, self.rows, order)
        return entries


def _settle(step: int, check: MaskCheck, verdict: Tensor) -> None:
    try:
        check.settle(verdict)
    except MaskError as error:
        add_note(error, f"seen when step {step} had come from its device")
        raise


class _Column:
    """The chunks of one column of a unit, and which rows they are of."""

    def __init__(self) -> None:
        self._chunks: list[Tensor] = []
        self._lengths: list[Tensor] = []
        self._spans: list[tuple[int, int]] = []  # the first row of each chunk, and the row behind its last

    def add(self, chunk: Tensor, lengths: Tensor | None, first_row: int) -> int:
        """Add a step's rows, with their lengths where they are ragged; returns their size in bytes."""
        if lengths is not None:
            self._lengths.append(lengths)
        self._chunks.append(chunk)
        self._spans.append((first_row, first_row + len(chunk if lengths is None else lengths)))
        return chunk.numel() * chunk.element_size()

    def entries(self, name: str, unit_rows: int, order: Tensor | None) -> dict[str, list[Tensor]]:
        chunks, lengths, rows = self._chunks, self._lengths, self._rows()
        if order is not None:
            chunks, lengths, rows = self._ordered(order, torch.cat(rows))
        entries = {name: _joined(chunks)}
        if lengths:
            entries[name + OFFSETS] = [offsets(torch.cat(lengths))]
        if sum(stop - start for start, stop in self._spans) < unit_rows:
            entries[name + ROWS] = rows
        return entries

    def _rows(self) -> list[Tensor]:
        """Which rows of the unit each chunk is of."""
        return [torch.arange(start, stop) for start, stop in self._spans]

    def _ordered(self, order: Tensor, rows: Tensor) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Values, lengths if any, and rows of the unit, with the unit's rows in another order."""
        places, by_place = order.argsort()[rows].sort()
        values = torch.cat(self._chunks)
        if not self._lengths:
            return [values[by_place]], [], [places]
        lengths = torch.cat(self._lengths)
        parts = torch.split(values, lengths.tolist())
        return [torch.cat([parts[row] for row in by_place])], [lengths[by_place]], [places]


def _joined(chunks: list[Tensor]) -> list[Tensor]:
    """Many small chunks as one: each costs the writer as much as copying some tens of KiB."""
    nbytes = sum(chunk.nbytes for chunk in chunks)
    return [torch.cat(chunks)] if len(chunks) > 1 and nbytes <= len(chunks) * _SMALL_CHUNK_BYTES else chunks


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


def _id_entries(ids: list[RowId]) -> dict[str, list[Tensor]]:
    if not ids:
        return {}
    if isinstance(ids[0], int):
        return {IDS: [torch.tensor(ids, dtype=torch.int64)]}
    texts = as_bytes(map(str, ids))
    return {IDS: [texts.values], IDS + OFFSETS: [offsets(texts.lengths)]}


def as_bytes(texts: Iterable[str]) -> Ragged:
    """Text as it is stored: UTF-8, one text behind the other."""
    encoded = [text.encode() for text in texts]
    lengths = torch.tensor([len(text) for text in encoded], dtype=torch.int64)
    joined = torch.frombuffer(bytearray(b"".join(encoded)) or bytearray(1), dtype=torch.uint8)
    return Ragged(joined[: int(lengths.sum())], lengths)


def offsets(lengths: Tensor) -> Tensor:
    """Where each row of a ragged column begins, and where the last one ends, ``(rows + 1,)`` int64."""
    return torch.cat([torch.zeros(1, dtype=torch.int64), lengths.to(torch.int64).cumsum(0)])
