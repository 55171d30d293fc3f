"""Batches in random order through a buffer of bounded size, and batches in the order of the store."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import numpy as np

from activation_extractor._requests import ahead
from activation_extractor.store._token_order import Order
from activation_extractor.store._token_units import Source

_SLOT_BYTES = 32  # what a token takes in the buffer beside its values: its places in the orders of two windows

Empty = Callable[[int], list[Any]]  # makes memory for a batch


def buffered_tokens(nbytes: int, token_bytes: int) -> int:
    """How many tokens a buffer of so many bytes holds."""
    return max(1, nbytes // (token_bytes + _SLOT_BYTES))


def in_order(source: Source, order: Order, first: int, epochs: int | None, empty: Empty) -> Iterator[list[Any]]:
    """The batches from one on, as they lie in the store, up to the end of an epoch, or without end."""

    def read(start: int, size: int, values: list[Any]) -> list[Any]:
        parts = [field.parts(value) for field, value in zip(source.fields, values, strict=True)]
        source.read_in_order(start, size, parts)
        return values

    spans = (order.span(number % order.batches) for number in _numbers(order, first, epochs))
    if source.is_remote:
        return ahead((partial(read, *span, empty(span[1])), span[1] * source.nbytes) for span in spans)
    return (read(*span, empty(span[1])) for span in spans)


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
        for start, stop, staged in source.staged(self._window, self._window.needed(self._handed_out)):
            source.put(self._parts, staged, slots[start:stop])
        self._begin(slots)

    def take(self, count: int, outs: list[np.ndarray[Any, Any]]) -> None:
        """Hand out the next tokens, as records of each field."""
        done = 0
        while done < count:
            if self._handed_out == len(self._window) and self._next is not None:
                self._read_on(len(self._next))
                self._window, self._handed_out = self._next, 0
                self._begin(self._free)
            size = min(count - done, len(self._window) - self._handed_out)
            first = self._spare + self._handed_out
            slots = self._free[first : first + size]
            for records, out in zip(self._records, outs, strict=True):
                np.take(records, slots, out=out[done : done + size], mode="clip")
            done, self._handed_out = done + size, self._handed_out + size
            if self._next is not None:
                self._read_on(min(self._spare + self._handed_out, len(self._next)))

    def _begin(self, slots: np.ndarray[Any, Any]) -> None:
        """Begin with a window whose tokens, in the order in which they were read, lie in these slots."""
        # Some slots are free already. Those of tokens become free as these are handed out, in this order.
        self._free = np.concatenate([slots[len(self._window) :], slots[self._window.served]])
        self._spare = len(slots) - len(self._window)
        self._next, self._read_ahead = next(self._windows, None), 0
        if self._next is not None:
            self._staged = self._source.staged(self._next, [(0, len(self._next))])

    def _read_on(self, free: int) -> None:
        """Read what finds room in the first slots that became free: whole pieces of the next window, or its last."""
        while self._next is not None and self._read_ahead < len(self._next):
            if free < min(self._read_ahead + self._source.at_once, len(self._next)):
                break
            start, self._read_ahead, staged = next(self._staged)
            self._source.put(self._parts, staged, self._free[start : self._read_ahead])
