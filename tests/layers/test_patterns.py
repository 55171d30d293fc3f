"""Patterns of layer names."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from models import BlockStack

from activation_extractor.errors import ArgumentError
from activation_extractor.layers._patterns import Patterns, fill, glob
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
        ("h.[a-c]", "h.a h.c", "h.d h.ab"),
        ("h.[a-f0-9]", "h.a h.9", "h.g h.12"),
        ("h[0-9]", "h0 h9", "h12 h"),
        ("h.[10-15]", "h.10 h.12 h.15", "h.0 h.1 h.5 h.9 h.16 h.100 h.1a"),
        ("h.[0-11]", "h.0 h.9 h.10 h.11", "h.12 h.110"),
        ("h.[8-11]", "h.8 h.9 h.10 h.11", "h.1 h.7 h.12"),
        ("h.[95-1204]", "h.95 h.100 h.999 h.1000 h.1204", "h.94 h.1205 h.9 h.9500"),
        ("h.[09-11]", "h.09 h.9 h.10 h.11", "h.0 h.1 h.12"),
        ("h.[0-3,7]", "h.0 h.3 h.7", "h.4 h.12 h.37"),
        ("h.[0-3, 10 - 12]", "h.0 h.11", "h.4 h.13"),
        ("h.[1,12]", "h.1 h.12", "h.2 h.112"),
        ("h.[!10-12]", "h.1 h.9 h.13 h.100", "h.10 h.11 h.12 h.x h."),
        ("h.[!0-3,7]", "h.4 h.10 h.37", "h.0 h.7"),
        ("h[0-11]*", "h1 h11 h11_x", "h12 h110"),
        ("a[0-11].b[1-12].*", "a11.b12.c", "a11.b13.c"),
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


@given(st.integers(0, 1500), st.integers(10, 1500), st.integers(0, 2000))
def test_a_range_of_numbers_holds_those_between_its_ends(first, more, number):
    pattern = f"[{first}-{first + more}]"
    is_inside = first <= number <= first + more
    assert bool(glob(pattern).fullmatch(str(number))) == is_inside
    assert bool(glob(f"[!{pattern[1:]}").fullmatch(str(number))) != is_inside


def test_a_range_of_very_many_numbers_is_a_short_regex():
    assert len(glob(f"[0-{10**17}]").pattern) < 3000


def test_a_range_of_numbers_is_one_wildcard():
    assert glob("a[0-11].b[!3-12]").fullmatch("a11.b2").groups() == ("11", "2")
    assert fill("x[0-11].y[!3-12]", ["11", "2"]) == "x11.y2"


@pytest.mark.parametrize(
    ("pattern", "reason"),
    [
        ("h.[9-0]", "9-0 runs backwards, write 0-9"),
        ("h.[!15-2]", "15-2 runs backwards, write 2-15"),
        ("h.[z-a]", "bad character range z-a"),
        ("h.[10-]", "[10-] is neither numbers such as [0-3,10-15] nor single characters"),
        ("h.[0-57-9]", "[0-57-9] is neither"),
        ("h.[10,]", "[10,] is neither"),
        ("h.[a10-15]", "[a10-15] is neither"),
        (f"h.[0-{10**18}]", "[0-1000"),
    ],
)
def test_a_malformed_pattern_is_an_error(pattern, reason):
    with pytest.raises(ArgumentError) as caught:
        resolve(BlockStack(1), pattern)
    assert str(caught.value).startswith(f"a pattern must be well formed, got {pattern!r}. In it: {reason}")


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


@pytest.mark.parametrize(
    ("patterns", "name", "place"),
    [
        (["h.0", "h.*"], "h.0", 0),
        (["h.*", "h.0"], "h.0", 0),
        (["x", "h.?", "h.0", "**"], "h.0", 1),
        (["x", "**", "h.0"], "h.1", 1),
        (["x", "h.0"], "h.1", None),
        ([""], "", 0),
        ([], "h", None),
    ],
)
def test_the_first_pattern_that_fits_counts(patterns, name, place):
    assert Patterns(patterns).first(name) == place
