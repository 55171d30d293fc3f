"""Layers that are combined as one column: what is recorded of each, and how it is put together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from activation_extractor._display import dtype_name
from activation_extractor._tensors import as_dense
from activation_extractor.errors import CombinationError, TensorKindError
from activation_extractor.layers._selections import Combination, Target
from activation_extractor.reducers import Reducer, full
from activation_extractor.reducers._reducers import _FEW_OPERATIONS, is_linear, owns_result
from activation_extractor.reducers._sequence_axis import Layout, sequence_axes

WHOLE = ""  # in place of a reducer's name: a member's whole activation, which is reduced once it is combined


def comes_first(reducer: Reducer, combination: Combination) -> bool:
    """Whether each member may be reduced by itself: what is combined of that is the combined activation's reduction.

    All reducers of the library treat each feature by itself, so that features may as well be put side by side later.
    The mean of layers may come later behind what is linear, but for rounding: not behind a maximum.
    """
    return is_linear(reducer) if combination.how == "mean" else owns_result(reducer) and reducer is not full


def recorded_reducers(target: Target, reducers: Mapping[str, Reducer]) -> Mapping[str, Reducer]:
    """The reducers with which a target is recorded, by name; of one that is combined those that come first."""
    combination = target.part_of
    if combination is None:
        return reducers
    first = {name: reducer for name, reducer in reducers.items() if comes_first(reducer, combination)}
    return first if len(first) == len(reducers) else {**first, WHOLE: full}


def combine(members: Sequence[Target], values: Sequence[Tensor], axes: Sequence[Any]) -> Tensor:
    """The mean of the members' values, or their features side by side; in memory of its own.

    A mean is accumulated in at least float32 and comes in the values' dtype, that of integers and bools in float32.
    `axes` are those of the members' features; for a mean, of their sequences, as far as they are known.

    Raises:
        CombinationError: values differ in dtype or shape.
        TensorKindError: one is nested.
    """
    combination = members[0].part_of
    assert combination is not None
    for member, value in zip(members, values, strict=True):
        if value.is_nested:
            advice = "Combine reduced layers, or reduce them in a reducer of your own."
            raise TensorKindError("a nested tensor", advice, member.layer, f"to be combined as {combination.name!r}")
    dense = [as_dense(value).to(values[0].device) for value in values]
    _check_alike(combination, members, dense, axes)
    dtype = dense[0].dtype
    if combination.how == "concat":
        if dtype in _FEW_OPERATIONS and dtype.is_floating_point:  # a float8
            return torch.cat([value.view(torch.uint8) for value in dense], axes[0]).view(dtype)
        return torch.cat(dense, axes[0])
    is_inexact = dtype.is_floating_point or dtype.is_complex
    sum_dtype = torch.promote_types(_FEW_OPERATIONS.get(dtype, dtype), torch.float32) if is_inexact else torch.float32
    total = dense[0].to(sum_dtype)
    for value in dense[1:]:
        total = total + value.to(sum_dtype)
    return (total / len(dense)).to(dtype if is_inexact else sum_dtype)


def check_calls(name: str, members: Sequence[Target], calls: Sequence[Sequence[Tensor]]) -> None:
    """Raise a CombinationError unless members ran equally often."""
    counts = list(map(len, calls))
    if len(set(counts)) > 1:
        other = next(index for index, count in enumerate(counts) if count != counts[0])
        got = f"{counts[0]} calls of {members[0].layer!r} and {counts[other]} of {members[other].layer!r}"
        raise CombinationError(name, "run equally often", got)


def mask_of_all(members: Sequence[Target], masks: Sequence[Tensor | None]) -> Tensor | None:
    """The mask that all members have in a call; None where every position is real.

    Raises:
        CombinationError: one has another mask.
    """
    first = masks[0]
    for member, mask in zip(members, masks, strict=True):
        is_same = mask is first or (mask is not None and first is not None and torch.equal(mask, first.to(mask.device)))
        if not is_same:
            name = member.part_of.name if member.part_of else ""
            got = f"others in {member.layer!r} than in {members[0].layer!r}"
            raise CombinationError(name, "have the same real positions", got)
    return first


def _check_alike(
    combination: Combination, members: Sequence[Target], values: Sequence[Tensor], axes: Sequence[Any]
) -> None:
    """Raise a CombinationError unless values have one dtype, and one shape but for their features side by side."""
    along = axes[0] if combination.how == "concat" else None
    shapes = [tuple(size for axis, size in enumerate(value.shape) if axis != along) for value in values]
    ranks = [value.dim() for value in values]
    kinds: dict[str, Sequence[Any]] = {
        "dtype": [dtype_name(value.dtype) for value in values],
        "number of axes": ranks,
        "axis of the sequence" if along is None else "axis of features": list(axes),
        "shape" if along is None else "shape but for features": [tuple(value.shape) for value in values],
    }
    keys = {**kinds, [*kinds][-1]: shapes}
    for kind, found in keys.items():
        other = next((index for index, one in enumerate(found) if one != found[0]), None)
        if other is not None:
            shown, layers = kinds[kind], [member.layer for member in members]
            got = f"{shown[0]} of {layers[0]!r} and {shown[other]} of {layers[other]!r}"
            raise CombinationError(combination.name, f"have one {kind}", got)
    if along is not None and not 0 < along < ranks[0]:
        raise CombinationError(combination.name, "have features", f"shape {tuple(values[0].shape)}")


def axis_of(member: Target, value: Tensor, layout: Layout, *, is_reduced: bool) -> Any:
    """Where the features of a member's value are, for a mean where its sequence is.

    Raises:
        SequenceAxisError: where its sequence is has to be known, and is not.
    """
    if member.part_of is not None and member.part_of.how == "mean":
        return None if is_reduced else layout.of_three if layout.axis is None else layout.axis
    if is_reduced or layout.lacks_sequence or value.dim() < 3:
        return value.dim() - 1
    sequence = sequence_axes(member.layer, value, layout)
    others = [axis for axis in range(value.dim()) if axis not in sequence]
    return others[-1] if len(others) > 1 else -1
