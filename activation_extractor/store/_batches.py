"""Batches of tokens or rows of a store, for training: `Store.tokens` and `Store.batches`."""

from __future__ import annotations

import multiprocessing
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields
from functools import partial
from multiprocessing.context import get_spawning_popen
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from activation_extractor._streams import current_stream, hold, new_stream, use
from activation_extractor.errors import ArgumentError
from activation_extractor.store._feature_statistics import FeatureStatistics, RunningStatistics
from activation_extractor.store._prefetch import Prefetch
from activation_extractor.store._token_buffer import in_order, shuffled
from activation_extractor.store._token_order import Order, turns
from activation_extractor.store._token_units import Source, result


@dataclass(frozen=True)
class Plan:
    """What batches are made of, in which order, and how. In a checkpoint all but the last four must agree."""

    keys: tuple[str, ...]
    tokens: int
    batch_size: int
    shuffle: bool
    seed: int
    block: int  # tokens
    most_buffered: int  # tokens
    drop_last: bool
    world: int
    data: str  # a checksum of the store
    rank: int
    epochs: int | None
    ahead: int  # batches
    device: torch.device | None

    def order(self, worker: int, workers: int) -> Order:
        """The order of a worker's batches."""
        stream, streams = self.rank * workers + worker, self.world * workers
        return Order(
            self.tokens, self.batch_size, self.block, self.most_buffered, self.seed, stream, streams, self.drop_last
        )

    def to_state(self) -> dict[str, Any]:
        """What must agree, for a checkpoint."""
        names = [field.name for field in fields(self)[:-4]]
        return {name: list(value) if isinstance(value := getattr(self, name), tuple) else value for name in names}


class Batches(IterableDataset[Any], Iterator[Any]):
    """An iterator of batches of a store; see `Store.tokens` and `Store.batches`, which make it.

    It is one iterator, however often it is asked for one: a loop that is left and begun again goes on. When `epochs`
    are over it ends, and the next loop hands out the following epochs, in another order. Batches are made ahead by a
    thread, which ends when this object is gone.

    A ``torch.utils.data.DataLoader(batches, batch_size=None)`` may hand it to any workers, which then have disjoint
    parts, each with a buffer and a thread of its own. Each loop over the loader begins where this object stands, so
    that several epochs are one loop (`epochs`), unless the workers are persistent.
    """

    def __init__(self, source: Source, plan: Plan, *, has_statistics: bool, first_feature_axis: int) -> None:
        self._source, self._plan, self._axis = source, plan, first_feature_axis
        self._statistics = RunningStatistics() if has_statistics else None
        self._batches = 0  # that were handed out
        self._passes = 1  # of `epochs` epochs each, that were begun
        self._workers = 0  # of the loader whose batches are counted; 0 where this object hands them out itself
        self._worker: int | None = None  # which of them this is, in one
        self._prefetch: Prefetch[_Made] | None = None
        self._lent = multiprocessing.RawValue("i", 0)  # the number of workers that have it, which they write
        self._spare: deque[list[Any]] = deque()  # memory for batches that are made
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        lent = None if get_spawning_popen() is None else self._lent
        return self.__dict__ | {"_prefetch": None, "_lent": lent, "_lock": None, "_spare": deque()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state
        self._lock = threading.Lock()
        if self._lent is None:
            self._lent = multiprocessing.RawValue("i", 0)

    @property
    def batches_per_epoch(self) -> int:
        """How many batches an epoch has, in this process."""
        return self._order().batches

    @property
    def tokens_per_epoch(self) -> int:
        """How many tokens (or rows) the batches of an epoch hold together, in this process."""
        return self._order().count

    @property
    def statistics(self) -> FeatureStatistics | None:
        """Statistics of what was handed out in the first epoch, in this process; None before the first batch.

        Raises:
            ArgumentError: they were not asked for.
        """
        if self._statistics is None:
            raise ArgumentError("statistics", "be True for them to be summed up", False)
        return self._statistics.result()

    def __iter__(self) -> Batches:
        self._enter()
        if self._limit is not None and self._batches >= self._limit:
            self._passes += 1
            self._close()
        return self

    def __repr__(self) -> str:
        plan, keys = self._plan, ", ".join(self._plan.keys)
        return f"Batches({keys}: {plan.tokens} in batches of {plan.batch_size}, {self._batches} handed out)"

    def __next__(self) -> Any:
        self._enter()
        with self._lock:  # several threads may ask
            if self._prefetch is None or not self._prefetch.is_here:
                self._spare = deque()
                self._provide(self._plan.ahead)
                self._prefetch = Prefetch(self._made(), self._plan.ahead)
            self._provide(1)
            try:
                batch, arrived, statistics = self._prefetch.take()
            except (Exception, StopIteration):
                self._close()
                raise
            self._batches, self._statistics = self._batches + 1, statistics
        if arrived is not None:
            tensors = [part for part in batch if isinstance(part, Tensor)]
            current_stream(tensors[0].device).wait_event(arrived)
            hold(tensors)
        return batch[0] if len(batch) == 1 else batch

    def state_dict(self, batches: int | None = None) -> dict[str, Any]:
        """Where the iterator stands, as numbers and text, and tensors where there are statistics.

        Args:
            batches: how many batches this process has had, where the workers of a ``DataLoader`` hand them out, which
                make some ahead. Otherwise this object has counted them.

        Raises:
            ArgumentError: the number is missing, or is none.
        """
        lent = self._lent.value if self._worker is None else 0
        if batches is None and lent:
            advice = "Count what the loader gives: state_dict(batches=count)."
            raise ArgumentError("batches", "be given where the workers of a DataLoader hand them out", None, advice)
        if batches is not None:
            _check_count("batches", batches)
        state: dict[str, Any] = {"batches": self._batches if batches is None else batches}
        state |= {"workers": lent or self._workers, "worker": self._worker, "rank": self._plan.rank}
        if self._statistics is not None:
            state["statistics"] = self._statistics.to_state()
        return state | {"plan": self._plan.to_state()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where an iterator over the same data stood: what comes next is bit-equal to what came next there.

        Blocks that were used up are not read again.

        Raises:
            ArgumentError: the state is of other data or of another order.
        """
        self._check(state)
        self._close()
        self._batches, self._workers, self._worker = state["batches"], state["workers"], state["worker"]
        if self._statistics is not None:
            self._statistics = RunningStatistics(**state["statistics"])
        self._passes = 1
        while self._limit and self._limit < self._batches:
            self._passes += 1

    def _check(self, state: Mapping[str, Any]) -> None:
        advice = "Load it into what the same arguments give, of the same store."
        plan = self._plan.to_state()
        try:
            known, is_of_worker = state["plan"], state["worker"] is not None
            for name in ("batches", "workers"):
                _check_count(name, state[name])
            for name, value in plan.items():
                if known[name] != value:
                    raise ArgumentError("state", f"have {name}={value!r}", known[name], advice)
            if self._statistics is not None and (state["rank"], "statistics" in state) != (self._plan.rank, True):
                raise ArgumentError("state", "have statistics of this rank", f"rank {state['rank']}", advice)
        except (LookupError, TypeError) as error:
            raise ArgumentError("state", "be what state_dict() returned", state, advice) from error
        if is_of_worker != (get_worker_info() is not None):
            raise ArgumentError(
                "state", "be of this process", "that of a worker" if is_of_worker else "another", advice
            )

    def _enter(self) -> None:
        """Take one of the parts, in a worker of a loader; refuse to go on with what others had."""
        info = get_worker_info()
        workers = 0 if info is None else info.num_workers
        if self._batches and workers != self._workers:
            advice = "Go on with as many, or make a new iterator."
            raise ArgumentError("num_workers", f"be {self._workers}, as in the part that is over", workers, advice)
        if info is None or self._worker is not None:
            return
        if self._statistics is not None or self._is_far:
            name = "device" if self._is_far else "statistics"
            advice = "Move the batches that the loader gives." if self._is_far else "Sum them up without workers."
            raise ArgumentError(name, "be left out in the workers of a DataLoader", self._plan.device or True, advice)
        self._lent.value = self._workers = workers
        self._lock = threading.Lock()  # another thread may have held it when this process was forked
        epochs = self._plan.epochs
        counts = None if epochs is None else [self._order(worker).batches * epochs for worker in range(workers)]
        self._worker, self._batches, self._passes = turns(self._batches, workers, counts)[info.id]

    def _order(self, worker: int | None = None) -> Order:
        return self._plan.order((self._worker or 0) if worker is None else worker, self._workers or 1)

    @property
    def _limit(self) -> int | None:
        """How many batches there are up to the end of this pass."""
        return None if self._plan.epochs is None else self._passes * self._plan.epochs * self._order().batches

    @property
    def _is_far(self) -> bool:
        return self._plan.device is not None and self._plan.device.type != "cpu"

    def _made(self) -> Callable[[], Iterator[_Made]]:
        """What makes batches on the thread, from where this object stands; holds no reference to it."""
        stop = None if self._plan.epochs is None else self._passes * self._plan.epochs
        place, spare = (self._order(), self._batches, stop), None if self._is_far else self._spare
        return partial(_make, self._source, self._plan, *place, self._statistics, self._axis, spare)

    def _provide(self, batches: int) -> None:
        """Make memory for batches on the thread that frees it: what another one frees, malloc keeps for itself."""
        order = self._order()
        if not self._is_far:
            self._spare.extend(self._source.empty(min(order.batch, order.count)) for _ in range(batches))

    def _close(self) -> None:
        if self._prefetch is not None:
            self._prefetch.close()
            self._prefetch = None


def _check_count(name: str, count: Any) -> None:
    if not isinstance(count, int) or isinstance(count, bool) or count < 0:
        raise ArgumentError(name, "be how many there were", count)


_Made = tuple[tuple[Any, ...], Any, RunningStatistics | None]  # a batch, the event of its arrival, the sums up to it


def _make(
    source: Source,
    plan: Plan,
    order: Order,
    first: int,
    stop: int | None,
    sums: RunningStatistics | None,
    axis: int,
    spare: deque[list[Any]] | None,  # memory for batches; None where they go to a device
) -> Iterator[_Made]:
    if not order.batches and (stop is None or order.drops_last):
        advice = "Take smaller batches, or fewer ranks and workers."
        condition = f"be at most the number of tokens of each of {order.streams} parts, {order.tokens // order.streams}"
        raise ArgumentError("batch_size", condition, order.batch, advice)
    is_far, device = spare is None, plan.device
    stream = new_stream(device) if is_far and device is not None else None

    def empty(count: int) -> list[Any]:
        is_whole = count == min(order.batch, order.count)
        return spare.popleft() if spare and is_whole else source.empty(count, is_pinned=is_far)

    batches = (shuffled if plan.shuffle else in_order)(source, order, first, stop, empty)
    for number, values in enumerate(batches, first):
        if sums is not None and number < order.batches:
            sums = sums.add(values[0], axis)
        parts, arrived = [result(value) for value in values], None
        if stream is not None:
            with use(stream):
                parts = [part.to(device, non_blocking=True) if isinstance(part, Tensor) else part for part in parts]
                arrived = stream.record_event()
        elif is_far:
            parts = [part.to(device) if isinstance(part, Tensor) else part for part in parts]
        yield tuple(parts), arrived, sums
