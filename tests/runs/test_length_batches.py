"""Batches of rows of similar length."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from activation_extractor import length_batches
from activation_extractor.errors import ArgumentError, ArgumentTypeError

LENGTHS = st.lists(st.integers(0, 40), max_size=60)


@given(lengths=LENGTHS, size=st.integers(1, 9), window=st.integers(1, 20))
def test_each_row_comes_once_and_windows_keep_their_order(lengths, size, window):
    batches = length_batches(lengths, batch_size=size, window_rows=window)
    rows = [row for batch in batches for row in batch]
    assert sorted(rows) == list(range(len(lengths)))
    assert [row // window for row in rows] == sorted(row // window for row in rows)
    assert all(1 <= len(batch) <= size for batch in batches)
    for batch in batches:
        assert len({row // window for row in batch}) == 1
        assert [lengths[row] for row in batch] == sorted((lengths[row] for row in batch), reverse=True)


@given(lengths=LENGTHS, tokens=st.integers(1, 100), size=st.none() | st.integers(1, 5))
def test_a_batch_has_no_more_tokens_than_allowed_padding_counted_but_for_one_long_row(lengths, tokens, size):
    batches = length_batches(lengths, max_tokens=tokens, batch_size=size)
    for batch, following in zip(batches, [*batches[1:], []], strict=False):
        longest = max(lengths[row] for row in batch)
        assert len(batch) * longest <= tokens or len(batch) == 1
        is_full = (len(batch) + 1) * longest > tokens or len(batch) == size
        assert is_full or not following


def test_batches_of_similar_rows_waste_less_than_batches_in_order():
    lengths = [3, 90, 4, 80, 5, 85, 2, 95] * 8

    def padded(batches):
        return sum(len(batch) * max(lengths[row] for row in batch) for batch in batches)

    in_order = [list(range(start, start + 8)) for start in range(0, len(lengths), 8)]
    assert padded(length_batches(lengths, batch_size=8)) < 0.6 * padded(in_order)


def test_no_rows_are_no_batches():
    assert length_batches([], max_tokens=4) == []


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({}, r"batch_size or max_tokens must be given, got None\."),
        ({"batch_size": 0}, r"batch_size must be a positive integer, got 0\."),
        ({"max_tokens": 2.5}, r"max_tokens must be a positive integer, got 2\.5\."),
        ({"batch_size": True}, r"batch_size must be a positive integer, got True\."),
        ({"batch_size": 1, "window_rows": -1}, r"window_rows must be a positive integer, got -1\."),
    ],
)
def test_an_option_that_cannot_be_is_an_error(options, text):
    with pytest.raises(ArgumentError, match=text):
        length_batches([1], **options)


def test_a_length_that_cannot_be_is_an_error():
    with pytest.raises(ArgumentError, match=r"a length must not be negative, got -1\."):
        length_batches([1, -1], batch_size=1)
    with pytest.raises(ArgumentTypeError, match=r"a length must be an integer, got 1\.5\."):
        length_batches([1.5], batch_size=1)
