"""The options of a capture, checked at the door."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import InitVar, dataclass, field
from typing import Any, Literal, get_args

import torch

from activation_extractor.activations._recorded_values import Calls
from activation_extractor.errors import ArgumentError, ArgumentTypeError
from activation_extractor.reducers import Reducer, full
from activation_extractor.reducers._given_masks import check_mask
from activation_extractor.reducers._reducers import resolve_reducers
from activation_extractor.reducers._sequence_axis import check_joined, check_sequence_axis

Missing = Literal["error", "skip"]
Sharded = Literal["gather", "local"]
_CALLS, _MISSING, _SHARDED = (
    get_args(Calls),
    get_args(Missing),
    (None, *get_args(Sharded)),
)  # asking takes longer than all other checks of a block's options


@dataclass(kw_only=True, eq=False)
class Options:
    """How a capture records; the public meaning of each option is in `capture`'s docstring.

    Attributes:
        reducers: what ``reduce=`` means, by name.
        has_sink: whether steps go to a sink.

    Raises:
        ArgumentError: an option has a value that is of no use; the error says which.
    """

    reduce: InitVar[Any]
    mask: Any
    sequence_axis: Any
    calls: Calls
    stop_early: bool
    detach: bool
    copy: bool
    to: torch.device | None
    max_bytes: int | None
    missing: Missing
    sharded: Sharded | None
    has_sink: bool
    reducers: Mapping[str, Reducer] = field(init=False)

    def __post_init__(self, reduce: Any) -> None:
        check_mask(self.mask)
        chosen = ("calls", self.calls, _CALLS), ("missing", self.missing, _MISSING), ("sharded", self.sharded, _SHARDED)
        for name, choice, choices in chosen:
            if choice not in choices:
                raise ArgumentError(name, f"be one of {', '.join(map(repr, choices))}", choice)
        for name, flag in (("stop_early", self.stop_early), ("detach", self.detach), ("copy", self.copy)):
            if not isinstance(flag, bool):
                raise ArgumentTypeError(name, "be True or False", flag)
        _check_max_bytes(self.max_bytes)
        self.sequence_axis = check_sequence_axis(self.sequence_axis)
        if self.calls == "join":
            check_joined(self.sequence_axis)
        if self.has_sink and not self.copy:
            raise ArgumentError("copy", "stay True with a sink", self.copy, "A sink owns what it is given.")
        if self.has_sink and not self.detach:
            raise ArgumentError("detach", "stay True with a sink", self.detach, "A sink stores values, not graphs.")
        self.reducers = resolve_reducers("full" if reduce is None else reduce)
        self.to = _device(self.to)

    @property
    def needs_layouts(self) -> bool:
        """Whether it has to be known where the sequence is."""
        return self.needs_masks or self.calls == "join"

    @property
    def needs_masks(self) -> bool:
        """Whether what is recorded is reduced, or stored without its padding."""
        return self.has_sink or any(reducer is not full for reducer in self.reducers.values())


def _check_max_bytes(number: Any) -> None:
    if number is not None and (not isinstance(number, int) or isinstance(number, bool) or number < 1):
        raise ArgumentError("max_bytes", "be a positive number of bytes or None", number)


def _device(to: Any) -> torch.device | None:
    try:
        return None if to is None else torch.device(to)
    except (RuntimeError, TypeError) as error:
        raise ArgumentError("to", "be a device such as 'cpu' or 'cuda:0'", to) from error
