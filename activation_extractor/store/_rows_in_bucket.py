"""Reading the rows of a column out of the objects of a bucket: many requests at a time, each for much."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from activation_extractor._storage import ahead, concurrently
from activation_extractor.store._rows_on_disk import Parts, Rows

_AHEAD_BYTES = 1 << 26  # of pieces that are read before they are asked for


class RemoteParts(Parts):
    """A column's rows in shards that are objects of a bucket."""

    def row_numbers(self) -> Tensor:
        """The rows of the store that the column has, ``(rows,)`` int64."""
        numbers = concurrently(self.numbers_in, range(len(self._counts)))
        return torch.from_numpy(np.concatenate([np.empty(0, dtype=np.int64), *numbers]))

    def lengths(self) -> Tensor:
        """How many positions each row of a ragged column has, ``(rows,)`` int64."""
        offsets = concurrently(self._all_offsets, range(len(self._counts)))
        return torch.cat([torch.empty(0, dtype=torch.int64), *(one.diff() for one in offsets)])

    def position_counts(self) -> list[int]:
        """How many positions each shard of a ragged column has."""
        return concurrently(lambda number: self._places.positions(self._unit(number)), range(len(self._counts)))

    def flat(self) -> Tensor:
        """The positions of all rows of a ragged column, ``(positions, *features)``."""
        parts = concurrently(lambda number: self._values(number).whole(), range(len(self._counts)))
        return torch.cat([torch.empty((0, *self.field.row_shape), dtype=self.field.dtype), *parts])

    def gather(self, rows: Rows) -> Any:
        """Rows: a tensor, or a list of tensors when ragged."""
        spans = list(self._spans(rows))
        if len(spans) < 2:
            return super().gather(rows)
        by_part: dict[int, list[tuple[int, int, int]]] = {}  # the first row in the result, and the rows of the part
        place = 0
        for number, start, stop in spans:
            by_part.setdefault(number, []).append((place, start, stop))
            place += stop - start
        if self.field.is_ragged:
            return self._gather_ragged(by_part, place)
        out = torch.empty((place, *self.field.row_shape), dtype=self.field.dtype)

        def fill(number: int) -> None:
            wanted = [(out[first : first + stop - start], start) for first, start, stop in by_part[number]]
            self._values(number).fill_many(wanted)

        concurrently(fill, list(by_part))
        return out

    def _gather_ragged(self, by_part: dict[int, list[tuple[int, int, int]]], count: int) -> list[Tensor]:
        found: list[Any] = [None] * count

        def fill(number: int) -> None:
            offsets = self._all_offsets(number)
            wanted = [
                (
                    torch.empty((int(offsets[stop] - offsets[start]), *self.field.row_shape), dtype=self.field.dtype),
                    start,
                )
                for _, start, stop in by_part[number]
            ]
            self._values(number).fill_many([(out, int(offsets[start])) for out, start in wanted])
            for (out, _), (first, start, stop) in zip(wanted, by_part[number], strict=True):
                found[first : first + stop - start] = torch.split(out, offsets[start : stop + 1].diff().tolist())

        concurrently(fill, list(by_part))
        return found

    def blocks(self, rows: Rows, nbytes: int, flat: bool) -> Iterator[Any]:
        """Rows piece by piece, of which some are read ahead; see `Column.blocks`."""
        return ahead(self._pieces(rows, nbytes, flat), _AHEAD_BYTES // max(1, nbytes))

    def _all_offsets(self, number: int) -> Tensor:
        return self._offsets(number, 0, None)
