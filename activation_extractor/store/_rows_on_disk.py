"""Where the rows of a column lie, and reading them from there."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from activation_extractor._format._entry_names import OFFSETS, ROWS
from activation_extractor._format._fields import Field
from activation_extractor._format._reader import Reader, Values, checked_offsets
from activation_extractor._format._unit_table import UnitTable

TENSOR_BYTES = 1 << 9  # about what a tensor object takes
OFFSETS_AT_ONCE = 1 << 12

Rows = range | np.ndarray[Any, Any]  # indices into a column: a range of step 1, or int64


class Parts:
    """A column's rows in the shards that hold them. Everything that is read is new memory on the CPU.

    A part is what a shard holds of the column. A shard that holds it otherwise than `field` says is refused when it is
    first read.

    Attributes:
        is_remote: whether reading waits for requests, many of which are better made at a time.
    """

    is_remote = False

    def __init__(self, field: Field, reader: Reader, units: UnitTable) -> None:
        self.field, self._entry, self._reader, self._units = field, field.entry, reader, units
        self._places, self._open = reader.places(field, units), reader.open_place
        held = self._places.held
        self._which, self._counts, self._starts = held.which, held.counts, held.starts.data
        self._find_values, self._find_offsets = self._places.values, self._places.offsets
        self._row_bytes = field.dtype.itemsize * math.prod(field.row_shape)  # of a position, when ragged

    def __reduce__(self) -> Any:
        return type(self), (self.field, self._reader, self._units)

    def __len__(self) -> int:
        return int(self._starts[-1])

    def row_numbers(self) -> Tensor:
        """The rows of the store that the column has, ``(rows,)`` int64."""
        numbers = map(self.numbers_in, range(len(self._counts)))
        return torch.from_numpy(np.concatenate([np.empty(0, dtype=np.int64), *numbers]))

    def lengths(self) -> Tensor:
        """How many positions each row of a ragged column has, ``(rows,)`` int64."""
        lengths = [self._offsets(number, 0, None).diff() for number in range(len(self._counts))]
        return torch.cat([torch.empty(0, dtype=torch.int64), *lengths])

    def counts(self) -> list[int]:
        """How many rows each shard has; none is opened."""
        return list(self._counts.tolist())

    def scan(self) -> Iterator[tuple[str, int, int | None, int | None]]:
        """Of each shard of the column: its path, how many positions (or rows) it has, and checksums of their rows.

        The checksums differ where a column has rows of other lengths, or other rows. The header of each is read.
        """
        indices = self._entry + OFFSETS, self._entry + ROWS
        for number, count in enumerate(self._counts.tolist()):
            path = self._path(number)
            extents = self._reader.shard(path).extents
            lengths, rows = (extents[name].crc32 if name in extents else None for name in indices)
            yield path, self._places.positions(self._unit(number)) if self.field.is_ragged else count, lengths, rows

    def read_many(self, wanted: Mapping[int, Sequence[tuple[Any, int]]]) -> None:
        """Fill buffers, by the number of a shard, each from a byte of the values in it on."""
        for number, places in wanted.items():
            values = self._values(number)
            for data, start in places:
                values.read_bytes(data, start)

    def row_ends(self, number: int) -> np.ndarray[Any, Any]:
        """The position after each row of a ragged column in a shard, ``(rows,)`` int64."""
        return self._offsets(number, 0, None).numpy()[1:]

    def numbers_in(self, number: int) -> np.ndarray[Any, Any]:
        """The rows of the store that the column has in a shard, ``(rows,)`` int64."""
        first_row = int(self._units.starts[self._unit(number)])
        return self._reader.row_numbers(self._path(number), self._entry).numpy() + first_row

    def mapped(self) -> list[Tensor]:
        """For each shard a tensor over the mapped file, flat when ragged."""
        return [self._values(number).mapped() for number in range(len(self._counts))]

    def flat(self) -> Tensor:
        """The positions of all rows of a ragged column, ``(positions, *features)``."""
        numbers = range(len(self._counts))
        # No list of Values: each holds a file open.
        counts = [self._values(number).extent.shape[0] for number in numbers]
        out = torch.empty((sum(counts), *self.field.row_shape), dtype=self.field.dtype)
        for number, part in zip(numbers, torch.split(out, counts), strict=True):
            self._values(number).read_into(part, 0)
        return out

    def row(self, index: int) -> Tensor:
        """A row; the index must be one of the column's."""
        number = bisect_right(self._starts, index) - 1
        row = index - self._starts[number]
        if not self.field.is_ragged:
            return self._values(number).row(row)
        first, last = self._offsets(number, row, row + 1).tolist()
        return self._values(number).rows(first, last)

    def gather(self, rows: Rows) -> Any:
        """Rows, of which consecutive ones are read at once: a tensor, or a list of tensors when ragged."""
        spans = list(self._spans(rows))
        if self.field.is_ragged:
            return [row for span in spans for row in self._ragged_rows(*span)]
        if len(spans) == 1:  # memory of its own: filling a part of a tensor takes a tenth longer
            number, start, stop = spans[0]
            return self._values(number).rows(start, stop)
        for number in {number for number, _, _ in spans}:
            self._values(number)  # a damaged shard is an error before memory is taken
        out, place = torch.empty((len(rows), *self.field.row_shape), dtype=self.field.dtype), 0
        for number, start, stop in spans:
            self._values(number).read_into(out[place : place + stop - start], start)
            place += stop - start
        return out

    def blocks(self, rows: Rows, nbytes: int, flat: bool) -> Iterator[Any]:
        """Rows piece by piece; see `Column.blocks`."""
        return (read() for read in self._pieces(rows, nbytes, flat))

    def _pieces(self, rows: Rows, nbytes: int, flat: bool) -> Iterator[Callable[[], Any]]:
        """What reads each of the pieces."""
        count = max(1, nbytes // max(1, self._row_bytes))
        if not self.field.is_ragged:
            return (partial(self.gather, rows[start : start + count]) for start in range(0, len(rows), count))
        return self._flat_pieces(rows, count) if flat else self._ragged_pieces(rows, nbytes)

    def _ragged_pieces(self, rows: Rows, nbytes: int) -> Iterator[Callable[[], list[Tensor]]]:
        for start in range(0, len(rows), OFFSETS_AT_ONCE):
            group = rows[start : start + OFFSETS_AT_ONCE]
            lengths = self._lengths_in(list(self._spans(group)))
            sizes = lengths.numpy() * self._row_bytes + TENSOR_BYTES
            yield from (partial(self.gather, group[first:stop]) for first, stop in bounds(sizes, nbytes))

    def _lengths_in(self, spans: Sequence[tuple[int, int, int]]) -> Tensor:
        """How many positions each row of some spans has."""
        return torch.cat([self._offsets(*span).diff() for span in spans])

    def _flat_pieces(self, rows: Rows, count: int) -> Iterator[Callable[[], Tensor]]:
        for number, start, stop in self._spans(rows):
            first, last = self._offsets(number, start, stop)[[0, -1]].tolist()
            for position in range(first, last, count):
                yield partial(self._flat_piece, number, position, min(position + count, last))

    def _flat_piece(self, number: int, start: int, stop: int) -> Tensor:
        return self._values(number).rows(start, stop)

    def _ragged_rows(self, number: int, start: int, stop: int) -> Sequence[Tensor]:
        offsets = self._offsets(number, start, stop)
        positions = self._values(number).rows(int(offsets[0]), int(offsets[-1]))
        return torch.split(positions, offsets.diff().tolist())

    def _unit(self, number: int) -> int:
        return number if self._which is None else int(self._which[number])

    def _path(self, number: int) -> str:
        return self._units.path(self._unit(number))

    def _values(self, number: int) -> Values:
        return self._open(self._find_values, number if self._which is None else int(self._which[number]))

    def _offsets(self, number: int, start: int, stop: int | None) -> Tensor:
        """Where rows of a part begin, and where the last of them ends, ``(rows + 1,)`` int64."""
        unit = self._unit(number)
        index, positions = self._open(self._find_offsets, unit), self._places.positions(unit)
        return checked_offsets(self._path(number), self._entry, index, positions, start, stop)

    def _spans(self, rows: Rows) -> Iterator[tuple[int, int, int]]:
        """The parts that hold rows, and where in them runs of consecutive rows begin and end."""
        if isinstance(rows, range):
            runs = [(rows.start, rows.stop)]
        else:
            breaks = np.flatnonzero(np.diff(rows) != 1) + 1
            runs = [(int(run[0]), int(run[-1]) + 1) for run in np.split(rows, breaks) if len(run)]
        for first, stop in runs:
            number = bisect_right(self._starts, first) - 1
            while first < stop:
                start, end = self._starts[number], min(stop, self._starts[number + 1])
                if first < end:
                    yield number, first - start, end - start
                first, number = max(first, end), number + 1


def bounds(sizes: np.ndarray[Any, Any], most: int) -> Iterator[tuple[int, int]]:
    """Where groups of consecutive elements begin and end whose sizes add up to at most `most`, or of one element."""
    ends, start, before = sizes.cumsum(), 0, 0
    while start < len(ends):
        stop = max(int(np.searchsorted(ends, before + most, side="right")), start + 1)
        yield start, stop
        start, before = stop, int(ends[stop - 1])
