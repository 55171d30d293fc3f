"""Batches of windows, the rows whose windows they hold, and batches of these rows."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from activation_extractor._format._digests import bytes_where_they_are
from activation_extractor._format._stored_rows import RowId
from activation_extractor.errors import ArgumentError
from activation_extractor.reducers import Reducer
from activation_extractor.reducers._mask_fit import check_form
from activation_extractor.reducers._pooling import WeightedMean
from activation_extractor.runs._batch_rows import Digests, combined
from activation_extractor.runs._batches import Batch
from activation_extractor.runs._grouped import Part, check_parts, row_name
from activation_extractor.runs._padding import Padding
from activation_extractor.sinks._step import check_keep


@dataclass(eq=False)
class WindowBatch:
    """A batch whose rows are windows.

    Attributes:
        batch: the batch.
        parts: which windows they are.
        counts: how many positions count in each.
        weights: the sums of the weights of these, by the reducers that have weights.
        digests: of what each is made from.
        pieces: in how many pieces it was run; 0 as long as it was not.
    """

    batch: Batch
    parts: Sequence[Part]
    counts: Sequence[int]
    weights: Mapping[str, Sequence[float]]
    digests: Digests
    pieces: int = 0

    @classmethod
    def of(cls, batch: Batch, padding: Padding, reducers: Mapping[str, Reducer]) -> WindowBatch:
        """A batch with windows in its field ``group``.

        Raises:
            ArgumentError: the windows cannot be, are not as many as rows, or are of other places than `order` says; a
                kept column cannot be, or weights have another shape than the pooling mask.
            MaskError: the pooling mask is no mask.
        """
        parts, is_real = check_parts(batch.group), batch.pooling_mask
        check_form(is_real)
        keep = check_keep(batch.keep)
        rows = {"pooling_mask": is_real, **({} if batch.ids is None else {"ids": batch.ids}), **keep}
        for name, of_rows in rows.items():
            if len(of_rows) != len(parts):
                raise ArgumentError(
                    "group", f"hold a window for each of the {len(of_rows)} rows of {name!r}", len(parts)
                )
        for place, part in zip(batch.places if batch.places is not None else (), parts, strict=False):
            if place != part.place:
                raise ArgumentError("order", f"hold the places that group holds, {part.place} here", int(place))
        counts = (is_real != 0).sum(1).tolist()
        weighted = {name: it for name, it in reducers.items() if isinstance(it, WeightedMean)}
        weights = {name: it.totals(batch.pooling, is_real != 0) for name, it in weighted.items()}
        digests = batch.digests(len(parts), padding)
        empty = [index for index, count in enumerate(counts) if not count]
        if empty:  # reducers need a position, and what they give is left out
            is_real = is_real.clone()
            is_real[empty] = 1
        return cls(replace(batch, pooling_mask=is_real, keep=keep, group=None), parts, counts, weights, digests)


@dataclass(eq=False)
class OpenRow:
    """A row of which windows are still to come, or that is not run yet.

    Attributes:
        part: one of its windows.
        row_id: its id.
        keep: its values in kept columns.
        windows: the batches of those that have come, with their rows in these, by the number of the window.
    """

    part: Part
    row_id: RowId | None
    keep: Mapping[str, Tensor | str]
    windows: dict[int, tuple[WindowBatch, int]] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The row for people."""
        return row_name(self.part.place, self.row_id)

    @property
    def is_whole(self) -> bool:
        """Whether all windows have come."""
        return len(self.windows) == self.part.windows

    def add(self, new: OpenRow, batch: WindowBatch, index: int) -> None:
        """Add a window, in a row of a batch; `new` is what it says of its row.

        Raises:
            ArgumentError: the window came before, or says something else of its row than another one.
        """
        if new.part.windows != self.part.windows:
            raise ArgumentError("group", f"give {self.name} {self.part.windows} windows, as before", tuple(new.part))
        if new.part.number in self.windows:
            raise ArgumentError("group", f"hold window {new.part.number} of {self.name} once", tuple(new.part))
        if new.row_id != self.row_id:
            raise ArgumentError("ids", f"be the same for all windows of {self.name}", new.row_id)
        for name in self.keep.keys() | new.keep.keys():
            before, now = self.keep.get(name), new.keep.get(name)
            if not _is_same(before, now):
                raise ArgumentError("keep", f"hold one {name!r} for all windows of {self.name}, {before!r}", now)
        self.windows[new.part.number] = batch, index

    @property
    def digest(self) -> int:
        """A digest of what the row is made from."""
        numbers = sorted(self.windows)
        digests = [batch.digests[index] for batch, index in map(self.windows.__getitem__, numbers)]
        return combined(np.array(digests, dtype=np.uint64), numbers)


def _is_same(before: Any, now: Any) -> bool:
    """Whether two kept values are equal, NaN being equal to itself."""
    if not isinstance(before, Tensor) or not isinstance(now, Tensor):
        return isinstance(before, str) and before == now
    if before.dtype != now.dtype or before.shape != now.shape:
        return False
    return torch.equal(before, now) or torch.equal(bytes_where_they_are(before), bytes_where_they_are(now))


@dataclass(frozen=True)
class RowBatch(Batch):
    """A batch of rows whose windows have all come; it is run by running the batches of these.

    Attributes:
        open_rows: the rows.
    """

    open_rows: Sequence[OpenRow] = ()

    @classmethod
    def of(cls, rows: Sequence[OpenRow]) -> RowBatch:
        """A batch of these rows."""
        ids = [row.row_id for row in rows if row.row_id is not None]
        return cls((), ids or None, [row.part.place for row in rows], None, {}, open_rows=rows)

    @cached_property
    def needed(self) -> list[WindowBatch]:
        """The batches that hold the windows of its rows, in the order in which they came."""
        return [*dict.fromkeys(batch for row in self.open_rows for batch, _ in row.windows.values())]

    def part(self, rows: Sequence[int]) -> Batch:
        """Some of its rows."""
        return RowBatch.of([self.open_rows[row] for row in rows])

    def digests(self, rows: int, padding: Padding | None) -> Digests:  # noqa: ARG002
        """A digest of what each row is made from."""
        return np.array([row.digest for row in self.open_rows], dtype=np.uint64)

    def relative_to(self, start: int, places: Sequence[int]) -> str:  # noqa: ARG002
        """A digest of which windows were in one batch."""
        windows = [[(part.place - start, part.number) for part in batch.parts] for batch in self.needed]
        return f"{zlib.crc32(repr(windows).encode()):08x}"

    @property
    def was_cut(self) -> bool:
        """Whether one of the batches of windows was run in pieces."""
        return any(batch.pieces > 1 for batch in self.needed)
