"""Iterable data sets that several workers of a DataLoader read: each worker may give every row."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import chain, islice
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from activation_extractor.errors import ArgumentError


def each_row_once(batches: Iterable[Any]) -> Iterable[Any]:
    """The batches, of which the first ones are compared where workers read an iterable data set.

    A data set that does not look which worker reads it gives all of its rows to each. Workers give their batches in
    turn: so the first ones are all the same, and differ from the next ones, or hold rows that differ. Where a data set
    is shared out, they differ.

    Raises:
        ArgumentError: on iterating, each worker gives every row.
    """
    is_shared = isinstance(batches, DataLoader) and isinstance(batches.dataset, IterableDataset)
    workers = batches.num_workers if is_shared and isinstance(batches, DataLoader) else 0
    return _Compared(batches, workers) if workers > 1 and getattr(batches, "in_order", True) else batches


class _Compared:
    def __init__(self, batches: Any, workers: int) -> None:
        self._batches, self._workers = batches, workers

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[Any]:
        rest = iter(self._batches)
        held = list(islice(rest, self._workers))
        if self._is_repeated(held) and not _differ(held[:1]):
            held += islice(rest, self._workers)
        turns = [held[: self._workers], held[self._workers :]]
        if all(self._is_repeated(turn) for turn in turns if turn) and _differ([turn[0] for turn in turns if turn]):
            got = f"{type(self._batches.dataset).__name__}, of which each of {self._workers} workers gives all rows"
            advice = "Share rows out by torch.utils.data.get_worker_info(), or pass num_workers=0 to the DataLoader."
            raise ArgumentError("batches", "hold each row once", got, advice)
        yield from chain(held, rest)

    def _is_repeated(self, turn: list[Any]) -> bool:
        return len(turn) == self._workers and all(same(turn[0], other) for other in turn[1:])


def _differ(batches: list[Any]) -> bool:
    """Whether a row of some batches differs from another one."""
    rows = [row for batch in batches for row in _rows(batch)]
    return any(not same(rows[0], row) for row in rows[1:])


def same(one: Any, other: Any) -> bool:
    """Whether two batches, or parts of them, hold the same values."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.shape == other.shape and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, np.ndarray):
        return isinstance(other, np.ndarray) and np.array_equal(one, other)
    if isinstance(one, Mapping):
        return isinstance(other, Mapping) and one.keys() == other.keys() and all(same(one[k], other[k]) for k in one)
    if isinstance(one, list | tuple):
        return type(one) is type(other) and len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


def _rows(batch: Any) -> list[Any]:
    """The rows of a batch; itself, where it is none that is known."""
    values = (
        list(batch.values()) if isinstance(batch, Mapping) else batch if isinstance(batch, list | tuple) else [batch]
    )
    columns = [value for value in values if isinstance(value, list | tuple | np.ndarray | Tensor) and np.ndim(value)]
    return list(zip(*columns, strict=False)) if columns else [batch]
