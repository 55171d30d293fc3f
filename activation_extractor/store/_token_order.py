"""The order in which rows or tokens are handed out: arithmetic on indices, so that each place of it is found at once.

Nothing here depends on the random numbers of torch or numpy, which differ between releases.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

Indices = np.ndarray[Any, np.dtype[np.int64]]
Places = np.ndarray[Any, np.dtype[np.int32]]
Bits = np.ndarray[Any, np.dtype[np.uint64]]
MOST_BUFFERED = 2**31 - 1
_ROUNDS = 8
_AT_ONCE = 1 << 16  # places, whose numbers on the way stay in a processor's cache
_MASK = 2**64 - 1


class Permutation:
    """A random order of ``range(size)`` that takes no memory: a Feistel network over a grid of rows and columns.

    Indices that fall outside of `size` are sent through again until they fall inside (J. Black and P. Rogaway,
    "Ciphers with arbitrary finite domains", 2002).

    Args:
        size: how many indices there are.
        key: which order; integers, of which each set gives another one.
    """

    def __init__(self, size: int, *key: int) -> None:
        self._size = size
        self._columns = math.isqrt(max(size - 1, 0)) + 1
        self._rows = -(-size // self._columns)
        self._keys = [_mixed_key(*key, size, number) for number in range(_ROUNDS)]

    def first(self, count: int) -> Places:
        """The indices at the first places of the order."""
        indices = np.empty(count, np.int32)
        for start in range(0, count, _AT_ONCE):
            stop = min(start + _AT_ONCE, count)
            indices[start:stop] = self(np.arange(start, stop))
        return indices

    def __call__(self, places: Indices) -> Indices:
        """The indices at these places of the order, all below `size`."""
        indices = self._once(places)
        while len(outside := np.flatnonzero(indices >= self._size)):
            indices[outside] = self._once(indices[outside])
        return indices

    def _once(self, places: Indices) -> Indices:
        rows, columns = np.divmod(places.astype(np.uint64), np.uint64(self._columns))
        for number, key in enumerate(self._keys):
            if number % 2:
                columns = (columns + _mixed(rows ^ np.uint64(key))) % np.uint64(self._columns)
            else:
                rows = (rows + _mixed(columns ^ np.uint64(key))) % np.uint64(self._rows)
        indices: Indices = (rows * np.uint64(self._columns) + columns).astype(np.int64)
        return indices


@dataclass(frozen=True)
class Window:
    """Tokens that are in the buffer together and are handed out in random order.

    Attributes:
        firsts, counts: runs of consecutive tokens of the store, in the order in which they are read.
        served: the places among the tokens read, in the order in which they are handed out.
    """

    firsts: Indices
    counts: Indices
    served: Places

    def __len__(self) -> int:
        return len(self.served)

    @cached_property
    def ends(self) -> Indices:
        """How many tokens are read once each run is."""
        return self.counts.cumsum()

    def runs(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """The first token and the number of tokens of what is read from one place up to another."""
        first, last = np.searchsorted(self.ends, [start, stop - 1], side="right")
        runs = slice(first, last + 1)
        for token, count, end in zip(
            *(part[runs].tolist() for part in (self.firsts, self.counts, self.ends)), strict=True
        ):
            skipped = max(start - (end - count), 0)
            yield token + skipped, min(end, stop) - (end - count) - skipped

    def needed(self, handed_out: int) -> Iterator[tuple[int, int]]:
        """Where neighbouring runs begin and end that have something left, once so many tokens are handed out."""
        is_left = np.zeros(len(self), bool)
        is_left[self.served[handed_out:]] = True
        starts = self.ends - self.counts
        runs = np.flatnonzero(np.logical_or.reduceat(is_left, starts))
        for neighbours in np.split(runs, np.flatnonzero(np.diff(runs) > 1) + 1):
            yield int(starts[neighbours[0]]), int(self.ends[neighbours[-1]])


@dataclass(frozen=True)
class Order:
    """Which tokens one of several streams hands out, and in which batches; in each epoch all streams have all tokens.

    An epoch cuts the tokens, from a random one on and around the end, into blocks, brings these into random order, and
    gives each stream a part of equal length. A stream's part is cut into windows, and the tokens of a window are handed
    out in random order.

    Attributes:
        tokens: how many there are.
        batch: tokens of a batch.
        block: consecutive tokens that are read at once.
        most_buffered: the most tokens of a window.
        seed: which order.
        stream, streams: the number of this stream, and how many there are.
        drops_last: whether an epoch ends with its last whole batch; then all streams have equally many batches.
    """

    tokens: int
    batch: int
    block: int
    most_buffered: int
    seed: int = 0
    stream: int = 0
    streams: int = 1
    drops_last: bool = True

    @cached_property
    def count(self) -> int:
        """How many tokens the stream hands out in an epoch."""
        share, more = divmod(self.tokens, self.streams)
        return share // self.batch * self.batch if self.drops_last else share + (self.stream < more)

    @cached_property
    def batches(self) -> int:
        """How many batches the stream has in an epoch."""
        return -(-self.count // self.batch)

    @property
    def window(self) -> int:
        """How many tokens the largest window has."""
        return min(self.most_buffered, self.count)

    @cached_property
    def _edges(self) -> list[int]:
        """Where windows begin, and the last ends; if that were small, it shares its tokens with the one before."""
        edges = [*range(0, self.count, self.window), self.count]
        if len(edges) > 2 and edges[-1] - edges[-2] < self.window // 2:
            edges[-2] = (edges[-3] + edges[-1]) // 2
        return edges

    def locate(self, batch: int) -> tuple[int, int]:
        """The window of an epoch that a batch begins in, and how many tokens of it were handed out before."""
        place = batch * self.batch
        number = bisect_right(self._edges, place) - 1
        return number, place - self._edges[number]

    @property
    def _first(self) -> int:
        """The place in the order of all streams where this one begins."""
        share, more = divmod(self.tokens, self.streams)
        return self.stream * share + min(self.stream, more)

    def size(self, batch: int) -> int:
        """How many tokens a batch of an epoch has."""
        return min(self.batch, self.count - batch * self.batch)

    def span(self, batch: int) -> tuple[int, int]:
        """The first token and the number of tokens of a batch, where nothing is shuffled."""
        return self._first + batch * self.batch, self.size(batch)

    def windows(self, epoch: int, first: int, stop: int | None) -> Iterator[Window]:
        """The windows from one of an epoch on, until the epoch `stop`, or without end."""
        while stop is None or epoch < stop:
            for number in range(first, len(self._edges) - 1):
                yield self._window(epoch, number)
            epoch, first = epoch + 1, 0

    def _window(self, epoch: int, number: int) -> Window:
        start, size = self._edges[number], self._edges[number + 1] - self._edges[number]
        served = Permutation(size, self.seed, epoch, 1, self.stream, self.streams, number).first(size)
        firsts, counts = self._runs(epoch, self._first + start, size)
        return Window(firsts, counts, served)

    def _runs(self, epoch: int, start: int, size: int) -> tuple[Indices, Indices]:
        """The tokens at consecutive places of an epoch's order of all streams: runs that rise, none over the end."""
        first_block, stop_block = start // self.block, -(-(start + size) // self.block)
        numbers = np.arange(first_block, stop_block)
        edges = np.clip(np.arange(first_block, stop_block + 1) * self.block, start, start + size)
        firsts, counts = edges[:-1] - numbers * self.block, np.diff(edges)
        whole_blocks = self.tokens // self.block  # the one that is left over stays the last
        is_whole = numbers < whole_blocks
        numbers[is_whole] = Permutation(whole_blocks, self.seed, epoch, 0)(numbers[is_whole])
        firsts += numbers * self.block + _mixed_key(self.seed, epoch, 2) % self.tokens
        firsts %= self.tokens
        over = np.maximum(firsts + counts - self.tokens, 0)
        wraps = over > 0
        firsts = np.concatenate([firsts, np.zeros(int(wraps.sum()), np.int64)])
        counts = np.concatenate([counts - over, over[wraps]])
        rising = np.argsort(firsts, kind="stable")  # so that each file is opened once for a window
        return firsts[rising], counts[rising]


def turns(handed_out: int, workers: int, counts: Sequence[int] | None) -> list[tuple[int, int, int]]:
    """How the workers of a loader go on, whose first one is asked for the next batch after so many were handed out.

    Args:
        handed_out: how many batches they have handed out together, each in its turn.
        workers: how many there are.
        counts: how many batches each has in a pass, none fewer than the next one; None without end.

    Returns:
        For each worker the one in whose place it goes on, how many batches that one has handed out, and the number of
        passes that were begun.
    """
    total = sum(counts) if counts else 0
    passes, handed_out = divmod(handed_out, total) if total else (0, handed_out)
    most = counts or [handed_out + 1] * workers
    rounds = (
        bisect_right(range(max(most)), handed_out, key=lambda number: sum(min(number, count) for count in most)) - 1
    )
    rounds = max(rounds, 0)
    waiting = [worker for worker in range(workers) if most[worker] > rounds]
    done = handed_out - sum(min(rounds, count) for count in most)  # of this round
    begun = max(1, passes + (handed_out > 0))
    before = [passes * count for count in counts] if counts else [0] * workers
    had = [before[worker] + min(rounds, most[worker]) + (worker in waiting[:done]) for worker in range(workers)]
    ended = [worker for worker in range(workers) if worker not in waiting]
    return [(worker, had[worker], begun) for worker in (*waiting[done:], *waiting[:done], *ended)]


def _mixed(values: Bits) -> Bits:
    """Values, each mixed to another one: the finaliser of SplitMix64."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    values ^= values >> np.uint64(31)
    return values


def _mixed_key(*numbers: int) -> int:
    """One number of 64 bits that depends on each bit of several integers; the same as `_mixed`, which takes arrays."""
    mixed = 0
    for number in numbers:
        mixed = (mixed + (number & _MASK) + 0x9E3779B97F4A7C15) & _MASK
        mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & _MASK
        mixed ^= mixed >> 31
    return mixed
