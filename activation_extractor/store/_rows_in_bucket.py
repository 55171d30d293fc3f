"""Reading the rows of a column out of the objects of a bucket: many requests at a time, each for much."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache, partial
from itertools import islice, tee
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from activation_extractor._format._fields import Field
from activation_extractor._format._reader import Reader, RemoteValues
from activation_extractor._format._unit_table import UnitTable
from activation_extractor._requests import AHEAD_BYTES, REQUEST_BYTES, ahead, concurrently, run
from activation_extractor.store._rows_on_disk import OFFSETS_AT_ONCE, TENSOR_BYTES, Parts, Rows, bounds

_FIRST_BYTES = 1 << 20  # of the first request for a whole column; each next one is as large as all before it
_HEADERS = 128  # that are read before the first of them is used; fewer than a reader remembers
_INDICES = 16  # of shards whose rows are remembered, while tokens are read from them
_ROWS_IN_RUN = 64  # consecutive ones, for which a request of their own is made

_Span = tuple[int, int, int]  # the number of a part, and where in it something begins and ends


class RemoteParts(Parts):
    """A column's rows in shards that are objects of a bucket."""

    is_remote = True

    def __init__(self, field: Field, reader: Reader, units: UnitTable) -> None:
        super().__init__(field, reader, units)
        self.row_ends = lru_cache(_INDICES)(super().row_ends)  # type: ignore[method-assign]
        self.numbers_in = lru_cache(_INDICES)(super().numbers_in)  # type: ignore[method-assign]

    def scan(self) -> Iterator[tuple[str, int, int | None, int | None]]:
        """See `Parts.scan`; headers are read many at a time, once where several columns are scanned in step."""
        scanned, count = super().scan(), len(self._counts)
        for start in range(0, count, _HEADERS):
            numbers = range(start, min(start + _HEADERS, count))
            concurrently(lambda number: self._reader.shard(self._path(number)), numbers)
            yield from islice(scanned, len(numbers))

    def row_numbers(self) -> Tensor:
        """The rows of the store that the column has, ``(rows,)`` int64."""
        numbers = concurrently(self.numbers_in, range(len(self._counts)))
        return torch.from_numpy(np.concatenate([np.empty(0, dtype=np.int64), *numbers]))

    def lengths(self) -> Tensor:
        """How many positions each row of a ragged column has, ``(rows,)`` int64."""
        offsets = concurrently(lambda number: self._offsets(number, 0, None), range(len(self._counts)))
        return torch.cat([torch.empty(0, dtype=torch.int64), *(one.diff() for one in offsets)])

    def flat(self) -> Tensor:
        """The positions of all rows of a ragged column, ``(positions, *features)``."""
        counts = concurrently(self._position_count, range(len(self._counts)))
        out = torch.empty((sum(counts), *self.field.row_shape), dtype=self.field.dtype)
        self._fill([(number, 0, part) for number, part in enumerate(torch.split(out, counts))])
        return out

    def gather(self, rows: Rows) -> Any:
        """Rows: a tensor, or a list of tensors when ragged."""
        spans = list(self._spans(rows))
        if self.field.is_ragged:
            return self._gather_ragged(spans)
        if len(spans) == 1:
            return super().gather(rows)
        concurrently(self._values, list({number for number, _, _ in spans}))  # no memory is taken for damaged shards
        out = torch.empty((len(rows), *self.field.row_shape), dtype=self.field.dtype)
        parts = torch.split(out, [stop - start for _, start, stop in spans])
        self._fill([(number, start, part) for (number, start, _), part in zip(spans, parts, strict=True)])
        return out

    def _gather_ragged(self, spans: Sequence[_Span]) -> list[Tensor]:
        wanted, lengths = [], []
        for (number, _, _), ends in zip(spans, self._ends(spans), strict=True):
            shape = (int(ends[-1] - ends[0]), *self.field.row_shape)
            wanted.append((number, int(ends[0]), torch.empty(shape, dtype=self.field.dtype)))
            lengths.append(ends.diff().tolist())
        self._fill(wanted)
        return [row for (_, _, out), sizes in zip(wanted, lengths, strict=True) for row in torch.split(out, sizes)]

    def _ends(self, spans: Sequence[_Span]) -> list[Tensor]:
        """The offsets of the rows of spans, for which each part is asked once."""
        by_part: dict[int, list[tuple[int, int]]] = {}
        for number, start, stop in spans:
            by_part.setdefault(number, []).append((start, stop))
        ranges = [(number, min(runs)[0], max(stop for _, stop in runs)) for number, runs in by_part.items()]
        found = concurrently(lambda span: self._offsets(*span), ranges)
        offsets = {number: (first, part) for (number, first, _), part in zip(ranges, found, strict=True)}
        ends = []
        for number, start, stop in spans:
            first, part = offsets[number]
            ends.append(part[start - first : stop - first + 1])
        return ends

    def _lengths_in(self, spans: Sequence[_Span]) -> Tensor:
        return torch.cat([one.diff() for one in self._ends(spans)])

    def _fill(self, wanted: Sequence[tuple[int, int, Tensor]]) -> None:
        """Fill tensors, each from a row (or position) of a part on."""
        by_part: dict[int, list[tuple[Any, int]]] = {}
        for number, start, out in wanted:
            data = out.reshape(-1).view(torch.uint8).numpy()
            by_part.setdefault(number, []).append((data, start * self._row_bytes))
        self.read_many(by_part)

    def blocks(self, rows: Rows, nbytes: int, flat: bool) -> Iterator[Any]:
        """Rows piece by piece, of which some are read ahead; see `Column.blocks`."""
        count = max(1, nbytes // max(1, self._row_bytes))
        is_scattered = not isinstance(rows, range) and len(rows) < _ROWS_IN_RUN * sum(1 for _ in self._spans(rows))
        if is_scattered or not self._row_bytes:
            return ahead((piece, max(nbytes, AHEAD_BYTES // 4)) for piece in self._pieces(rows, nbytes, flat))
        if not self.field.is_ragged:
            return self._dense_blocks(rows, count)
        return self._flat_blocks(rows, count) if flat else self._ragged_blocks(rows, nbytes)

    def _dense_blocks(self, rows: Rows, count: int) -> Iterator[Tensor]:
        stream = self._stream(self._spans(rows))
        for start in range(0, len(rows), count):
            yield stream.take(min(count, len(rows) - start))

    def _flat_blocks(self, rows: Rows, count: int) -> Iterator[Tensor]:
        wanted, spans = tee(ahead((partial(self._positions_of, span), 0) for span in self._spans(rows)))
        stream = self._stream(wanted)
        for _, first, last in spans:
            for position in range(first, last, count):
                yield stream.take(min(count, last - position))

    def _ragged_blocks(self, rows: Rows, nbytes: int) -> Iterator[list[Tensor]]:
        groups = (rows[start : start + OFFSETS_AT_ONCE] for start in range(0, len(rows), OFFSETS_AT_ONCE))
        wanted, plans = tee(ahead((partial(self._plan, group), AHEAD_BYTES // 2) for group in groups))
        stream = self._stream(span for spans, _ in wanted for span in spans)
        for _, lengths in plans:
            for first, stop in bounds(lengths.numpy() * self._row_bytes + TENSOR_BYTES, nbytes):
                sizes = lengths[first:stop].tolist()
                yield list(torch.split(stream.take(sum(sizes)), sizes))

    def _plan(self, rows: Rows) -> tuple[list[_Span], Tensor]:
        """The spans of positions of some ragged rows, and how many positions each row has."""
        spans = list(self._spans(rows))
        ends = self._ends(spans)
        found = [(number, int(one[0]), int(one[-1])) for (number, _, _), one in zip(spans, ends, strict=True)]
        return found, torch.cat([one.diff() for one in ends])

    def _positions_of(self, span: _Span) -> _Span:
        """The positions of consecutive rows of a part."""
        number, start, stop = span
        if start == 0 and stop == int(self._counts[number]):
            return number, 0, self._position_count(number)
        first, last = self._offsets(number, start, stop)[[0, -1]].tolist()
        return number, first, last

    def _position_count(self, number: int) -> int:
        return self._places.positions(self._unit(number))

    def _stream(self, spans: Iterable[_Span]) -> _Stream:
        return _Stream(ahead(self._reads(spans)), self)

    def _reads(self, spans: Iterable[_Span]) -> Iterator[tuple[Any, int]]:
        """What reads the bytes of spans of rows (or positions), one behind the other, and how much each reads."""
        before = _FIRST_BYTES
        for number, first, last in spans:
            start, end = first * self._row_bytes, last * self._row_bytes
            while start < end:
                stop = min(end, start + min(before, REQUEST_BYTES))
                yield partial(self._fetch, number, start, stop), stop - start
                before, start = before + stop - start, stop

    def _fetch(self, number: int, start: int, stop: int) -> Any:
        return self._remote_values(number).fetch(start, stop)

    def _remote_values(self, number: int) -> RemoteValues:
        return cast("RemoteValues", self._values(number))

    def read_many(self, wanted: Mapping[int, Sequence[tuple[Any, int]]]) -> None:
        """Fill buffers, by the number of a part, each from a byte of its values on."""
        found = concurrently(self._remote_values, list(wanted))
        run([one for values, places in zip(found, wanted.values(), strict=True) for one in values.requests(places)])


class _Stream:
    """Rows (or positions) of a column one behind the other, out of pieces of their bytes."""

    def __init__(self, pieces: Iterator[Any], parts: Parts) -> None:
        self._pieces, self._left, self._parts = pieces, memoryview(b""), parts

    def take(self, count: int) -> Tensor:
        """The next rows, new memory."""
        field = self._parts.field
        out = torch.empty((count, *field.row_shape), dtype=field.dtype)
        data = memoryview(out.reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
        while len(data):
            if not len(self._left):
                self._left = memoryview(next(self._pieces)).cast("B")
            size = min(len(data), len(self._left))
            data[:size] = self._left[:size]
            data, self._left = data[size:], self._left[size:]
        return out
