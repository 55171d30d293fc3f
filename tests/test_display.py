"""Tables of text."""

from __future__ import annotations

import pytest
import torch

from activation_extractor._display import aligned, describe, html_table, human_bytes, plural, table, total


@pytest.mark.parametrize(
    ("key", "value", "rows"),
    [
        ("h.0", torch.zeros(2, 3), [("h.0", "", "(2, 3)", "float32", "cpu")]),
        (("h.0", "mean"), torch.zeros(2, dtype=torch.bfloat16), [("h.0", "mean", "(2,)", "bfloat16", "cpu")]),
        (
            "h.0",
            [torch.zeros(()), torch.zeros(1)],
            [("h.0#0", "", "()", "float32", "cpu"), ("h.0#1", "", "(1,)", "float32", "cpu")],
        ),
        (("h.0", "max"), [torch.zeros(1)], [("h.0#0", "max", "(1,)", "float32", "cpu")]),
        ("h.0", [], []),
    ],
)
def test_a_tensor_is_a_row(key, value, rows):
    assert describe(key, value) == rows


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_a_nested_tensor_is_a_row():
    nested = torch.nested.nested_tensor([torch.zeros(2, 3), torch.zeros(1, 3)])
    assert describe("h.0", nested)[0][0] == "h.0"


def test_columns_are_aligned_and_empty_ones_left_out():
    rows = [("h.0", "", "(2, 3)", "float32"), ("h.10.mlp", "", "(2,)", "int64")]
    assert table("Activations", rows).split("\n") == [
        "Activations",
        "  h.0       (2, 3)  float32",
        "  h.10.mlp  (2,)    int64",
    ]
    rows[1] = ("h.10.mlp", "mean", "(2,)", "int64")
    assert table("Store", rows).split("\n")[1:] == [
        "  h.0             (2, 3)  float32",
        "  h.10.mlp  mean  (2,)    int64",
    ]


def test_one_and_none_are_counted_in_good_english():
    assert total("Activations", 1, 4) == "Activations: 1 tensor, 4 B"
    assert total("Preview", 0, 2048, noun="layer") == "Preview: 0 layers, 2.0 KiB"
    assert [plural(count, "row") for count in (0, 1, 1000)] == ["0 rows", "1 row", "1,000 rows"]
    assert table("Activations", []) == "Activations"


@pytest.mark.parametrize(("count", "last"), [(40, "  39"), (41, "  ... and 1 more"), (100, "  ... and 60 more")])
def test_a_long_table_is_cut(count, last):
    lines = table("Store", [(str(index),) for index in range(count)]).split("\n")
    assert lines[0] == "Store"
    assert lines[40] == "  39"
    assert lines[-1] == last


def test_a_long_table_may_begin_further_down_and_says_so():
    rows = [(str(index), "x") for index in range(100)]
    lines = table("Store", rows, header=("number", "letter"), first=50).split("\n")
    assert lines[1:4] == ["  number  letter", "  ... 50 more above", "  50      x"]
    assert lines[-2:] == ["  89      x", "  ... and 10 more"]
    lines = html_table("Store", rows, first=70).split("\n")
    assert lines[2:4] == ['<tr><td colspan="2">... 60 more above</td></tr>', "<tr><td>60</td><td>x</td></tr>"]
    assert lines[-2:] == ["<tr><td>99</td><td>x</td></tr>", "</table>"]
    assert table("Store", rows[:40], first=7) == table("Store", rows[:40])


def test_columns_have_names_where_they_need_them():
    rows = [("h.0", "", "16"), ("h.10", "", "")]
    header = ("layer", "reducer", "calls")
    assert table("Preview", rows, header=header).split("\n") == [
        "Preview",
        "  layer  calls",
        "  h.0    16",
        "  h.10",
    ]
    assert table("Preview", [], header=header) == "Preview"
    assert table("Preview", rows * 30, header=header).endswith("  h.10\n  ... and 20 more")


def test_html_has_the_same_cells_and_a_caption():
    rows = [("h.0", "", "(2, 3)"), ("h.1", "", "(2,)")]
    assert html_table("Activations", rows).split("\n") == [
        "<table>",
        "<caption>Activations</caption>",
        "<tr><td>h.0</td><td>(2, 3)</td></tr>",
        "<tr><td>h.1</td><td>(2,)</td></tr>",
        "</table>",
    ]
    assert html_table("A", []) == html_table("A", [], header=["name"]) == "<table>\n<caption>A</caption>\n</table>"
    assert html_table("A", [("x",)], header=["name"]).split("\n")[1:4] == [
        "<caption>A</caption>",
        "<tr><th>name</th></tr>",
        "<tr><td>x</td></tr>",
    ]


def test_html_is_escaped_wherever_a_name_can_stand():
    evil = "<script>alert('&\"')</script>"
    html = html_table(evil, [(evil, evil)], header=(evil, evil))
    assert "<script" not in html
    assert html.count("&lt;script&gt;alert(&#x27;&amp;&quot;&#x27;)&lt;/script&gt;") == 5


def test_long_html_is_cut_where_text_is():
    lines = html_table("Store", [(str(index), "x") for index in range(43)]).split("\n")
    assert lines[-3:] == ["<tr><td>39</td><td>x</td></tr>", '<tr><td colspan="2">... and 3 more</td></tr>', "</table>"]


def test_lines_of_a_table_have_no_space_at_their_ends():
    assert aligned([("a", "b"), ("long", "")]) == ["  a     b", "  long"]
    assert aligned([]) == []


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (1536, "1.5 KiB"),
        (5 * 1024**2, "5.0 MiB"),
        (3.25 * 1024**3, "3.2 GiB"),
        (2 * 1024**4, "2.0 TiB"),
        (5000 * 1024**4, "5000.0 TiB"),
        pytest.param(1024**2 - 1, "1.0 MiB"),
    ],
)
def test_bytes_are_written_as_people_read_them(count, text):
    assert human_bytes(count) == text


def test_cells_keep_to_the_side_that_is_said():
    rows = [("layer", "rows"), ("h.10", "7")]
    assert aligned(rows) == ["  layer  rows", "  h.10   7"]
    assert aligned(rows, "<>") == ["  layer  rows", "  h.10      7"]
    with pytest.raises(ValueError, match="zip"):
        aligned(rows, "<")
