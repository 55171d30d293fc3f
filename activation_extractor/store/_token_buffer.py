"""Batches in random order through a buffer of bounded size, and batches in the order of the store."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

from activation_extractor.store._token_order import Order, Window
from activation_extractor.store._token_units import Source

_SLOT_BYTES = 32  # what a token takes in the buffer beside its values: its places in the orders of two windows

Empty = Callable[[int], list[Any]]  # makes memory for a batch


def buffered_tokens(nbytes: int, token_bytes: int) -> int:
    """How many tokens a buffer of so many bytes holds."""
    return max(1, nbytes // (token_bytes + _SLOT_BYTES))


def in_order(source: Source, order: Order, first: int, epochs: int | None, empty: Empty) -> Iterator[list[Any]]:
    """The batches from one on, as they lie in the store, up to the end of an epoch, or without end."""
    for number in _numbers(order, first, epochs):
        start, size = order.span(number % order.batches)
        values = empty(size)
        parts = [field.parts(value) for field, value in zip(source.fields, values, strict=True)]
        source.read_in_order(start, size, parts)
        yield values


def shuffled(source: Source, order: Order, first: int, epochs: int | None, empty: Empty) -> Iterator[list[Any]]:
    """The same in random order. Blocks that earlier batches have used up are not read."""
    buffer = None
    for number in _numbers(order, first, epochs):
        buffer = buffer or _Buffer(source, order, first, epochs)
        size = order.size(number % order.batches)
        values = empty(size)
        buffer.take(size, [field.records(value) for field, value in zip(source.fields, values, strict=True)])
        yield values


def _numbers(order: Order, first: int, epochs: int | None) -> Iterable[int]:
    return itertools.count(first) if epochs is None else range(first, epochs * order.batches)


class _Buffer:
    """Holds a window of tokens, and in the slots of those that were handed out already tokens of the next window."""

    def __init__(self, source: Source, order: Order, first: int, epochs: int | None) -> None:
        self._source = source
        epoch, batch = divmod(first, order.batches)
        number, self._handed_out = order.locate(batch)
        memory = source.empty(order.window)
        self._parts = [field.parts(values) for field, values in zip(source.fields, memory, strict=True)]
        self._records = [field.records(values) for field, values in zip(source.fields, memory, strict=True)]
        self._windows = order.windows(epoch, number, epochs)
        slots = np.arange(order.window, dtype=np.int32)
        self._window = next(self._windows)
        for start, stop in self._window.needed(self._handed_out):
            self._read(self._window, start, stop, slots)
        self._begin(slots)

    def take(self, count: int, outs: list[np.ndarray[Any, Any]]) -> None:
        """Hand out the next tokens, as records of each field."""
        done = 0
        while done < count:
            if self._handed_out == len(self._window) and self._next is not None:
                self._read(self._next, self._read_ahead, len(self._next), self._free)
                self._window, self._handed_out = self._next, 0
                self._begin(self._free)
            size = min(count - done, len(self._window) - self._handed_out)
            first = self._spare + self._handed_out
            slots = self._free[first : first + size]
            for records, out in zip(self._records, outs, strict=True):
                np.take(records, slots, out=out[done : done + size], mode="clip")
            done, self._handed_out = done + size, self._handed_out + size
            self._read_on()

    def _begin(self, slots: np.ndarray[Any, Any]) -> None:
        """Begin with a window whose tokens, in the order in which they were read, lie in these slots."""
        # Some slots are free already. Those of tokens become free as these are handed out, in this order.
        self._free = np.concatenate([slots[len(self._window) :], slots[self._window.served]])
        self._spare = len(slots) - len(self._window)
        self._next, self._read_ahead = next(self._windows, None), 0

    def _read_on(self) -> None:
        if self._next is None:
            return
        stop = min(self._spare + self._handed_out, len(self._next))
        if stop - self._read_ahead >= self._source.at_once:
            self._read(self._next, self._read_ahead, stop, self._free)
            self._read_ahead = stop

    def _read(self, window: Window, start: int, stop: int, slots: np.ndarray[Any, Any]) -> None:
        if start < stop:
            self._source.read(window.runs(start, stop), self._parts, slots[start:stop])
