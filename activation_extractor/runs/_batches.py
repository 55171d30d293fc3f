"""Batches of a data set: taking their fields apart, and calling a model with the rest."""

from __future__ import annotations

import inspect
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

from torch import Tensor, nn

from activation_extractor._display import examples
from activation_extractor._format._stored_rows import RowId
from activation_extractor.errors import ArgumentError, ArgumentTypeError
from activation_extractor.layers._modules import unwrap
from activation_extractor.runs._batch_rows import Digests, count_rows, row_digests, take_rows
from activation_extractor.runs._padding import Padding
from activation_extractor.sinks._step import check_ids

Name = str | int  # of a field of a batch: its key in a mapping, its position in a tuple
Ids = Name | Callable[[Any], Any] | None
Keep = Name | Iterable[Name]


@dataclass(frozen=True)
class Batch:
    """A batch, taken apart."""

    arguments: Any  # of the model's call
    ids: list[RowId] | None
    places: Any  # of its rows in the data set, or None
    pooling_mask: Any  # which positions count, ``(batch, seq)``, or None
    keep: Mapping[str, Any]  # the columns to store as they are
    group: Any = None  # which windows of which rows its rows are, or None
    pooling: Mapping[str, Any] = field(default_factory=dict)  # what reducers are told of its rows, by field

    @cached_property
    def rows(self) -> int | None:
        """How many rows it has; None where that cannot be told."""
        named = next((it for it in (self.ids, self.places, self.pooling_mask) if it is not None), None)
        return count_rows(self.arguments) if named is None else len(named)

    @property
    def elements(self) -> int:
        """How many elements its largest tensor has; how many rows there are, where it has none."""
        members = self.arguments.values() if isinstance(self.arguments, Mapping) else self.arguments
        members = [members] if isinstance(members, Tensor) else members
        return max((member.numel() for member in members if isinstance(member, Tensor)), default=self.rows or 1)

    def part(self, rows: Sequence[int]) -> Batch:
        """Some of its rows, for a model that takes each by itself; raises what `take_rows` raises."""
        take = partial(take_rows, rows=self.rows or 0, chosen=rows)
        arguments = self.arguments
        taken = tuple(map(take, arguments)) if isinstance(arguments, tuple | list) else take(arguments)
        return Batch(taken, *map(take, (self.ids, self.places, self.pooling_mask, self.keep, self.group, self.pooling)))

    def alone(self, rows: Sequence[int]) -> tuple[Batch, Sequence[int]]:
        """Some of its rows, and where they are in what is returned: the batch itself, where it cannot be cut."""
        if len(rows) == self.rows:
            return self, rows
        try:
            return self.part(rows), range(len(rows))
        except ValueError:
            return self, rows

    @property
    def was_cut(self) -> bool:
        """Whether it was run in pieces that nobody else knows of."""
        return False

    def digests(self, rows: int, padding: Padding | None) -> Digests:
        """A digest of what each of its rows is made from, but for padding."""
        parts = padding.split(self.arguments, self.pooling_mask) if padding else [(self.arguments, None)]
        members = {"arguments": parts[0][0], "keep": self.keep, "pooling_mask": self.pooling_mask}
        members |= {"pooling": self.pooling} if self.pooling else {}
        digests = row_digests(members, rows, parts[0][1])
        return sum((row_digests({"decoder": part}, rows, mask) for part, mask in parts[1:]), digests)

    def relative_to(self, start: int, places: Sequence[int]) -> str:
        """A digest of the places of its rows, counted from `start`: the same for the same batch."""
        return f"{zlib.crc32(repr([place - start for place in places]).encode()):08x}"

    @property
    def inputs(self) -> tuple[Any, ...]:
        """What its rows in a store are made from; ids and places are compared by themselves."""
        more = [] if self.pooling_mask is None else [self.pooling_mask]
        return (self.arguments, self.keep, *more, *([self.pooling] if self.pooling else []))


class BatchFields:
    """The fields to take out of batches; the docstring of `extract` says what each of them is.

    Raises:
        ArgumentTypeError: a field is not a name.
    """

    def __init__(
        self,
        ids: Ids,
        keep: Any,
        order: str | None,
        pooling_mask: str | None,
        group: str | None = None,
        pooling: Iterable[str] = (),
    ) -> None:
        if ids is not None and not _is_name(ids) and not callable(ids):
            condition = "name a field of the batches, by its key or position, or be a callable that takes a batch"
            raise ArgumentTypeError("ids", condition, ids)
        names = [keep] if isinstance(keep, str) or not isinstance(keep, Iterable) else list(keep)
        if not all(map(_is_name, names)):
            raise ArgumentTypeError("keep", "name fields of the batches, by their keys or positions", keep)
        for argument, name in (("order", order), ("pooling_mask", pooling_mask), ("group", group)):
            if name is not None and not isinstance(name, str):
                raise ArgumentTypeError(argument, "name a field of the batches", name)
        self._ids, self._keep, self._order, self._pooling_mask = ids, sorted({*names}, key=str), order, pooling_mask
        self._group, self._pooling = group, sorted({*pooling})
        taken = (ids, order, pooling_mask, group, *self._pooling, *names)
        self.has_ids, self.has_order = ids is not None, order is not None
        self.has_row_names = any(field is not None for field in (ids, order, group))
        self._taken = {name for name in taken if _is_name(name)}

    @property
    def fingerprint(self) -> dict[str, Any]:
        """The fields that a run's values depend on."""
        ids = self._ids if _is_name(self._ids) else self._ids is not None
        named = {"order": self._order, "group": self._group}
        return {"ids": ids, "keep": self._keep, **{name: field for name, field in named.items() if field}}

    def split(self, batch: Any) -> Batch:
        """A batch, taken apart.

        Raises:
            ArgumentError: it lacks a field.
            ArgumentTypeError: it has no fields, or its ids are not strings or integers.
        """
        arguments, fields = batch, dict[Any, Any]()
        if self._taken:
            fields = _fields(batch)
            for name in sorted(self._taken, key=str):
                if name not in fields:
                    named = "ids=, keep=, order=, pooling_mask=, group=" + ", weights= and spans" * bool(self._pooling)
                    advice = f"Check {named}; a field of a tuple is named by its position."
                    raise ArgumentError("a batch", f"hold the field {name!r}", list(fields), advice)
            others = {name: value for name, value in fields.items() if name not in self._taken}
            arguments = others if isinstance(batch, Mapping) else tuple(others.values())
        ids = self._ids(batch) if callable(self._ids) else None if self._ids is None else fields[self._ids]
        return Batch(
            arguments=arguments,
            ids=check_ids(ids),
            places=fields[self._order] if self._order else None,
            pooling_mask=fields[self._pooling_mask] if self._pooling_mask else None,
            keep={str(name): fields[name] for name in self._keep},
            group=fields[self._group] if self._group else None,
            pooling={name: fields[name] for name in self._pooling},
        )


def _is_name(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, int) and not isinstance(value, bool) and value >= 0)


def _fields(batch: Any) -> dict[Any, Any]:
    if isinstance(batch, Mapping):
        return dict(batch.items())
    if isinstance(batch, tuple | list):
        return dict(enumerate(batch))
    what = "a batch with ids, keep, order, pooling_mask or group"
    raise ArgumentTypeError(what, "be a mapping or a tuple", type(batch).__name__)


def call_model(model: nn.Module, batch: Any, device: Any, *, copy: bool = False) -> None:
    """Call a model with a batch, whose tensors are moved to a device, unless that is None; or with copies of them.

    Raises:
        ArgumentTypeError: the batch is neither a mapping, a tuple nor a tensor, or not what the model takes.
    """

    def moved(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        there = value if device is None else value.to(device)
        return there.clone() if copy and there is value else there

    positional: list[Any] = []
    named: dict[str, Any] = {}
    if isinstance(batch, Mapping):
        named = {name: moved(value) for name, value in batch.items()}
    elif isinstance(batch, tuple | list):
        positional = list(map(moved, batch))
    elif isinstance(batch, Tensor):
        positional = [moved(batch)]
    else:
        raise ArgumentTypeError("a batch", "be a mapping, a tuple or a tensor", type(batch).__name__)
    try:
        model(*positional, **named)
    except TypeError as error:
        _check_fit(unwrap(model), positional, named, error)
        raise


def _check_fit(model: nn.Module, positional: Sequence[Any], named: Mapping[str, Any], error: TypeError) -> None:
    """Raise an ArgumentTypeError where a model does not take these arguments, which led to `error`."""
    try:
        signature = inspect.signature(model.forward)
    except (TypeError, ValueError):  # a forward that is not written in Python
        return
    try:
        signature.bind(*positional, **named)
    except TypeError as reason:
        got = list(named) or f"a tuple of {len(positional)}"
        why = str(reason)[:1].upper() + str(reason)[1:]
        advice = f"{why}. Rename fields, or take out what is no argument: keep=1 stores the label of pairs (x, label)."
        condition = f"hold what {type(model).__name__}.forward takes ({examples(signature.parameters)})"
        raise ArgumentTypeError("a batch", condition, got, advice) from error
