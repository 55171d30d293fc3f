"""Where the sequence is in an activation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor

from activation_extractor._tensors import sequence_shape
from activation_extractor.errors import ArgumentError, ArgumentTypeError, SequenceAxisError

SequenceAxis = int | tuple[int, ...] | None
SequenceAxes = SequenceAxis | Mapping[str, SequenceAxis]


class Layout(NamedTuple):
    """Where the sequence is in the activations of one layer.

    Attributes:
        axis: the axis or axes that the user named; None where the user named none.
        of_three: the axis of the sequence in an activation of three axes, where the user named none.
        form: the shape that the layer's module is documented to return, ``(time, batch, features)``; None where the
            number of its axes is not known.
        doubt: why it is not known which axis of three is the sequence; None where it is.
        lacks_sequence: whether each row is one position: the user named None.
    """

    axis: SequenceAxis = None
    of_three: int = 1
    form: str | None = None
    doubt: str | None = None
    lacks_sequence: bool = False

    @property
    def is_usual(self) -> bool:
        """Whether an activation of three axes is ``(batch, seq, features)`` as it stands."""
        axis = self.of_three if self.axis is None else self.axis
        return axis == 1 and self.doubt is None and not self.lacks_sequence and self.form != IMAGE


IMAGE = "(batch, channels, height, width)"
USUAL = Layout()


def check_sequence_axis(axis: Any) -> Any:
    """`axis`, a list of integers as a tuple; in a dict from layer patterns each value so.

    Raises:
        ArgumentTypeError: it is no integer, no tuple or list of integers, no dict from patterns to these or None, and
            not None.
        ArgumentError: it names no axis, or one twice.
    """
    if isinstance(axis, Mapping):
        for pattern, value in axis.items():
            if not isinstance(pattern, str) or isinstance(value, Mapping):
                condition = "map layer patterns to integers, tuples of integers or None"
                advice = "Write it as {'conv*': (2, 3), 'fc': None}."
                raise ArgumentTypeError("sequence_axis", condition, {pattern: value}, advice)
        return {pattern: check_sequence_axis(value) for pattern, value in axis.items()}
    if axis is None:
        return None
    indices = axis if isinstance(axis, tuple | list) else (axis,)
    if not all(isinstance(index, int) and not isinstance(index, bool) for index in indices):
        raise ArgumentTypeError("sequence_axis", "be an integer or a tuple of integers", axis)
    if not indices or len(set(indices)) != len(indices):
        raise ArgumentError("sequence_axis", "name different axes", axis, "For images it is (2, 3).")
    return axis if isinstance(axis, int) else tuple(axis)


def check_joined(axis: Any) -> None:
    """Refuse a checked ``sequence_axis=`` that does not name one axis to join calls along.

    Raises:
        ArgumentError: it names several axes, or None for a pattern.
    """
    axes = [*axis.values()] if isinstance(axis, Mapping) else [0 if axis is None else axis]
    if any(one is None or (isinstance(one, tuple) and len(one) > 1) for one in axes):
        raise ArgumentError("sequence_axis", "name one axis with calls='join'", axis)


def has_sequence(activation: Tensor, layout: Layout) -> bool:
    """Whether an activation has a sequence, or should have one: three axes, or an axis that is known."""
    if activation.is_nested:
        return True
    if layout.lacks_sequence or layout.axis is not None:
        return not layout.lacks_sequence
    return activation.dim() == 3 or not _has_form(activation, layout)


def sequence_second(layer: str, activation: Tensor, layout: Layout) -> Tensor:
    """The activation as ``(batch, seq, *features)``: a view where possible, several sequence axes made one.

    Raises:
        SequenceAxisError: the axis is not known, or one that the activation does not have.
    """
    if activation.is_nested and layout.axis in (None, 1, (1,)) and not layout.lacks_sequence:
        return activation  # its rows are the sequences, which no module's layout changes
    if activation.is_nested:
        condition = "have its sequence in axis 1, as a nested tensor has"
        raise SequenceAxisError(layer, sequence_shape(activation), condition, "Leave sequence_axis= out.")
    if layout.lacks_sequence:
        return activation.unsqueeze(1)
    axes = sequence_axes(layer, activation, layout)
    if axes == (1,):
        return activation
    moved = activation.movedim(axes, tuple(range(1, 1 + len(axes))))
    return moved.flatten(1, len(axes)) if len(axes) > 1 else moved


def sequence_axes(layer: str, activation: Tensor, layout: Layout) -> tuple[int, ...]:
    """The axes that are the sequence, counted from 0; 1 for three axes unless the layout says otherwise.

    Raises:
        SequenceAxisError: as for `sequence_second`.
    """
    dim, axis = activation.dim(), layout.axis
    if axis is None:
        _check_known(layer, activation, layout)
        return (layout.of_three,)
    indices = axis if isinstance(axis, tuple) else (axis,)
    axes = tuple(index + dim if index < 0 else index for index in indices)
    if any(not 0 <= index < dim for index in axes) or len(set(axes)) != len(axes) or dim <= len(axes):
        condition = f"have the axes sequence_axis={axis!r} and one for the batch"
        raise SequenceAxisError(layer, activation.shape, condition, "Name axes that it has.")
    return axes


def check_batch_first(layer: str, sequence: Tensor, layout: Layout, rows: int | None) -> None:
    """Refuse an activation of an assumed layout that has the rows of the batch second, and others first.

    Raises:
        SequenceAxisError: it has.
    """
    if rows is None or layout != USUAL or sequence.is_nested:
        return
    if sequence.shape[0] != rows == sequence.shape[1]:
        advice = f"Pass sequence_axis={{{layer!r}: 0}}, or 1 where it is (batch, seq, features)."
        raise SequenceAxisError(layer, sequence.shape, f"have the {rows} rows of the batch first", advice)


def _has_form(activation: Tensor, layout: Layout) -> bool:
    return layout.form is None or activation.dim() == layout.form.count(",") + 1


def _check_known(layer: str, activation: Tensor, layout: Layout) -> None:
    """Raise SequenceAxisError unless the layout says which axis of this activation is the sequence."""
    none = f"sequence_axis={{{layer!r}: None}} if each row is one position"
    if not _has_form(activation, layout):
        condition, advice = f"have shape {layout.form}", f"Call the model with a batch, or pass {none}."
    elif activation.dim() != 3:
        condition = "have shape (batch, seq, features)"
        axes = none if activation.dim() == 2 else "sequence_axis= (for images (2, 3))"
        advice = f"Pass {axes}, or reduce='full'."
    elif layout.doubt is not None:
        condition = f"have a sequence axis that is known, and is {layout.doubt}"
        advice = f"Pass sequence_axis={{{layer!r}: {layout.of_three}}}, or 1 where it is (batch, seq, features)."
    else:
        return
    raise SequenceAxisError(layer, activation.shape, condition, advice)
