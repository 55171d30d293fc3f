"""Where the sequence is in an activation."""

from __future__ import annotations

import pytest
import torch

from activation_extractor.errors import ArgumentError, ArgumentTypeError, SequenceAxisError
from activation_extractor.reducers._sequence_axis import (
    USUAL,
    Layout,
    check_sequence_axis,
    has_sequence,
    sequence_axes,
    sequence_second,
)

ROWS = "sequence_axis={'h.0': None} if each row is one position"


def ones(*shape: int) -> torch.Tensor:
    return torch.arange(torch.Size(shape).numel()).reshape(shape)


@pytest.mark.parametrize("axis", [None, 0, 1, -1, (2, 3), (1,), (-1, -2)])
def test_an_axis_is_an_integer_or_a_tuple_of_integers(axis):
    assert check_sequence_axis(axis) == axis


def test_a_list_of_axes_becomes_a_tuple():
    assert check_sequence_axis([2, 3]) == (2, 3)


@pytest.mark.parametrize(("axis", "shown"), [("1", "'1'"), (1.0, "1.0"), (True, "True"), ((1, "2"), "(1, '2')")])
def test_an_axis_of_another_type_is_an_error(axis, shown):
    with pytest.raises(ArgumentTypeError) as caught:
        check_sequence_axis(axis)
    assert str(caught.value) == f"sequence_axis must be an integer or a tuple of integers, got {shown}."


def test_a_truth_value_among_axes_is_an_error():
    with pytest.raises(ArgumentTypeError):
        check_sequence_axis((True, 2))


@pytest.mark.parametrize("axis", [(), (2, 2), []])
def test_axes_are_different_and_at_least_one(axis):
    with pytest.raises(ArgumentError) as caught:
        check_sequence_axis(axis)
    assert str(caught.value) == f"sequence_axis must name different axes, got {axis!r}. For images it is (2, 3)."
    assert check_sequence_axis((2, 3)) == (2, 3)


@pytest.mark.parametrize(
    ("shape", "axis", "expected"), [((2, 3, 4), None, True), ((2, 3), None, False), ((2, 3, 4, 5), None, False)]
)
def test_three_axes_have_a_sequence_and_others_when_it_is_named(shape, axis, expected):
    assert has_sequence(ones(*shape), Layout(axis)) is expected
    assert has_sequence(ones(*shape), Layout(1)) is True


def test_three_axes_are_taken_as_they_are():
    activation = ones(2, 3, 4)
    assert sequence_second("h.0", activation, USUAL) is activation
    assert sequence_second("h.0", activation, Layout(1)) is activation
    assert sequence_axes("h.0", activation, USUAL) == (1,)


@pytest.mark.parametrize(
    ("shape", "axis", "expected"),
    [
        ((3, 2, 4), 0, lambda x: x.transpose(0, 1)),
        ((2, 4, 3), -1, lambda x: x.transpose(1, 2)),
        ((2, 3), 1, lambda x: x),
        ((2, 5, 3, 4), 2, lambda x: x.permute(0, 2, 1, 3)),
        ((2, 5, 3, 4), (2, 3), lambda x: x.permute(0, 2, 3, 1).flatten(1, 2)),
        ((2, 5, 3, 4), (-2, -1), lambda x: x.permute(0, 2, 3, 1).flatten(1, 2)),
        ((2, 5, 3, 4), (3, 2), lambda x: x.permute(0, 3, 2, 1).flatten(1, 2)),
        ((2, 5, 3, 4, 6), (2, 3, 4), lambda x: x.permute(0, 2, 3, 4, 1).flatten(1, 3)),
        ((2, 3, 4), (1, 2), lambda x: x.flatten(1, 2)),
    ],
)
def test_the_sequence_comes_second_and_several_axes_are_one(shape, axis, expected):
    activation = ones(*shape)
    assert torch.equal(sequence_second("h.0", activation, Layout(axis)), expected(activation))


@pytest.mark.parametrize(("shape", "axis"), [((3, 2, 4), 0), ((2, 4, 3), -1), ((2, 5, 3, 4), 2)])
def test_one_axis_is_moved_without_a_copy(shape, axis):
    activation = ones(*shape)
    assert sequence_second("h.0", activation, Layout(axis)).data_ptr() == activation.data_ptr()
    assert sequence_axes("h.0", activation, Layout(axis)) == (axis % len(shape),)


@pytest.mark.parametrize("shape", [(), (2,), (2, 3), (2, 3, 4, 5)])
@pytest.mark.parametrize("ask", [sequence_second, sequence_axes])
def test_an_unknown_sequence_is_an_error_with_advice(ask, shape):
    with pytest.raises(SequenceAxisError) as caught:
        ask("h.0", ones(*shape), USUAL)
    assert str(caught.value) == (
        f"The activation of layer 'h.0' must have shape (batch, seq, features), got shape {shape}. "
        f"Pass {'sequence_axis= (for images (2, 3))' if len(shape) != 2 else ROWS}, or reduce='full'."
    )
    assert (caught.value.layer, caught.value.shape) == ("h.0", shape)


@pytest.mark.parametrize(
    ("shape", "axis"),
    [((2, 3, 4), 3), ((2, 3, 4), -4), ((2, 3, 4), (1, -2)), ((2, 3), (0, 1)), ((2,), 0), ((2, 3, 4), (1, 5))],
)
def test_an_axis_that_is_not_there_or_leaves_no_batch_is_an_error(shape, axis):
    with pytest.raises(SequenceAxisError) as caught:
        sequence_second("h.0", ones(*shape), Layout(axis))
    assert str(caught.value) == (
        f"The activation of layer 'h.0' must have the axes sequence_axis={axis!r} and one for the batch, "
        f"got shape {shape}. Name axes that it has."
    )
