"""What batches come from: what is gone through, or what can be asked for single batches by their numbers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, final

import numpy as np
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, SequentialSampler

from activation_extractor.runs._batches import Batch
from activation_extractor.runs._items import BatchItems, Items
from activation_extractor.runs._layouts import BatchLayout, Consecutive, Scattered
from activation_extractor.runs._workers import same
from activation_extractor.store import open_store

_OPTIONS = (  # of a DataLoader, but for what is loaded in which order
    "num_workers",
    "collate_fn",
    "pin_memory",
    "timeout",
    "worker_init_fn",
    "multiprocessing_context",
    "generator",
    "prefetch_factor",
)

Split = Callable[[Any], Batch]


class Batches:
    """Batches that are gone through from the first one on."""

    def __init__(self, batches: Iterable[Any]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[Any]:
        return iter(self.batches)

    def result(self, out: Any) -> Any:
        """What the call returns that goes through them: the store."""
        return open_store(out)

    @property
    def can_repeat(self) -> bool:
        """Whether they can be gone through again."""
        return not isinstance(self.batches, Iterator)


class NumberedBatches(Batches, ABC):
    """Batches that can be asked for by their numbers, from 0.

    Attributes:
        is_loaded: whether all of them are in memory.
    """

    is_loaded = False

    def __init__(self, batches: Iterable[Any]) -> None:
        super().__init__(batches)
        self._first: list[Any] = []  # the first batch, where it was loaded for its size, until it is taken

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def take(self, numbers: Iterable[int]) -> Iterator[tuple[int, Any]]:
        """The batches with these numbers, each with its own; a number may be asked for before it is needed."""

    @abstractmethod
    def layout(self, items: Items, split: Split, *, has_order: bool) -> BatchLayout | None:
        """Where their items are, told without loading more than a batch or two; None where it cannot be told.

        `split` takes a batch apart; `has_order` says that items have places of their own.
        """

    def _even(self, items: Items, split: Split, load: Callable[[int], Any]) -> BatchLayout | None:
        """The layout of batches that are as large as the first one; the last one may be smaller."""
        if isinstance(items, BatchItems):
            return Consecutive(np.arange(len(self) + 1))
        if not self._first:
            self._first = [load(0)]
        size = split(self._first[0]).rows
        starts = np.arange(len(self) + 1, dtype=np.int64) * (size or 1)
        return None if size is None else Consecutive(starts, lambda: split(load(len(self) - 1)).rows or 0)


def is_numbered(batches: Any) -> bool:
    """Whether something has a length, and members by their numbers."""
    has_both = hasattr(batches, "__getitem__") and hasattr(batches, "__len__")
    return has_both and not isinstance(batches, Mapping)


def batches_of(batches: Any) -> Batches:
    """What batches come from; each can be asked for by its number where it is certain that this is the same batch."""
    if type(batches) is DataLoader:
        return _loader(batches) or Batches(batches)
    if isinstance(batches, list | tuple):
        return _Listed(batches)
    if isinstance(batches, DataLoader | IterableDataset) or not is_numbered(batches) or not len(batches):
        return Batches(batches)
    own = type(batches).__iter__ if hasattr(type(batches), "__iter__") else Sequence.__iter__
    if own is not Sequence.__iter__ and not same(next(iter(batches)), batches[0]):
        return Batches(batches)
    return _Indexed(batches)


@final
class _Listed(NumberedBatches):
    """A list or tuple."""

    is_loaded = True

    def __len__(self) -> int:
        return len(self.batches)  # type: ignore[arg-type]

    def take(self, numbers: Iterable[int]) -> Iterator[tuple[int, Any]]:
        return ((number, self.batches[number]) for number in numbers)  # type: ignore[index]

    def layout(self, items: Items, split: Split, *, has_order: bool) -> BatchLayout | None:
        if isinstance(items, BatchItems):
            return Consecutive(np.arange(len(self) + 1))
        parts = list(map(split, self.batches))
        if has_order:
            return _scattered([[int(place) for place in part.places] for part in parts])
        rows = [part.rows for part in parts]
        return None if None in rows else _counted(rows)


@final
class _Indexed(NumberedBatches):
    """What has ``__getitem__`` and ``__len__``."""

    def __len__(self) -> int:
        return len(self.batches)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[Any]:
        return (item for _, item in self.take(range(len(self))))

    def take(self, numbers: Iterable[int]) -> Iterator[tuple[int, Any]]:
        return ((number, self._load(number)) for number in numbers)

    def layout(self, items: Items, split: Split, *, has_order: bool) -> BatchLayout | None:
        return None if has_order else self._even(items, split, self._load)

    def _load(self, number: int) -> Any:
        return self._first.pop() if self._first and not number else self.batches[number]  # type: ignore[index]


def _loader(loader: DataLoader[Any]) -> Batches | None:
    """The batches of a DataLoader, if they are the same each time and in order."""
    if isinstance(loader.dataset, IterableDataset) or not getattr(loader, "in_order", True):
        return None
    rows = _rows_of(loader.sampler if loader.batch_sampler is None else loader.batch_sampler)
    return None if rows is None or not len(rows) else _Loaded(loader, rows)


def _rows_of(sampler: Any) -> Sequence[Any] | None:
    """What a sampler gives, if it is the same each time."""
    if type(sampler) is SequentialSampler:
        return range(len(sampler))
    if type(sampler) is BatchSampler and type(sampler.sampler) is SequentialSampler:
        return _Slices(len(sampler.sampler), sampler.batch_size, len(sampler))
    if isinstance(sampler, Iterator):
        return None
    first, second = list(sampler), list(sampler)
    return first if first == second else None


class _Slices(Sequence[Any]):
    """Consecutive ranges of rows, none of which takes memory."""

    def __init__(self, rows: int, size: int, count: int) -> None:
        self.starts, self._rows, self._count = np.minimum(np.arange(count + 1) * size, rows), rows, count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, number: Any) -> list[int]:
        return list(range(self.starts[number], self.starts[number + 1]))


@final
class _Loaded(NumberedBatches):
    """A DataLoader over a map-style data set; `rows` are what its sampler gives, for each batch."""

    def __init__(self, loader: DataLoader[Any], rows: Sequence[Any]) -> None:
        super().__init__(loader)
        self._loader, self._rows = loader, rows

    def __len__(self) -> int:
        return len(self._rows)

    def take(self, numbers: Iterable[int]) -> Iterator[tuple[int, Any]]:
        asked = deque[int]()

        def rows() -> Iterator[Any]:
            for number in numbers:
                asked.append(number)
                yield self._rows[number]

        options = {name: getattr(self._loader, name) for name in _OPTIONS}
        is_batched = self._loader.batch_sampler is not None
        options |= {"batch_sampler": rows()} if is_batched else {"sampler": rows(), "batch_size": None}
        for item in DataLoader(self._loader.dataset, **options):
            yield asked.popleft(), item

    def layout(self, items: Items, split: Split, *, has_order: bool) -> BatchLayout | None:
        if self._loader.batch_sampler is None:
            return None if has_order else self._even(items, split, lambda number: next(self.take([number]))[1])
        if isinstance(items, BatchItems):
            return Consecutive(np.arange(len(self) + 1))
        if isinstance(self._rows, _Slices):
            return Consecutive(self._rows.starts)
        return _scattered(self._rows) if has_order else _counted([len(rows) for rows in self._rows])


def _counted(rows: Sequence[Any]) -> BatchLayout:
    return Consecutive(np.concatenate([[0], np.cumsum(rows, dtype=np.int64)]).astype(np.int64))


def _scattered(places: Sequence[Sequence[int]]) -> BatchLayout | None:
    try:
        return Scattered(places)
    except (TypeError, ValueError):
        return None
