"""Patterns of layer names."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from models import BlockStack

from activation_extractor.errors import ArgumentError
from activation_extractor.layers._patterns import glob
from activation_extractor.layers._selections import resolve


@pytest.mark.parametrize(
    ("pattern", "fitting", "other"),
    [
        ("*", "a abc _0", "a.b"),
        ("a*", "a ab abc", "a.b ba"),
        ("?", "a 0", "ab . a.b"),
        ("h.?", "h.0", "h.10 h. hx0"),
        ("h.[0-2]", "h.0 h.2", "h.3 h.01"),
        ("h.[!0-2]", "h.3 h.a", "h.0"),
        ("h.1[02]", "h.10 h.12", "h.1 h.11"),
        ("**", "a a.b a.b.c", ""),
        ("**.mlp", "mlp a.mlp a.b.mlp", "amlp a.mlpx"),
        ("h.**.mlp", "h.mlp h.0.mlp h.0.x.mlp", "hmlp x.h.mlp"),
        ("h.**", "h.0 h.0.mlp", "h hx"),
        ("a+(b)", "a+(b)", "aab aa(b)"),
        ("a.b", "a.b", "axb"),
    ],
)
def test_a_pattern_fits_whole_names(pattern, fitting, other):
    assert [name for name in fitting.split() if not glob(pattern).fullmatch(name)] == []
    assert [name for name in other.split() if glob(pattern).fullmatch(name)] == []


def test_a_negated_set_stays_within_a_segment():
    assert not glob("h[!x]0").fullmatch("h.0")


def test_a_bracket_in_a_set_is_a_bracket():
    assert glob("a[[]").fullmatch("a[")


@pytest.mark.parametrize("pattern", ["h.[9-0]"])
def test_a_malformed_pattern_is_an_error(pattern):
    with pytest.raises(ArgumentError) as caught:
        resolve(BlockStack(1), pattern)
    assert str(caught.value).startswith(f"a pattern in layers must be well formed, got {pattern!r}. In it: ")


SEGMENTS = st.lists(st.text("ab01_", min_size=1, max_size=4), min_size=1, max_size=4)


@settings(deadline=None, max_examples=60)
@given(SEGMENTS, st.data())
def test_a_name_fits_itself_and_its_generalisations(segments, data):
    index = data.draw(st.integers(0, len(segments) - 1))
    name = ".".join(segments)
    one = ".".join([*segments[:index], "*", *segments[index + 1 :]])
    assert glob(name).fullmatch(name)
    assert glob(one).fullmatch(name)
    assert not glob(one).fullmatch(f"{name}.more")
    assert glob(".".join([*segments[:index], "**", *segments[index:]])).fullmatch(name)
    assert glob("**").fullmatch(name)
