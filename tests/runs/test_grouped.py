"""Steps of windows, and the steps of whole rows that come of them."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from activation_extractor import windows
from activation_extractor.errors import ArgumentError, ArgumentTypeError, MaskError, StepError
from activation_extractor.reducers import position
from activation_extractor.reducers._reducers import resolve_reducers
from activation_extractor.runs._grouped import Grouped, Part, check_parts
from activation_extractor.sinks import Ragged, Step
from activation_extractor.sinks._step import part_of

REDUCERS = resolve_reducers(["mean", "max", "first", "last", "full"])
LENGTHS = [5, 1, 9, 3]


def reduced(parts, reducers=REDUCERS, layer="h.0"):
    """The columns of one layer, from what it computed of each row, ``(positions, features)``."""
    values = {}
    for name, reducer in reducers.items():
        if name == "full":
            values[layer, name] = Ragged(torch.cat(parts), torch.tensor([len(part) for part in parts]))
        else:
            values[layer, name] = torch.stack([reducer(part[None], None)[0] for part in parts])
    return values


def step_of(made, rows, *, ids=None, keep=None, layers=("h.0",)):
    """A step of windows, and the two other things that `Grouped.hold` is told of it."""
    parts = [rows[window.row][window.own_start : window.own_stop] for window in made]
    values = {key: value for layer in layers for key, value in reduced(parts, layer=layer).items()}
    ids = None if ids is None else [ids[window.row] for window in made]
    keep = {name: of(made) for name, of in (keep or {}).items()}
    return Step(0, len(made), values, ids, keep), check_parts(made), list(map(len, parts))


def rows_of(lengths):
    return [torch.randn(length, 3) for length in lengths]


def whole_rows(steps, grouped=None):
    """Every row, taken as soon as it is whole: by place, its columns, id and kept values."""
    grouped = grouped or Grouped(REDUCERS)
    found, numbers = {}, {}
    for step, parts, counts in steps:
        grouped.hold(step, parts, counts)
        for part in parts:
            numbers.setdefault(part.place, set()).add(part.number)
        single = [part.place for part in parts if part.windows == 1]
        cut = {part.place for part in parts if 1 < part.windows == len(numbers[part.place])}
        for places in [single, *([place] for place in cut)]:
            taken = grouped.take(places)
            grouped.drop(places)
            assert sum(whole.rows for whole in taken) == len(places)
            alone = [part_of(whole, [row]) for whole in taken for row in range(whole.rows)]
            for place, row in zip(places, alone, strict=True):
                columns = {
                    key: value.values if isinstance(value, Ragged) else value[0] for key, value in row.values.items()
                }
                found[place] = columns, row.ids and row.ids[0], {name: kept[0] for name, kept in row.keep.items()}
    assert not grouped._rows
    assert not grouped._steps
    return found


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 15), min_size=1, max_size=6),
    size=st.integers(1, 6),
    batch_size=st.integers(1, 5),
    random=st.randoms(use_true_random=False),
    has_ids=st.booleans(),
)
def test_windows_in_any_order_and_any_batches_come_out_as_whole_rows(lengths, size, batch_size, random, has_ids):
    rows, ids = rows_of(lengths), [f"row {row}" for row in range(len(lengths))] if has_ids else None
    made = windows(lengths, size=size)
    random.shuffle(made)
    batches = [made[start : start + batch_size] for start in range(0, len(made), batch_size)]
    keep = {
        "length": lambda made: torch.tensor([lengths[window.row] for window in made]),
        "name": lambda made: [f"name {window.row}" for window in made],
    }
    found = whole_rows(step_of(batch, rows, ids=ids, keep=keep, layers=("h.0", "h.1")) for batch in batches)
    assert sorted(found) == list(range(len(rows)))
    for place, (columns, row_id, kept) in found.items():
        assert row_id == (ids and ids[place])
        assert kept == {"length": lengths[place], "name": f"name {place}"}
        for layer in ("h.0", "h.1"):
            for (_, reducer), expected in reduced([rows[place]]).items():
                expected = expected.values if isinstance(expected, Ragged) else expected[0]
                torch.testing.assert_close(columns[layer, reducer], expected)


def test_rows_of_one_window_go_through_as_they_are():
    step, parts, counts = step_of(windows([2, 3], size=4), rows_of([2, 3]), ids=["a", "b"])
    grouped = Grouped(REDUCERS)
    grouped.hold(step, parts, counts)
    (whole,) = grouped.take([0, 1])
    assert whole.values["h.0", "mean"] is step.values["h.0", "mean"]
    assert whole.values["h.0", "full"] is step.values["h.0", "full"]


def test_rows_that_are_dropped_are_held_no_longer():
    grouped, made = Grouped(REDUCERS), windows([9, 9], size=4)
    grouped.hold(*step_of(made, rows_of([9, 9])))
    grouped.drop([0])
    assert [*grouped._rows] == [1]
    assert grouped.take([1])[0].rows == 1
    assert not grouped._rows


def test_a_window_in_which_nothing_counts_changes_nothing_and_a_row_of_such_is_an_error():
    values = torch.tensor([[1.0], [9.0], [2.0]])
    columns = {("h.0", name): values for name in ("mean", "max", "first", "last")}
    parts = [Part(0, 0, 3), Part(0, 1, 3), Part(0, 2, 3)]
    grouped = Grouped(resolve_reducers(["mean", "max", "first", "last"]))
    grouped.hold(Step(0, 3, columns), parts, [3, 0, 1])
    (whole,) = grouped.take([0])
    merged = {name: value.item() for (_, name), value in whole.values.items()}
    assert merged == {"mean": 1.25, "max": 2, "first": 1, "last": 2}
    grouped.hold(Step(0, 3, columns, ["a"] * 3), parts, [0, 0, 0])
    with pytest.raises(MaskError, match=r"must have a position that counts in every row, got none in row 0 \(id 'a'\)"):
        grouped.take([0])


def test_reducers_that_cannot_be_merged_are_an_error_where_a_row_has_several_windows():
    grouped = Grouped(resolve_reducers(["mean", position(1)]))
    grouped.check_merges([Part(0, 0, 1), Part(1, 0, 1)])
    text = (
        r"^reduce must say how the 3 windows of row 5 are merged, got 'position\(1\)'\. Use mean, weighted_mean, max,"
    )
    with pytest.raises(ArgumentError, match=text):
        grouped.check_merges([Part(0, 0, 1), Part(5, 0, 3)])
    Grouped(REDUCERS).check_merges([Part(5, 0, 3)])


def test_a_reducer_of_ones_own_says_how_its_windows_are_merged():
    def total(activation, mask):
        return activation.sum(1)

    total.merge = lambda parts, counts: sum(parts)
    lengths = [9, 2]
    rows, made = rows_of(lengths), windows(lengths, size=4)
    parts = [rows[window.row][window.own_start : window.own_stop] for window in made]
    step = Step(0, len(made), reduced(parts, {"total": total}))
    found = whole_rows([(step, check_parts(made), list(map(len, parts)))], Grouped({"total": total}))
    for place, row in enumerate(rows):
        torch.testing.assert_close(found[place][0]["h.0", "total"], row.sum(0))


@pytest.mark.parametrize(
    ("merge", "got"),
    [
        (lambda parts, counts: None, "'NoneType'"),
        (lambda parts, counts: parts[0].double(), "'torch.float64 of shape (3,)'"),
        (lambda parts, counts: torch.cat(parts), "'torch.float32 of shape (12,)'"),
        (lambda parts, counts: parts[0][0], "'torch.float32 of shape ()'"),
    ],
)
def test_a_merge_that_returns_something_else_than_a_part_is_an_error(merge, got):
    def total(activation, mask):
        return activation.sum(1)

    total.merge = merge
    made, rows = windows([9], size=4), rows_of([9])
    step = Step(0, len(made), reduced([rows[0][:3]] * len(made), {"total": total}))
    text = "merge of reducer 'total' must return a tensor like its parts for layer 'h.0', torch.float32 of shape (3,)"
    with pytest.raises(ArgumentError, match=re.escape(f"{text}, got {got}")):
        grouped = Grouped({"total": total})
        grouped.hold(step, check_parts(made), [3] * len(made))
        grouped.take([0])


def test_an_error_in_a_merge_says_where_it_happened():
    def total(activation, mask):
        return activation.sum(1)

    def fail(parts, counts):
        raise ZeroDivisionError

    total.merge = fail
    made = windows([9], size=4)
    step = Step(0, len(made), reduced([torch.ones(3, 2)] * len(made), {"total": total}), ["a"] * len(made))
    with pytest.raises(ZeroDivisionError) as caught:
        grouped = Grouped({"total": total})
        grouped.hold(step, check_parts(made), [3] * len(made))
        grouped.take([0])
    text = "while merging the windows of row 0 (id 'a'), layer 'h.0' with 'total'"
    assert text in str(getattr(caught.value, "__notes__", [str(caught.value)])[0])


def test_a_layer_without_a_sequence_cannot_be_stored_whole_where_rows_have_several_windows():
    values = {("pooler", "full"): torch.randn(2, 8)}
    grouped = Grouped(resolve_reducers("full"))
    grouped.hold(Step(0, 2, values), [Part(0, 0, 1), Part(1, 0, 1)], [3, 3])
    assert grouped.take([0, 1])[0].values["pooler", "full"].shape == (2, 8)
    text = (
        r"hold sequences where a row has several windows, got shape \(2, 8\) of layer 'pooler'\. Leave that layer out"
    )
    with pytest.raises(StepError, match=text):
        grouped.hold(Step(0, 2, values), [Part(2, 0, 2), Part(2, 1, 2)], [3, 3])


def test_a_layer_that_ran_for_some_windows_of_a_row_alone_is_an_error_and_one_that_ran_for_none_is_left_out():
    rows, made = rows_of([9, 9]), windows([9, 9], size=5, stride=4)
    grouped = Grouped(REDUCERS)
    grouped.hold(*step_of([made[0], made[2]], rows, layers=("h.0", "h.1")))
    grouped.hold(*step_of([made[1]], rows, layers=("h.0",)))
    grouped.hold(*step_of([made[3]], rows, layers=("h.0", "h.1")))
    with pytest.raises(StepError, match=r"got layer 'h.1' in 1 of the 2 windows of row 0\. Leave that layer out"):
        grouped.take([0])
    assert {layer for layer, _ in grouped.take([1])[0].values} == {"h.0", "h.1"}
    grouped.hold(*step_of(made[:2], rows, layers=("h.0",)))
    assert {layer for layer, _ in grouped.take([0])[0].values} == {"h.0"}


def test_checks_of_windows_go_with_the_next_rows_that_are_taken():
    made, check = windows([9, 2], size=5, stride=4), object()
    step, parts, counts = step_of(made, rows_of([9, 2]))
    grouped = Grouped(REDUCERS)
    grouped.hold(Step(0, step.rows, step.values, _checks=[check]), parts, counts)
    assert [it._checks for it in grouped.take([1])] == [[check]]
    assert [it._checks for it in grouped.take([0])] == [[]]


@pytest.mark.parametrize(
    "given",
    [
        torch.tensor([[0, 0, 2], [1, 0, 1]]),
        np.array([[0, 0, 2], [1, 0, 1]], dtype=np.int32),
        [(0, 0, 2), [1, 0, 1]],
        [torch.tensor([0, 0, 2]), np.array([1, 0, 1])],
        [(np.int64(0), 0, 2), (1, 0, 1)],
        [windows([9], size=6)[0], windows([2, 2], size=6)[1]],
        iter([(0, 0, 2), (1, 0, 1)]),
    ],
)
def test_windows_of_a_batch_may_be_said_in_several_ways(given):
    assert check_parts(given) == [(0, 0, 2), (1, 0, 1)]


@pytest.mark.parametrize(
    ("given", "kind", "text"),
    [
        (3, ArgumentTypeError, "group must hold for each row of a batch"),
        ("window", ArgumentTypeError, "group must hold for each row of a batch"),
        ({0: (0, 0, 1)}, ArgumentTypeError, "group must hold for each row of a batch"),
        ([0, 1], ArgumentTypeError, r"got 0\."),
        (torch.tensor([0, 1]), ArgumentTypeError, r"got 0\."),
        (torch.tensor([[0.0, 0, 1]]), ArgumentTypeError, "got "),
        ([(0, 0)], ArgumentTypeError, r"got \(0, 0\)\."),
        ([(0, False, True)], ArgumentTypeError, r"got \(0, False, True\)\."),
        ([(-1, 0, 1)], ArgumentError, r"group must count places and windows from 0, .*, got \(-1, 0, 1\)\."),
        ([(0, 2, 2)], ArgumentError, r"got \(0, 2, 2\)\."),
        ([(0, 0, 0)], ArgumentError, r"got \(0, 0, 0\)\."),
        ([(0, -1, 2)], ArgumentError, r"got \(0, -1, 2\)\."),
    ],
)
def test_what_cannot_be_windows_of_a_batch_is_an_error(given, kind, text):
    with pytest.raises(kind, match=text):
        check_parts(given)
