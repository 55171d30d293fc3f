"""What a comparison shows."""

from __future__ import annotations

import copy
import dataclasses
import math
import pickle

import pytest
import torch

from activation_extractor import compare
from activation_extractor.comparison import Comparison, LayerComparison

F32 = torch.float32
SAME = {"dtypes": (F32, F32), "shapes": ((2, 3), (2, 3)), "max_abs": 0.0, "max_rel": 0.0, "cosine": 1.0}


def row(layer, *differences, reducer="full", other=None, **numbers):
    return LayerComparison(layer, reducer, other or layer, **{**SAME, **numbers}, differences=differences)


def several(count, *differing):
    return Comparison([row(f"h.{index}", *(["values"] if index in differing else [])) for index in range(count)])


SMALL = Comparison(
    [
        row("embed"),
        row("h.0", "values", max_abs=0.0123456, max_rel=12345.6, cosine=0.98765432),
        row(
            "h.1",
            "dtype",
            "NaN",
            "infinity",
            other="layers.1",
            dtypes=(F32, torch.bfloat16),
            nan_count=1234,
            inf_count=1,
        ),
        row("h.2", "shape", max_abs=math.nan, max_rel=math.nan, cosine=math.nan, shapes=((2, 3), (2, None, 3))),
    ]
)
TEXT = """\
Comparison of 4 layers: 3 differ, first 'h.0' (values)
     layer           max abs  max rel   cosine    dtype               shape               differs in
     embed           0        0         1.000000  float32             (2, 3)
  >  h.0             0.0123   1.23e+04  0.987654  float32             (2, 3)              values
  x  h.1 / layers.1  0        0         1.000000  float32 / bfloat16  (2, 3)              dtype, 1,234 NaN, 1 infinite
  x  h.2             -        -         -         float32             (2, 3) / (2, *, 3)  shape"""


def test_a_small_comparison_is_a_table():
    assert repr(SMALL) == SMALL.table() == str(SMALL) == TEXT


def test_a_comparison_without_a_difference_has_no_marks():
    assert repr(several(2)) == (
        "Comparison of 2 layers: no difference\n"
        "  layer  max abs  max rel  cosine    dtype    shape\n"
        "  h.0    0        0        1.000000  float32  (2, 3)\n"
        "  h.1    0        0        1.000000  float32  (2, 3)"
    )


def test_several_reducers_have_a_column_and_stand_in_the_caption():
    found = Comparison([row("a", reducer="mean"), row("a", "values", reducer="last"), row("b", reducer=None)])
    assert repr(found) == (
        "Comparison of 3 values: 1 differs, first ('a', 'last') (values)\n"
        "     layer  reducer  max abs  max rel  cosine    dtype    shape   differs in\n"
        "     a      mean     0        0        1.000000  float32  (2, 3)\n"
        "  >  a      last     0        0        1.000000  float32  (2, 3)  values\n"
        "     b               0        0        1.000000  float32  (2, 3)"
    )


def test_what_one_side_lacks_is_a_dash():
    found = compare({"a": torch.ones(2), "b": torch.ones(2)}, {"a": torch.ones(2), "c": torch.ones(1).long()})
    assert repr(found) == (
        "Comparison of 3 layers: 2 differ, first 'b' (missing on the right)\n"
        "     layer  max abs  max rel  cosine    dtype        shape     differs in\n"
        "     a      0        0        1.000000  float32      (2,)\n"
        "  >  b      -        -        -         float32 / -  (2,) / -  missing on the right\n"
        "  x  c      -        -        -         - / int64    - / (1,)  missing on the left"
    )


def test_zeros_have_no_cosine_and_infinite_numbers_are_shown():
    assert repr(Comparison([row("a", cosine=math.nan, max_abs=math.inf)])).endswith(
        "\n  a      inf      0        -       float32  (2, 3)"
    )


def test_nothing_is_the_same_as_nothing():
    empty = Comparison([])
    assert repr(empty) == empty.table() == "Comparison of 0 layers: no difference"
    assert empty._repr_html_() == "<table>\n<caption>Comparison of 0 layers: no difference</caption>\n</table>"
    assert (empty.ok, bool(empty), empty.first_difference, len(empty)) == (True, True, None, 0)


def test_a_notebook_shows_the_same():
    found = Comparison([row("a"), row("b", "values")])
    assert found._repr_html_().split("\n") == [
        "<table>",
        "<caption>Comparison of 2 layers: 1 differs, first &#x27;b&#x27; (values)</caption>",
        "<tr><th></th><th>layer</th><th>max abs</th><th>max rel</th><th>cosine</th><th>dtype</th><th>shape</th>"
        "<th>differs in</th></tr>",
        "<tr><td></td><td>a</td><td>0</td><td>0</td><td>1.000000</td><td>float32</td><td>(2, 3)</td><td></td></tr>",
        "<tr><td>&gt;</td><td>b</td><td>0</td><td>0</td><td>1.000000</td><td>float32</td><td>(2, 3)</td>"
        "<td>values</td></tr>",
        "</table>",
    ]


def layers_shown(lines):
    return [line.split()[1 if line[2] in ">x" else 0] for line in lines if line.strip()[:3] != "..."]


@pytest.mark.parametrize(
    ("first", "shown_from", "above", "below"),
    [
        (None, 0, 0, 20),
        (0, 0, 0, 20),
        (3, 0, 0, 20),
        (4, 1, 1, 19),
        (10, 7, 7, 13),
        (23, 20, 20, 0),
        (59, 20, 20, 0),
    ],
)
def test_a_long_table_is_cut_a_little_above_the_first_difference(first, shown_from, above, below):
    found = several(60, *([] if first is None else [first]))
    text = repr(found).split("\n")
    assert text[1].split()[0] == "layer"
    assert text.count(f"  ... {above} more above") == (above > 0)
    assert text.count(f"  ... and {below} more") == (below > 0)
    if above:
        assert text[2] == f"  ... {above} more above"  # below the header
    if below:
        assert text[-1] == f"  ... and {below} more"
    assert layers_shown(text[2:]) == [f"h.{index}" for index in range(shown_from, shown_from + 40)]
    html = found._repr_html_()
    assert html.count("<tr><td") == 40 + (above > 0) + (below > 0)
    assert (f">... {above} more above</td>" in html) == (above > 0)
    assert (f">... and {below} more</td>" in html) == (below > 0)


def test_forty_rows_are_not_cut_and_the_table_never_is():
    assert "..." not in repr(several(40, 39))
    lines = several(60, 50).table().split("\n")
    assert len(lines) == 62
    assert [line.split()[0] for line in lines if line[2] in ">x"] == [">"]
    assert "..." not in several(60, 50).table()


def test_the_first_that_differs_has_another_mark_than_the_others():
    marks = [line[2] for line in several(6, 2, 3, 5).table().split("\n")[2:]]
    assert marks == [" ", " ", ">", "x", " ", "x"]


def test_html_is_escaped():
    evil = "<script>alert('&')</script>"
    found = Comparison([row(evil, "values", other="<b>"), row("a", reducer=evil)])
    html = found._repr_html_()
    assert "<script" not in html
    assert "<b>" not in html
    assert html.count("&lt;script&gt;") == 3  # caption, layer, reducer


@pytest.mark.parametrize("evil", ["a\nb", "a\x1b[2Jb", "a\u202eb", "a\tb"])
def test_a_name_cannot_break_a_line_or_steer_a_terminal(evil):
    for found in (Comparison([row(evil, "values")]), Comparison([row("x", "values", other=evil)])):
        for text in (repr(found), found.table(), found._repr_html_()):
            assert all(line.isprintable() for line in text.split("\n"))
            assert repr(evil)[1:-1] in text
        assert len(found.table().split("\n")) == 3


def test_a_reducers_name_cannot_steer_a_terminal_either():
    found = Comparison([row("a", reducer="x\x1b[2J"), row("a", reducer="y\nz")])
    assert all(line.isprintable() for line in repr(found).split("\n"))
    assert len(repr(found).split("\n")) == 4


def test_it_is_true_when_all_layers_are_the_same():
    good, bad = several(3), several(3, 1, 2)
    assert (bool(good), good.ok, good.first_difference) == (True, True, None)
    assert (bool(bad), bad.ok, bad.first_difference) == (False, False, "h.1")
    assert [one.ok for one in bad] == [True, False, False]


def test_it_is_a_sequence_of_rows_whose_slices_are_comparisons():
    found = several(5, 3)
    assert (len(found), found[0].layer, found[-1].layer) == (5, "h.0", "h.4")
    assert [one.layer for one in found[1:3]] == ["h.1", "h.2"]
    assert isinstance(found[1:3], Comparison)
    assert (found[:3].ok, found[2:].first_difference, found[::-1].first_difference) == (True, "h.3", "h.3")
    assert found[3] in found
    assert found.index(found[3]) == 3
    with pytest.raises(IndexError):
        found[5]


def test_neither_it_nor_its_rows_can_be_changed():
    rows = [row("a")]
    found = Comparison(rows)
    rows.append(row("b", "values"))
    assert (len(found), found.ok) == (1, True)
    with pytest.raises(TypeError):
        found[0] = row("b")
    with pytest.raises(dataclasses.FrozenInstanceError):
        found[0].layer = "b"
    assert isinstance(hash(found[0]), int)


@pytest.mark.parametrize("again", [copy.copy, copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one))])
def test_it_and_its_rows_survive_pickling(again):
    one = row("a", "values", dtypes=(F32, torch.bfloat16), other="b", rtol=1e-4, atol=0.0)
    assert again(one) == one
    twin = again(SMALL)
    assert isinstance(twin, Comparison)
    assert (repr(twin), twin.first_difference) == (TEXT, "h.0")


def test_a_row_that_is_missing_has_no_numbers():
    bare = LayerComparison("a", None, None, (F32, None), ((2,), None))
    assert all(math.isnan(one) for one in (bare.max_abs, bare.max_rel, bare.cosine, bare.rtol, bare.atol))
    assert (bare.nan_count, bare.inf_count, bare.differences, bare.ok) == (0, 0, (), True)


def test_what_compare_measures_is_what_is_shown():
    left = {"x": torch.tensor([3.0, 4.0, 0.0]), "y": torch.tensor([math.nan, 1.0, 2.0])}
    right = {"x": torch.tensor([4.0, 4.0, 0.5]), "y": torch.tensor([1.0, math.inf, 2.0])}
    x, y = compare(left, right, rtol=0.01, atol=0.1)
    assert (x.max_abs, x.max_rel, x.differences) == (1.0, pytest.approx(1 / 3), ("values",))
    assert x.cosine == pytest.approx(28 / (5 * math.sqrt(32.25)))
    assert (x.rtol, x.atol) == (0.01, 0.1)
    assert (y.nan_count, y.inf_count, y.differences, y.max_abs) == (1, 1, ("NaN", "infinity"), 0.0)
    assert repr(compare(left, right)[1:]).endswith("1 NaN, 1 infinite")
