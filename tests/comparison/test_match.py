"""Which values of two sides belong together."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from activation_extractor.comparison._match import paired
from activation_extractor.errors import ArgumentError, ArgumentTypeError, MatchError
from activation_extractor.layers._patterns import count_wildcards, fill, glob

NAMES = st.lists(st.text("ab.0", min_size=1, max_size=4), unique=True, min_size=1, max_size=6)


def keys(*names: str, reducer: str | None = None):
    return [(name, reducer) for name in names]


def by_name(left, right, match):
    """The names of the pairs."""
    return [(a and a[0], b and b[0]) for a, b in paired(keys(*left), keys(*right), match)]


def test_without_a_match_one_name_belongs_to_itself_and_what_is_alone_is_told():
    assert by_name("abc", "acd", None) == [("a", "a"), ("b", None), ("c", "c"), (None, "d")]


def test_pairs_stand_in_the_order_of_the_left_and_what_it_lacks_behind_in_that_of_the_right():
    assert by_name("cab", "zbayc", None) == [("c", "c"), ("a", "a"), ("b", "b"), (None, "z"), (None, "y")]


@settings(deadline=None)
@given(NAMES, NAMES)
def test_every_name_stands_in_one_pair(left, right):
    if not set(left) & set(right):
        with pytest.raises(MatchError):
            by_name(left, right, None)
        return
    pairs = by_name(left, right, None)
    assert [a for a, _ in pairs if a] == left
    assert sorted(b for _, b in pairs if b) == sorted(right)
    assert all(None in pair or pair[0] == pair[1] for pair in pairs)


@settings(deadline=None)
@given(NAMES)
def test_a_dict_of_all_names_a_callable_and_order_say_the_same(names):
    renamed = {name: f"x.{name}" for name in names}
    expected = list(renamed.items())
    assert by_name(names, renamed.values(), renamed) == expected
    assert by_name(names, renamed.values(), renamed.get) == expected
    assert by_name(names, renamed.values(), "order") == expected
    assert by_name(names, renamed.values(), {"**": "x.**"}) == expected


def test_what_a_dict_does_not_name_is_left_out_on_both_sides():
    assert by_name(["a", "b", "c"], ["x", "y", "b"], {"b": "x"}) == [("b", "x")]
    assert by_name(["a", "b", "c"], ["x", "y"], {"c": "x", "a": "y"}) == [("a", "y"), ("c", "x")]


@pytest.mark.parametrize(
    ("match", "pairs"),
    [
        ({"h.*": "layers.*"}, [("h.0", "layers.0"), ("h.1", "layers.1")]),
        ({"h.*.fc": "layers.*.mlp"}, [("h.0.fc", "layers.0.mlp")]),
        ({"h.?.fc": "layers.?.mlp"}, [("h.0.fc", "layers.0.mlp")]),
        ({"h.[1-3]": "layers.[1-3]"}, [("h.1", "layers.1")]),
        ({"h.[!0]": "layers.*"}, [("h.1", "layers.1")]),
        ({"h.?": "layers.*"}, [("h.0", "layers.0"), ("h.1", "layers.1")]),
        ({"**.fc": "layers.*.mlp"}, None),  # `**.` stands for "h.0.", with its dot
        ({"*.*": "layers.*.*"}, None),
        ({"*.*": "*.*"}, None),
    ],
)
def test_wildcards_are_filled_in_on_the_right(match, pairs):
    left, right = ["h.0.fc", "h.0", "h.1"], ["layers.0.mlp", "layers.0", "layers.1"]
    if pairs is None:
        with pytest.raises(ArgumentError, match="^match must map"):
            by_name(left, right, match)
    else:
        assert by_name(left, right, match) == pairs


def test_several_wildcards_are_filled_in_one_by_one():
    match = {"enc.*.h[0-9].**": "blocks.*.[0-9].**"}
    assert by_name(["enc.a.h3.q.proj"], ["blocks.a.3.q.proj"], match) == [("enc.a.h3.q.proj", "blocks.a.3.q.proj")]


def test_a_leading_double_star_brings_its_dot_along_and_may_be_nothing():
    match = {"**.fc": "**.mlp"}
    assert by_name(["a.b.fc", "fc"], ["a.b.mlp", "mlp"], match) == [("a.b.fc", "a.b.mlp"), ("fc", "mlp")]


def test_the_first_pattern_that_fits_counts_and_a_later_one_may_fit_nothing_else():
    match = {"h.0": "first", "h.*": "layers.*", "**": "layers.**"}
    assert by_name(["h.0", "h.1"], ["layers.1", "first"], match) == [("h.0", "first"), ("h.1", "layers.1")]


def test_a_pattern_with_one_layer_on_the_right_may_fit_one():
    assert by_name(["h.0"], ["top"], {"h.*": "top"}) == [("h.0", "top")]


def test_a_callable_leaves_out_what_it_gives_none_for():
    left, right = ["h.0", "drop", "h.1"], ["l0", "l1"]
    pairs = by_name(left, right, lambda name: name.replace("h.", "l") if name[0] == "h" else None)
    assert pairs == [("h.0", "l0"), ("h.1", "l1")]


@pytest.mark.parametrize("match", [{"a": "b"}, {"a": "b"}.get, {"a*": "b*"}], ids=["dict", "callable", "pattern"])
@pytest.mark.parametrize("ending", [":input", ":gradient", "#3", ":input#0", ":gradient#12"])
def test_what_tells_the_side_and_the_call_is_put_back(match, ending):
    assert by_name([f"a{ending}"], [f"b{ending}"], match) == [(f"a{ending}", f"b{ending}")]


def test_a_match_may_name_the_side_and_the_call_itself():
    assert by_name(["a:input", "a"], ["b", "c"], {"a:input": "b", "a": "c"}) == [("a:input", "b"), ("a", "c")]
    assert by_name(["a#1"], ["b"], lambda name: "b" if name == "a#1" else None) == [("a#1", "b")]


def test_other_endings_are_part_of_the_name():
    asked = []
    assert by_name(["a:output", "a"], ["b"], lambda name: asked.append(name) or {"a": "b"}.get(name)) == [("a", "b")]
    assert asked == ["a:output", "a"]


def test_reducers_belong_together_by_name():
    left = [("a", "mean"), ("a", "last")]
    assert paired(left, left[::-1], None) == [(left[0], left[0]), (left[1], left[1])]
    assert paired(left, [("b", "last"), ("b", "max")], {"a": "b"}) == [
        (("a", "mean"), None),
        (("a", "last"), ("b", "last")),
        (None, ("b", "max")),
    ]


def test_a_reducer_that_one_side_does_not_tell_is_the_only_one_of_the_other():
    told, untold = [("a", "mean")], [("a", None)]
    assert paired(told, untold, None) == [(told[0], untold[0])]
    assert paired(untold, told, None) == [(untold[0], told[0])]
    assert paired(untold, untold, None) == [(untold[0], untold[0])]


def test_an_untold_reducer_beside_several_belongs_to_none():
    with pytest.raises(MatchError):
        paired([("a", None)], [("a", "mean"), ("a", "last")], None)
    same = [("b", "x")]
    assert paired([("a", None), *same], [("a", "mean"), ("a", "last"), *same], None) == [
        (("a", None), None),
        (same[0], same[0]),
        (None, ("a", "mean")),
        (None, ("a", "last")),
    ]


ADVICE = "Capture the same layers with the same reducers, or say with match= which belong together."


@pytest.mark.parametrize(
    ("left", "right", "match", "text"),
    [
        (keys("a"), keys("b"), None, f"share a layer and reducer, got 'a' on the left and 'b' on the right. {ADVICE}"),
        ([], keys("b"), None, f"share a layer and reducer, got nothing on the left and 'b' on the right. {ADVICE}"),
        (
            keys("a", reducer="mean"),
            keys(*"abcde", reducer="last"),
            None,
            "share a layer and reducer, got ('a', 'mean') on the left and "
            f"('a', 'last'), ('b', 'last'), ('c', 'last') and 2 more on the right. {ADVICE}",
        ),
        (
            keys("a", "b"),
            keys("c"),
            "order",
            "have equally many layers for match='order', got 2 and 1. Match them by name, with a dict.",
        ),
        (
            keys("h.0", "h.1"),
            keys("top"),
            {"h.*": "top"},
            "be matched one to one, got 'h.0' and 'h.1' for 'top'. Let match leave one of them out.",
        ),
    ],
)
def test_what_does_not_belong_together_is_a_match_error(left, right, match, text):
    with pytest.raises(MatchError) as caught:
        paired(left, right, match)
    assert str(caught.value) == f"What is compared must {text}"
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize(
    ("match", "text"),
    [
        ({"h.0": "lay.s0"}, "match must map 'h.0' to a layer of right, got 'lay.s0'. Close matches: 'layers.0'."),
        ({"h.0": "zzz"}, "match must map 'h.0' to a layer of right, got 'zzz'. There is 'layers.0', 'layers.1'."),
        (lambda name: "no", "match must map 'h.0' to a layer of right, got 'no'. There is 'layers.0', 'layers.1'."),
        ({"g.0": "layers.0"}, "match must name layers of left, got 'g.0'. Close matches: 'h.0'."),
        ({"xyz*": "y*"}, "match must name layers of left, got 'xyz*'. There is 'h.0', 'h.1'."),
        ({"h.*": "l.*.*"}, "match must have equally many wildcards on both sides, got {'h.*': 'l.*.*'}."),
        ({"h.0": "l.*"}, "match must have equally many wildcards on both sides, got {'h.0': 'l.*'}."),
    ],
)
def test_a_match_that_does_not_fit_is_an_argument_error(match, text):
    with pytest.raises(ArgumentError) as caught:
        by_name(["h.0", "h.1"], ["layers.0", "layers.1"], match)
    assert str(caught.value) == text


@pytest.mark.parametrize(
    ("match", "text"),
    [
        ("names", "match must be a dict, a callable, 'order' or None, got 'names'."),
        (3, "match must be a dict, a callable, 'order' or None, got 3."),
        ({1: "a"}, "match must map names to names, got {1: 'a'}."),
        ({"a": None}, "match must map names to names, got {'a': None}."),
        (lambda name: 3, "what match returns must be a name or None, got 3."),
    ],
)
def test_a_match_of_another_kind_is_a_type_error(match, text):
    with pytest.raises(ArgumentTypeError) as caught:
        by_name("a", "a", match)
    assert str(caught.value) == text


def test_a_match_that_names_nothing_shares_nothing():
    for match in ({}, lambda name: None):
        with pytest.raises(MatchError, match="must share a layer, got no name from match="):
            by_name("a", "a", match)


@pytest.mark.parametrize("match", [{"a[0]": "b"}, {"b": "a[0]"}])
def test_a_name_that_looks_like_a_pattern_may_be_named(match):
    ((left, right),) = match.items()
    assert by_name([left], [right], match) == [(left, right)]


# -- patterns that are filled -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pattern", "wildcards", "name"),
    [
        ("plain", [], "plain"),
        ("h.*", ["0"], "h.0"),
        ("**.a.*.[0-9]?", ["x.y.", "b", "3", "z"], "x.y.a.b.3z"),
        ("**.a", [""], "a"),
        ("a.**", ["b.c"], "a.b.c"),
        ("a", ["unused"], "a"),
        ("*", [r"\1 \g<0>"], r"\1 \g<0>"),
    ],
)
def test_a_pattern_is_filled_from_left_to_right(pattern, wildcards, name):
    assert fill(pattern, wildcards) == name


@pytest.mark.parametrize(
    ("pattern", "count"),
    [("", 0), ("a.b", 0), ("*", 1), ("**", 1), ("**.a", 1), ("a.**.b", 1), ("?[0-3]*", 3), ("[!a].**.*", 3), ("[", 0)],
)
def test_wildcards_are_counted(pattern, count):
    assert count_wildcards(pattern) == glob(pattern).groups == count


@settings(deadline=None)
@given(
    st.lists(st.sampled_from(["*", "**", "?", "[ab]", "a", "."]), max_size=6).map("".join), st.text("ab.", max_size=8)
)
def test_a_pattern_filled_with_what_it_found_is_the_name(pattern, name):
    found = glob(pattern).fullmatch(name)
    if found is not None:
        assert len(found.groups()) == count_wildcards(pattern)
        assert fill(pattern, found.groups()) == name


def test_what_a_pattern_does_not_escape_is_no_regex():
    assert glob("a.b+(c)").fullmatch("a.b+(c)")
    assert not re.fullmatch(glob("a.b"), "axb")
