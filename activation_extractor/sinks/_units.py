"""A unit of a store: whole steps gathered until they are written as one shard."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from activation_extractor._format._entry_names import IDS, OFFSETS, ROWS
from activation_extractor._format._stored_rows import Ragged, RowId, as_bytes, offsets
from activation_extractor.errors import MaskError, StoredDtypeError, add_note
from activation_extractor.reducers._mask_fit import Check
from activation_extractor.sinks._host_memory import HostMemory
from activation_extractor.sinks._step import Step
from activation_extractor.sinks._transfer import Arrival, Transfer

_OBJECT_BYTES = 640  # of a tensor, and of a unit for each of its columns, beside their values: measured
_SMALL_CHUNK_BYTES = 64 * 2**10  # chunks of this mean size are joined: writing one costs as much as copying 64 KiB


class Unit:
    """Consecutive whole steps that become one shard, on the CPU or on their way to it.

    `rows` counts the steps' rows, `nbytes` the bytes of their columns, `held_bytes` all that it takes.
    """

    def __init__(self, transfer: Transfer) -> None:
        self.rows = self.nbytes = 0
        self._transfer, self._arrival = transfer, Arrival()
        self._memory = HostMemory()
        self._columns: dict[str, _Column] = {}
        self._ids: list[RowId] = []
        self._checks: list[tuple[int, Check, Tensor]] = []
        self._more_bytes = 4 * _OBJECT_BYTES

    @property
    def held_bytes(self) -> int:
        """How much memory it takes: its columns, the whole of the blocks that hold them, ids, and objects."""
        return self._memory.nbytes + self._more_bytes + _OBJECT_BYTES * len(self._columns)

    def add(self, columns: Mapping[str, Tensor | Ragged], step: Step) -> int:
        """Add the columns of a step, without waiting for their device; returns their size in bytes."""
        before = self.nbytes
        verdicts = {str(number): check.verdict for number, check in enumerate(step._checks)}
        chunks = {name: value.values if isinstance(value, Ragged) else value for name, value in columns.items()}
        hosts = self._transfer.to_host(chunks | verdicts, self._arrival)
        self._checks += [
            (step.index, check, hosts[number]) for number, check in zip(verdicts, step._checks, strict=True)
        ]
        for name, value in columns.items():
            is_here = hosts[name] is chunks[name]
            host = self._memory.keep(hosts[name]) if is_here else hosts[name]
            lengths = value.lengths.cpu() if isinstance(value, Ragged) else None
            if (column := self._columns.get(name)) is None:
                column = self._columns[name] = _Column()
            nbytes = column.add(host, lengths, self.rows)
            self.nbytes += nbytes
            self._more_bytes += _OBJECT_BYTES + (0 if is_here else nbytes) + (0 if lengths is None else lengths.nbytes)
        ids = step.ids or ()
        self._more_bytes += _OBJECT_BYTES * len(verdicts) + sum(64 + len(str(row_id)) for row_id in ids)
        self._ids += ids
        self.rows += step.rows
        return self.nbytes - before

    def entries(self, order: Tensor | None = None) -> dict[str, list[Tensor]]:
        """The entries of the shard, as chunks; waits until they have arrived on the CPU.

        `order` says which of the rows is stored first, second, ..., ``(rows,)`` int64; None stores them as they came.

        Raises:
            MaskError: a step's values were reduced with an invalid mask.
            StoredDtypeError: a value is too large for the dtype that is stored.
        """
        self._arrival.wait()
        for step, check, verdict in self._checks:
            try:
                check.settle(verdict)
            except (MaskError, StoredDtypeError) as error:
                add_note(error, f"found when the values of step {step} had arrived on the CPU")
                raise
        ids = self._ids if order is None or not self._ids else [self._ids[row] for row in order]
        entries: dict[str, list[Tensor]] = {}
        if ids and isinstance(ids[0], int):
            entries[IDS] = [torch.tensor(ids, dtype=torch.int64)]
        elif ids:
            texts = as_bytes(map(str, ids))
            entries = {IDS: [texts.values], IDS + OFFSETS: [offsets(texts.lengths)]}
        for name, column in self._columns.items():
            entries |= column.entries(name, self.rows, order)
        return entries


class _Column:
    """The chunks of one column of a unit, and which rows they are of."""

    def __init__(self) -> None:
        self._chunks: list[Tensor] = []
        self._lengths: list[Tensor] = []
        self._spans: list[tuple[int, int]] = []  # the first row of each chunk, and the row after its last

    def add(self, chunk: Tensor, lengths: Tensor | None, first_row: int) -> int:
        """Add a step's rows, with their lengths where they are ragged; returns their size in bytes."""
        if lengths is not None:
            self._lengths.append(lengths)
        self._chunks.append(chunk)
        self._spans.append((first_row, first_row + (chunk if lengths is None else lengths).shape[0]))
        return chunk.nbytes

    def entries(self, name: str, unit_rows: int, order: Tensor | None) -> dict[str, list[Tensor]]:
        """The entries of the column in a shard: its values and, where they are needed, offsets and row numbers."""
        chunks, lengths = self._chunks, self._lengths
        rows = [torch.arange(start, stop) for start, stop in self._spans]
        if order is not None:
            chunks, lengths, rows = self._ordered(order, torch.cat(rows))
        if len(chunks) > 1 and sum(chunk.nbytes for chunk in chunks) <= len(chunks) * _SMALL_CHUNK_BYTES:
            chunks = [torch.cat(chunks)]
        entries = {name: chunks}
        if lengths:
            entries[name + OFFSETS] = [offsets(torch.cat(lengths))]
        if sum(stop - start for start, stop in self._spans) < unit_rows:
            entries[name + ROWS] = rows
        return entries

    def _ordered(self, order: Tensor, rows: Tensor) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Values, lengths if any, and rows of the unit, with the unit's rows in another order."""
        places, by_place = order.argsort()[rows].sort()
        values = torch.cat(self._chunks)
        if not self._lengths:
            return [values[by_place]], [], [places]
        lengths = torch.cat(self._lengths)
        parts = torch.split(values, lengths.tolist())
        return [torch.cat([parts[row] for row in by_place])], [lengths[by_place]], [places]
