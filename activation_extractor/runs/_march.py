"""Models whose forwards wait for other processes: one process leads a run, and the others run the same forwards.

Processes that look at a folder one after another see different units in it, and would run different batches, of which
each waits for the others for ever. So the first of them decides alone: it runs `extract` as the only process does, and
sends each batch that it runs to the others, and how the run ended.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Literal, ParamSpec, TypeVar, final

from torch import Tensor, distributed, nn

from activation_extractor.errors import ArgumentError, OtherProcessError
from activation_extractor.runs._batches import Batch
from activation_extractor.runs._devices import model_group, model_ranks
from activation_extractor.runs._ranks import sharded_by
from activation_extractor.sinks import Sink, Step

Forward = Callable[[Batch, bool], None]
Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")
Sharded = Literal["gather", "local"] | None

_QUIET = 30.0  # seconds, after which others are told to go on waiting: a process group has a time limit
_GO_ON, _ENDED = "go on waiting", "ended"


class Alone:
    """The march of a process that waits for no others."""

    follower: Follower | None = None

    @property
    def leads(self) -> bool:
        """Whether this process decides what is run, and stores it."""
        return self.follower is None

    def share(self, given: Any, batches: Any) -> Any:  # noqa: ARG002 - `March` looks at them
        """The part of a run that is this process's, where others run other parts."""
        return given

    def agree(self, make: Callable[[], Result]) -> Callable[[], Result]:
        """What makes something of a model's weights."""
        return make

    def sharded(self, given: Sharded) -> Sharded:
        """What becomes of parts of values."""
        return given

    def send(self, batch: Batch) -> None:
        """A batch is about to run."""

    def awake(self, items: Iterable[Any]) -> Iterable[Any]:
        """The items that this process is to run."""
        return items

    def follow(self, forward: Forward) -> None:
        """Run what the leading process runs."""

    @contextmanager
    def leading(self) -> Iterator[None]:
        """Tell others how the run ends."""
        yield


@final
class March(Alone):
    """The march of one of several processes that run a model's forwards together."""

    def __init__(self, ranks: tuple[int, ...], group: Any) -> None:
        self._ranks, self._first, self._group, self._sent = ranks, ranks[0], group, time.monotonic()
        self._is_under_way = False  # whether the leading process sends orders
        self.follower = Follower() if distributed.get_rank() != self._first else None

    def agree(self, make: Callable[[], Result]) -> Callable[[], Result]:
        """What makes something of a model's weights, all of which are asked for now, in each process."""
        self._meet(None)
        made = make()
        return lambda: made

    def share(self, given: Any, batches: Any) -> Any:  # noqa: ARG002 - whatever it is
        """All of it: no process can run other parts meanwhile.

        Raises:
            ArgumentError: each process is given a part of the batches, of which one part alone would be stored.
        """
        if (sampler := sharded_by(batches)) is not None:
            advice = "Pass the whole data set in each process, or share=None with a folder for each."
            raise ArgumentError("batches", "be the same in each process that shares a model", sampler, advice)
        return None

    def sharded(self, given: Sharded) -> Sharded:
        """What becomes of parts of values: whole values are made of them.

        Raises:
            ArgumentError: parts are asked for, of which only those of the first process would be stored.
        """
        if given == "local":
            advice = "Pass share=None, with a folder for each process, to store the parts of each."
            raise ArgumentError("sharded", "be 'gather' where one process stores what all compute", given, advice)
        return "gather"

    def send(self, batch: Batch) -> None:
        """A batch is about to run: the others are to run it, too."""
        if self.follower is None:
            self._send(
                Batch(
                    _on_host(batch.arguments),
                    batch.ids,
                    None,
                    _on_host(batch.pooling_mask),
                    {},
                    None,
                    _on_host(batch.pooling),
                )
            )

    def awake(self, items: Iterable[Any]) -> Iterator[Any]:
        """The items that this process is to run; while it skips some, the others are kept from giving up."""
        for item in () if self.follower else items:
            yield item
            if time.monotonic() - self._sent > _QUIET:
                self._send(_GO_ON)

    def follow(self, forward: Forward) -> None:
        """In a process that does not lead, run what the leading one runs, until it ends.

        Raises:
            OtherProcessError: another process has failed: any before the first batch, later the leading one.
        """
        self._meet(None)
        self._is_under_way = True
        failed: Exception | None = None
        while self.follower and (order := self._send(None)) != _ENDED:
            if isinstance(order, Batch):
                try:
                    forward(order, False)
                    failed = None
                except Exception as error:  # the same one there, which decides what becomes of the batch
                    failed = error
            elif order != _GO_ON:
                raise OtherProcessError(self._first, order) from failed

    @contextmanager
    def leading(self) -> Iterator[None]:
        """Tell the others how the run ends, which wait for that."""
        try:
            yield
        except OtherProcessError:
            raise
        except BaseException as error:
            reason = f"{type(error).__name__}: {error}"
            if not self._is_under_way:
                self._meet(reason)
            elif self.leads:
                self._send(reason)
            raise
        if self.leads:
            self._send(_ENDED)

    def _meet(self, reason: str | None) -> None:
        """Wait until all have come as far, or failed; raises an OtherProcessError where another one failed."""
        reasons: list[Any] = [None] * len(self._ranks)
        distributed.all_gather_object(reasons, reason, group=self._group)
        failed = next((number for number, it in enumerate(reasons) if it), None)
        if failed is not None and reason is None:
            raise OtherProcessError(self._ranks[failed], reasons[failed])

    def _send(self, order: Any) -> Any:
        """Send what the leading process gives to all; returns what it gave."""
        self._sent = time.monotonic()
        orders = [order]
        distributed.broadcast_object_list(orders, src=self._first, group=self._group)
        return orders[0]


@final
class Follower(Sink):
    """Takes the place of a run in a process that stores nothing."""

    rows, stored_rows, nbytes = 1, 0, 0

    def begin(self, about: Mapping[str, Any]) -> None:
        """A block begins."""

    def write(self, step: Step) -> None:
        """Let go of a step: the leading process has the same one."""

    def end(self) -> None:
        """The run ends."""

    def close(self) -> None:
        """The block ends."""


_march: ContextVar[Alone] = ContextVar("activation_extractor_march", default=Alone())  # noqa: B039 - it has no state

current_march = _march.get


def marching(extract: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
    """`extract`, in which `current_march` is that of its model, and which tells the other processes how it ends."""

    @functools.wraps(extract)
    def run(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
        march = _march_of(args[0] if args else kwargs.get("model"), kwargs.get("share", "auto"))
        token = _march.set(march)
        try:
            with march.leading():
                return extract(*args, **kwargs)
        finally:
            _march.reset(token)

    return run


def _march_of(model: Any, share: Any) -> Alone:
    is_shared = isinstance(model, nn.Module) and (share == "auto" or isinstance(share, tuple | list))
    ranks = model_ranks(model) if is_shared else None
    return Alone() if ranks is None or len(ranks) < 2 else March(ranks, model_group(model, ranks))


def _on_host(value: Any) -> Any:
    """The value with tensors on the CPU, from where each process takes them to its device."""
    if isinstance(value, Tensor):
        return value.cpu()
    if isinstance(value, Mapping):
        return {name: _on_host(member) for name, member in value.items()}
    return type(value)(map(_on_host, value)) if type(value) in (tuple, list) else value
