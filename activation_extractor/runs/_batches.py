"""Batches of a data set: taking their fields apart, and calling a model with the rest."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from activation_extractor._format._stored_rows import RowId
from activation_extractor.errors import ArgumentError, ArgumentTypeError
from activation_extractor.sinks._step import check_ids

Ids = str | Callable[[Any], Any] | None


@dataclass(frozen=True)
class Batch:
    """A batch, taken apart."""

    arguments: Any  # of the model's call
    ids: list[RowId] | None
    places: Any  # of its rows in the data set, or None
    pooling_mask: Any  # which positions count, ``(batch, seq)``, or None
    keep: Mapping[str, Any]  # the columns to store as they are

    @property
    def inputs(self) -> tuple[Any, ...]:
        """What its rows in a store are made from; ids and places are compared by themselves."""
        return (self.arguments, self.keep, *([] if self.pooling_mask is None else [self.pooling_mask]))


class BatchFields:
    """The fields to take out of batches; the docstring of `extract` says what each of them is.

    Raises:
        ArgumentTypeError: a field is not a name.
    """

    def __init__(self, ids: Ids, keep: Any, order: str | None, pooling_mask: str | None) -> None:
        if ids is not None and not isinstance(ids, str) and not callable(ids):
            raise ArgumentTypeError("ids", "name a field of the batches, or be a callable that takes a batch", ids)
        names = [keep] if isinstance(keep, str) else list(keep) if isinstance(keep, Iterable) else [keep]
        if not all(isinstance(name, str) for name in names):
            raise ArgumentTypeError("keep", "name fields of the batches", keep)
        for argument, name in (("order", order), ("pooling_mask", pooling_mask)):
            if name is not None and not isinstance(name, str):
                raise ArgumentTypeError(argument, "name a field of the batches", name)
        self._ids, self._keep, self._order, self._pooling_mask = ids, sorted({*names}), order, pooling_mask
        self._taken = {name for name in (ids, order, pooling_mask, *names) if isinstance(name, str)}

    @property
    def fingerprint(self) -> dict[str, Any]:
        """The fields that a run's values depend on."""
        ids = self._ids if isinstance(self._ids, str) else self._ids is not None
        return {"ids": ids, "keep": self._keep, **({"order": self._order} if self._order else {})}

    def split(self, batch: Any) -> Batch:
        """A batch, taken apart.

        Raises:
            ArgumentError: it lacks a field.
            ArgumentTypeError: it is not a mapping, or its ids are not strings or integers.
        """
        arguments = batch
        if self._taken:
            if not isinstance(batch, Mapping):
                what = "a batch with ids, keep, order or pooling_mask"
                raise ArgumentTypeError(what, "be a mapping", type(batch).__name__)
            for name in sorted(self._taken):
                if name not in batch:
                    advice = "Check ids=, keep=, order= and pooling_mask=."
                    raise ArgumentError("a batch", f"hold the field {name!r}", list(batch), advice)
            arguments = {name: value for name, value in batch.items() if name not in self._taken}
        ids = self._ids(batch) if callable(self._ids) else batch[self._ids] if self._ids else None
        return Batch(
            arguments=arguments,
            ids=check_ids(ids),
            places=batch[self._order] if self._order else None,
            pooling_mask=batch[self._pooling_mask] if self._pooling_mask else None,
            keep={name: batch[name] for name in self._keep},
        )


def call_model(model: nn.Module, batch: Any, device: Any) -> None:
    """Call a model with a batch, whose tensors are moved to a device, unless that is None.

    Raises:
        ArgumentTypeError: the batch is neither a mapping, a tuple nor a tensor.
    """

    def moved(value: Any) -> Any:
        return value.to(device) if isinstance(value, Tensor) and device is not None else value

    if isinstance(batch, Mapping):
        model(**{name: moved(value) for name, value in batch.items()})
    elif isinstance(batch, tuple | list):
        model(*map(moved, batch))
    elif isinstance(batch, Tensor):
        model(moved(batch))
    else:
        raise ArgumentTypeError("a batch", "be a mapping, a tuple or a tensor", type(batch).__name__)
