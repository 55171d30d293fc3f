"""Where the sequence is in an activation."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from activation_extractor.errors import ArgumentError, ArgumentTypeError, SequenceAxisError

SequenceAxis = int | tuple[int, ...] | None


def check_sequence_axis(axis: Any) -> SequenceAxis:
    """`axis`, a list of integers as a tuple.

    Raises:
        ArgumentTypeError: it is no integer, no tuple or list of integers, and not None.
        ArgumentError: it names no axis, or one twice.
    """
    if axis is None:
        return None
    indices = axis if isinstance(axis, tuple | list) else (axis,)
    if not all(isinstance(index, int) and not isinstance(index, bool) for index in indices):
        raise ArgumentTypeError("sequence_axis", "be an integer or a tuple of integers", axis)
    if not indices or len(set(indices)) != len(indices):
        raise ArgumentError("sequence_axis", "name different axes", axis, "For images it is (2, 3).")
    return axis if isinstance(axis, int) else tuple(axis)


def has_sequence(activation: Tensor, axis: SequenceAxis) -> bool:
    """Whether an activation has a known sequence: three axes, or an axis that the user named."""
    return axis is not None or activation.dim() == 3


def sequence_second(layer: str, activation: Tensor, axis: SequenceAxis) -> Tensor:
    """The activation as ``(batch, seq, *features)``: a view where possible, several sequence axes made one.

    Raises:
        SequenceAxisError: other than three axes and none named, or one named that it does not have.
    """
    axes = sequence_axes(layer, activation, axis)
    if axes == (1,):
        return activation
    moved = activation.movedim(axes, tuple(range(1, 1 + len(axes))))
    return moved.flatten(1, len(axes)) if len(axes) > 1 else moved


def sequence_axes(layer: str, activation: Tensor, axis: SequenceAxis) -> tuple[int, ...]:
    """The axes that are the sequence, counted from 0; 1 for three axes unless the user names others.

    Raises:
        SequenceAxisError: as for `sequence_second`.
    """
    dim = activation.dim()
    if axis is None:
        if dim != 3:
            advice = "Pass sequence_axis= (for images (2, 3)), or reduce='full'."
            raise SequenceAxisError(layer, activation.shape, "have shape (batch, seq, features)", advice)
        return (1,)
    indices = axis if isinstance(axis, tuple) else (axis,)
    axes = tuple(index + dim if index < 0 else index for index in indices)
    if any(not 0 <= index < dim for index in axes) or len(set(axes)) != len(axes) or dim <= len(axes):
        condition = f"have the axes sequence_axis={axis!r} and one for the batch"
        raise SequenceAxisError(layer, activation.shape, condition, "Name axes that it has.")
    return axes
