"""The rows of a batch: counted, taken out, and told apart by digests that other rows do not change."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from activation_extractor.runs._batch_rows import combined, count_rows, row_digests, take_rows

DTYPES = [torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.complex64, torch.float64, torch.uint8]


def padded(rows, side: str) -> dict:
    """Token rows and their masks, with features of each token, padded on a side."""
    longest = max(map(len, rows))
    tokens = torch.full((len(rows), longest), 99)
    mask = torch.zeros(len(rows), longest, dtype=torch.int64)
    for number, row in enumerate(rows):
        place = slice(0, len(row)) if side == "right" else slice(longest - len(row), longest)
        tokens[number, place], mask[number, place] = torch.tensor(row), 1
    features = torch.randn(99, 3, generator=torch.Generator().manual_seed(0))[tokens % 99]
    features[mask == 0] = -1
    return {"input_ids": tokens, "attention_mask": mask, "features": features, "scale": 2.0}


@settings(deadline=None, max_examples=60)
@given(
    rows=st.lists(st.lists(st.integers(0, 50), min_size=1, max_size=9), min_size=1, max_size=8),
    cut=st.integers(0, 8),
    side=st.sampled_from(["left", "right"]),
)
def test_a_digest_depends_on_its_row_alone_whatever_is_padded(rows, cut, side):
    whole = padded(rows, side)
    together = row_digests(whole, len(rows), whole["attention_mask"])
    parts = [part for part in (rows[:cut], rows[cut:]) if part]
    for other in ("left", "right"):
        apart = [padded(part, other) for part in parts]
        made = [row_digests(one, len(part), one["attention_mask"]) for one, part in zip(apart, parts, strict=True)]
        assert np.concatenate(made).tolist() == together.tolist()
    keys = [tuple(row) for row in rows]
    assert len(set(together.tolist())) == len(set(keys))


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_changed_value_changes_the_digest_of_its_row_alone(dtype):
    values = torch.ones(4, 3, 2).to(dtype)
    before = row_digests({"x": values}, 4)
    for place in np.ndindex(4, 3, 2):
        changed = values.clone()
        changed[place] = 0
        differs = row_digests({"x": changed}, 4) != before
        assert differs.tolist() == [row == place[0] for row in range(4)]


def changes() -> dict:
    x = torch.arange(12.0).reshape(4, 3)
    return {
        "name": {"y": x},
        "dtype": {"x": x.double()},
        "shape": {"x": x.reshape(4, 3, 1)},
        "rolled": {"x": x.roll(1, 1)},
        "more": {"x": x, "scale": 1},
        "none": {"x": x, "mask": None},
        "nested": {"x": {"x": x}},
        "list": {"x": [x, x]},
        "array": {"x": x.numpy() + 1},
        "texts": {"x": ["a", "b", "c", "d"]},
        "images": {"x": [torch.zeros(3, size) for size in (1, 2, 3, 4)]},
        "shared": {"x": x, "table": torch.zeros(2)},
    }


@pytest.mark.parametrize("change", changes())
def test_what_else_a_batch_holds_counts(change):
    plain = row_digests({"x": torch.arange(12.0).reshape(4, 3)}, 4)
    changed = row_digests(changes()[change], 4)
    assert (changed != plain).all()
    assert len(set(changed.tolist())) == 4
    assert changed.tolist() == row_digests(changes()[change], 4).tolist()


def test_rows_of_a_nested_tensor_and_large_rows_are_told_apart():
    nested = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged)
    assert len(set(row_digests({"x": nested}, 2).tolist())) == 2
    large = torch.zeros(2, 40_000)
    large[1, ::2] = 1
    assert len(set(row_digests({"x": large}, 2).tolist())) == 2
    masked = row_digests({"x": torch.zeros(2, 70_000)}, 2, torch.ones(2, 70_000))
    far = torch.zeros(2, 70_000)
    far[0, 3], far[1, 65_539 + 3] = 1, 1
    assert len({*row_digests({"x": far}, 2, torch.ones(2, 70_000)).tolist(), *masked.tolist()}) == 3


def test_digests_of_parts_of_a_unit_add_up_in_any_order():
    digests = row_digests({"x": torch.randn(6, 2)}, 6)
    whole = combined(digests, range(6))
    order = [4, 0, 5, 2, 1, 3]
    assert (combined(digests[order[:2]], order[:2]) + combined(digests[order[2:]], order[2:])) % 2**64 == whole
    assert combined(digests, [1, 0, 2, 3, 4, 5]) != whole


@pytest.mark.parametrize(
    ("arguments", "rows"),
    [
        (torch.zeros(3, 2), 3),
        ((torch.zeros(3), np.zeros((3, 1)), 7), 3),
        ({"x": torch.zeros(3), "texts": ["a", "b", "c"], "scale": torch.tensor(1.0), "size": (4, 4)}, 3),
        ({"x": {"y": [torch.zeros(2), torch.zeros(2)]}}, 2),
        ({"x": torch.zeros(3), "y": torch.zeros(2)}, None),
        ("text", None),
        (None, None),
        ({}, None),
    ],
)
def test_rows_are_counted_where_all_lengths_agree(arguments, rows):
    assert count_rows(arguments) == rows


def test_rows_are_taken_out_of_what_has_them():
    x = torch.arange(6).reshape(3, 2)
    value = {"x": x, "y": {"z": np.arange(3)}, "t": ["a", "b", "c"], "c": torch.tensor(1), "n": None, "s": (4, 4)}
    part = take_rows(value, 3, [2, 0])
    assert part["x"].tolist() == [[4, 5], [0, 1]]
    assert (part["y"]["z"].tolist(), part["t"], part["c"], part["n"], part["s"]) == (
        [2, 0],
        ["c", "a"],
        1,
        None,
        (4, 4),
    )
    assert [one.tolist() for one in take_rows([x[:, 0], x[:, 1]], 3, [1])] == [[2], [3]]


@pytest.mark.parametrize("value", [[torch.zeros(2, 5), torch.zeros(2, 4)], (torch.zeros(3), torch.zeros(4))])
def test_what_may_have_rows_on_two_axes_is_not_cut(value):
    with pytest.raises(ValueError, match="as many"):
        take_rows(value, 2, [0])


def test_rows_without_positions_have_digests_too():
    empty = {"input_ids": torch.zeros(2, 0, dtype=torch.int64), "attention_mask": torch.zeros(2, 0, dtype=torch.int64)}
    digests = row_digests(empty, 2, empty["attention_mask"])
    assert digests[0] == digests[1]
    full = {"input_ids": torch.zeros(2, 1, dtype=torch.int64), "attention_mask": torch.ones(2, 1, dtype=torch.int64)}
    assert row_digests(full, 2, full["attention_mask"])[0] != digests[0]


class Pair(NamedTuple):
    values: Any
    scale: float


def test_named_tuples_are_cut_and_objects_that_may_hold_rows_are_not():
    taken = take_rows(Pair(torch.arange(4), 0.5), 4, [1, 3])
    assert (taken.values.tolist(), taken.scale) == ([1, 3], 0.5)
    with pytest.raises(ValueError, match="a value of type object"):
        take_rows({"held": object()}, 4, [1])
    plain = {"dtype": torch.float32, "text": "a", "function": torch.relu, "none": None}
    assert take_rows(plain, 4, [1]) == plain
