"""Windows of rows that are longer than a model takes."""

from __future__ import annotations

import math
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from activation_extractor import windows
from activation_extractor.errors import ArgumentError, ArgumentTypeError

LENGTHS = st.lists(st.integers(0, 60), max_size=12)
SIZES = st.integers(1, 20).flatmap(lambda size: st.tuples(st.just(size), st.none() | st.integers(1, size)))


def context(window, position: int, length: int) -> float:
    """How far a position is from where a window cuts its row; the ends of the row are no cuts."""
    before = position - window.start if window.start else math.inf
    after = window.stop - 1 - position if window.stop < length else math.inf
    return min(before, after)


@given(lengths=LENGTHS, options=SIZES)
def test_what_windows_own_is_each_row_once_and_in_order(lengths, options):
    made = windows(lengths, size=options[0], stride=options[1])
    assert [window.row for window in made] == sorted(window.row for window in made)
    for row, length in enumerate(lengths):
        of_row = [window for window in made if window.row == row]
        owned = [position for window in of_row for position in range(window.own_start, window.own_stop)]
        assert owned == list(range(length))
        assert [window.number for window in of_row] == list(range(len(of_row)))
        assert {window.count for window in of_row} == {len(of_row)}


@given(lengths=LENGTHS, options=SIZES)
def test_each_position_is_owned_by_the_window_that_has_most_around_it_and_by_the_earlier_of_two(lengths, options):
    made = windows(lengths, size=options[0], stride=options[1])
    for row, length in enumerate(lengths):
        of_row = [window for window in made if window.row == row]
        for position in range(length):
            seeing = [window for window in of_row if window.start <= position < window.stop]
            best = max(seeing, key=lambda window: (context(window, position, length), -window.number))
            assert best.own_start <= position < best.own_stop


@given(lengths=LENGTHS, options=SIZES)
def test_windows_of_a_long_row_are_all_of_the_full_size_and_none_owns_nothing(lengths, options):
    size, stride = options[0], options[1] or max(1, options[0] // 2)
    for window in windows(lengths, size=size, stride=options[1]):
        length = lengths[window.row]
        assert window.length == window.stop - window.start == min(size, length)
        assert window.start <= window.own_start <= window.own_stop <= window.stop
        assert window.own_start < window.own_stop or not length
        assert window.start == window.number * stride or window.number == window.count - 1
        assert window.count == max(1, 1 - (-(length - size) // stride))


@given(length=st.integers(0, 60), options=SIZES, before=st.integers(0, 2), after=st.integers(0, 2))
def test_what_counts_of_the_inputs_of_all_windows_is_the_row_with_its_special_tokens(length, options, before, after):
    row = list(range(length))
    seen, without = [], []
    for window in windows([length], size=options[0], stride=options[1]):
        tokens = ["CLS"] * before + row[window.start : window.stop] + ["SEP"] * after
        seen += tokens[window.owns(before=before, after=after)]
        without += tokens[window.owns(before=before, after=after, counts_special=False)]
    assert seen == ["CLS"] * before + row + ["SEP"] * after
    assert without == row


def test_the_windows_of_a_row_of_ten():
    made = windows([10, 3], size=6)
    assert [(window.start, window.stop, window.own_start, window.own_stop) for window in made] == [
        (0, 6, 0, 5),
        (3, 9, 5, 7),
        (4, 10, 7, 10),
        (0, 3, 0, 3),
    ]
    assert [(window.row, window.number, window.count) for window in made] == [
        (0, 0, 3),
        (0, 1, 3),
        (0, 2, 3),
        (1, 0, 1),
    ]


def test_a_row_without_positions_is_one_window_without_positions():
    (window,) = windows([0], size=4)
    assert (window.start, window.stop, window.number, window.count, window.owns()) == (0, 0, 0, 1, slice(0, 0))
    assert window.owns(before=1, after=1) == slice(0, 2)


@pytest.mark.parametrize("lengths", [torch.tensor([5, 9]), np.array([5, 9]), (5.0, 9), iter([5, 9])])
def test_lengths_may_be_numbers_of_any_kind(lengths):
    assert windows(lengths, size=4, stride=4) == windows([5, 9], size=4, stride=4)


def test_windows_can_be_compared_sent_to_workers_and_kept_in_sets():
    made = windows([50], size=10)
    assert pickle.loads(pickle.dumps(made)) == made
    assert len({*made, *windows([50], size=10)}) == len(made)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"size": 0}, r"size must be a positive integer, got 0\."),
        ({"size": 2.5}, r"size must be a positive integer, got 2\.5\."),
        ({"size": 4, "stride": 0}, r"stride must be a positive integer, got 0\."),
        (
            {"size": 4, "stride": 5},
            r"stride must be at most size=4, got 5\. Positions between windows would be left out",
        ),
    ],
)
def test_an_option_that_cannot_be_is_an_error(options, text):
    with pytest.raises(ArgumentError, match=text):
        windows([1], **options)


def test_a_length_that_cannot_be_is_an_error():
    with pytest.raises(ArgumentError, match=r"a length must not be negative, got -1\."):
        windows([1, -1], size=4)
    with pytest.raises(ArgumentTypeError, match=r"a length must be an integer, got 1\.5\."):
        windows([1.5], size=4)


def test_special_tokens_that_cannot_be_are_an_error():
    (window,) = windows([3], size=4)
    with pytest.raises(ArgumentError, match=r"before must be a number of tokens, 0 or more, got -1\."):
        window.owns(before=-1)
