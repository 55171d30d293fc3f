"""The options of a capture, checked at the door."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch

from activation_extractor.activations._recorded import Calls
from activation_extractor.errors import ArgumentError, ArgumentTypeError
from activation_extractor.reducers import Reducer, full
from activation_extractor.reducers._masks import check_mask
from activation_extractor.reducers._reducers import resolve_reducers
from activation_extractor.reducers._sequence_axis import SequenceAxis, check_sequence_axis

Missing = Literal["error", "skip"]


@dataclass(frozen=True)
class Options:
    """How a capture records; the public meaning of each is in `capture`'s docstring."""

    reducers: Mapping[str, Reducer]
    mask: Any
    sequence_axis: SequenceAxis
    calls: Calls
    stop_early: bool
    detach: bool
    copy: bool
    to: torch.device | None
    max_bytes: int | None
    missing: Missing
    has_sink: bool

    @property
    def needs_masks(self) -> bool:
        """Whether what is recorded is reduced, or stored without its padding."""
        return self.has_sink or any(reducer is not full for reducer in self.reducers.values())


def check_options(
    *,
    reduce: Any,
    mask: Any,
    sequence_axis: Any,
    calls: Any,
    stop_early: Any,
    detach: Any,
    copy: Any,
    to: Any,
    max_bytes: Any,
    missing: Any,
    has_sink: bool,
) -> Options:
    """The options, or an error that says which one is not usable."""
    check_mask(mask)
    _check_choice("calls", calls, get_args(Calls))
    _check_choice("missing", missing, get_args(Missing))
    for name, flag in (("stop_early", stop_early), ("detach", detach), ("copy", copy)):
        if not isinstance(flag, bool):
            raise ArgumentTypeError(name, "be True or False", flag)
    if max_bytes is not None and (not isinstance(max_bytes, int) or isinstance(max_bytes, bool) or max_bytes < 1):
        raise ArgumentError("max_bytes", "be a positive number of bytes or None", max_bytes)
    axis = check_sequence_axis(sequence_axis)
    if calls == "join" and isinstance(axis, tuple) and len(axis) > 1:
        raise ArgumentError("sequence_axis", "name one axis with calls='join'", axis)
    _check_sink(has_sink, detach=detach, copy=copy)
    return Options(
        reducers=resolve_reducers("full" if reduce is None else reduce),
        mask=mask,
        sequence_axis=axis,
        calls=calls,
        stop_early=stop_early,
        detach=detach,
        copy=copy,
        to=_device(to),
        max_bytes=max_bytes,
        missing=missing,
        has_sink=has_sink,
    )


def _check_choice(argument: str, value: Any, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ArgumentError(argument, f"be one of {', '.join(map(repr, choices))}", value)


def _check_sink(has_sink: bool, *, detach: bool, copy: bool) -> None:
    if has_sink and not copy:
        raise ArgumentError("copy", "stay True with a sink", copy, "A sink owns what it is given.")
    if has_sink and not detach:
        raise ArgumentError("detach", "stay True with a sink", detach, "A sink stores values, not graphs.")


def _device(to: Any) -> torch.device | None:
    if to is None:
        return None
    try:
        return torch.device(to)
    except (RuntimeError, TypeError) as error:
        raise ArgumentError("to", "be a device such as 'cpu' or 'cuda:0'", to) from error
