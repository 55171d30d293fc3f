"""Steps of windows, and the steps of whole rows that come of them."""

from __future__ import annotations

import math
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
    """A step of windows, and the two other things that `Grouped.add` is told of it."""
    parts = [rows[window.row][window.own_start : window.own_stop] for window in made]
    values = {key: value for layer in layers for key, value in reduced(parts, layer=layer).items()}
    ids = None if ids is None else [ids[window.row] for window in made]
    keep = {name: of(made) for name, of in (keep or {}).items()}
    return Step(0, len(made), values, ids, keep), check_parts(made), list(map(len, parts))


def rows_of(lengths):
    return [torch.randn(length, 3) for length in lengths]


def whole_rows(steps, grouped=None):
    """Every row that comes whole: by place, its columns, id and kept values."""
    grouped = grouped or Grouped(REDUCERS)
    found = {}
    for step in steps:
        for places, whole in grouped.add(*step):
            assert whole.rows == len(places)
            for row, place in enumerate(places):
                columns = {
                    key: value.rows()[row] if isinstance(value, Ragged) else value[row]
                    for key, value in whole.values.items()
                }
                assert place not in found
                found[place] = columns, whole.ids and whole.ids[row], {k: v[row] for k, v in whole.keep.items()}
    grouped.end()
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


def test_rows_of_one_window_go_through_as_they_are_and_at_once():
    rows = rows_of([2, 3])
    step, parts, counts = step_of(windows([2, 3], size=4), rows, ids=["a", "b"])
    ((places, whole),) = Grouped(REDUCERS).add(step, parts, counts)
    assert places == [0, 1]
    assert whole.values["h.0", "mean"] is step.values["h.0", "mean"]
    assert whole.values["h.0", "full"] is step.values["h.0", "full"]


def test_only_rows_that_lack_windows_are_held():
    lengths = [9] * 20
    rows, made = rows_of(lengths), windows(lengths, size=4)
    grouped = Grouped(REDUCERS)
    held = []
    for start in range(0, len(made), 3):
        grouped.add(*step_of(made[start : start + 3], rows))
        held.append(len(grouped._open))
    assert max(held) == 1
    grouped.end()


def test_a_row_that_lacks_a_window_at_the_end_is_an_error_that_names_it():
    made = windows([9, 9], size=4, stride=4)
    grouped = Grouped(REDUCERS)
    grouped.add(*step_of([made[0], made[2], *made[3:]], rows_of([9, 9]), ids=["a", "b"]))
    with pytest.raises(
        ArgumentError, match=r"^group must hold window 1 of row 0 \(id 'a'\), which has 3, got \[0, 2\]\.$"
    ):
        grouped.end()
    grouped.add(*step_of([made[1]], rows_of([9]), ids=["a"]))
    grouped.end()
    grouped.add(*step_of([made[0], made[3]], rows_of([9, 9])))
    with pytest.raises(ArgumentError, match=r"got \[0\]\. 2 rows lack windows\."):
        grouped.end()


def test_what_windows_of_a_row_say_differently_of_it_is_an_error_that_names_it():
    made, rows = windows([9], size=4, stride=4), rows_of([9])

    def add(**second):
        grouped = Grouped(REDUCERS)
        step, parts, counts = step_of(made[:2], rows, **second)
        grouped.add(step, second.get("parts", parts), counts)

    def kept(values):
        return {"keep": {"label": lambda made: values}}

    step, parts, counts = step_of(made[:2], rows)
    for wrong, text in (
        ([(0, 0, 3), (0, 1, 4)], r"group must give row 0 3 windows, as before, got \(0, 1, 4\)\."),
        ([(0, 0, 3), (0, 0, 3)], r"group must hold window 0 of row 0 once, got \(0, 0, 3\)\."),
    ):
        with pytest.raises(ArgumentError, match=text):
            Grouped(REDUCERS).add(step, check_parts(wrong), counts)
    with pytest.raises(ArgumentError, match=r"ids must be the same for all windows of row 0 \(id 'a'\), got 'b'\."):
        Grouped(REDUCERS).add(Step(0, 2, step.values, ["a", "b"]), parts, counts)
    for values in (torch.tensor([1, 2]), ["x", "y"], torch.tensor([[1.0, 2.0], [1.0, math.nan]])):
        with pytest.raises(ArgumentError, match=r"keep must hold one 'label' for all windows of row 0, .*, got"):
            add(**kept(values))
    with pytest.raises(ArgumentError, match=r"group must hold a window for each of the 2 rows of a batch, got 1\."):
        Grouped(REDUCERS).add(step, parts[:1], counts)


def test_kept_values_that_are_not_a_number_are_the_same_in_each_window():
    made, rows = windows([9], size=4, stride=4), rows_of([9])
    keep = {"label": lambda made: torch.full((len(made),), math.nan), "two": lambda made: torch.ones(len(made), 2)}
    ((_, _, kept),) = whole_rows([step_of(made[:2], rows, keep=keep), step_of(made[2:], rows, keep=keep)]).values()
    assert kept["label"].isnan()
    assert kept["two"].tolist() == [1, 1]


def test_a_window_in_which_nothing_counts_changes_nothing_and_a_row_of_such_is_an_error():
    values = torch.tensor([[1.0], [9.0], [2.0]])
    columns = {("h.0", name): values for name in ("mean", "max", "first", "last")}
    parts = [Part(0, 0, 3), Part(0, 1, 3), Part(0, 2, 3)]
    grouped = Grouped(resolve_reducers(["mean", "max", "first", "last"]))
    ((_, whole),) = grouped.add(Step(0, 3, columns), parts, [3, 0, 1])
    assert {name: value.item() for (_, name), value in whole.values.items()} == {
        "mean": 1.25,
        "max": 2,
        "first": 1,
        "last": 2,
    }
    with pytest.raises(MaskError, match="must have a position that counts in every row, got none in row 0"):
        grouped.add(Step(0, 3, columns), parts, [0, 0, 0])


def test_reducers_that_cannot_be_merged_are_an_error_where_a_row_has_several_windows():
    grouped = Grouped(resolve_reducers(["mean", position(1)]))
    grouped.check_merges([Part(0, 0, 1), Part(1, 0, 1)])
    text = (
        r"^reduce must say how the 3 windows of row 5 are merged, got 'position\(1\)'\. Use mean, max, first, last or"
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
        Grouped({"total": total}).add(step, check_parts(made), [3] * len(made))


def test_an_error_in_a_merge_says_where_it_happened():
    def total(activation, mask):
        return activation.sum(1)

    def fail(parts, counts):
        raise ZeroDivisionError

    total.merge = fail
    made = windows([9], size=4)
    step = Step(0, len(made), reduced([torch.ones(3, 2)] * len(made), {"total": total}), ["a"] * len(made))
    with pytest.raises(ZeroDivisionError) as caught:
        Grouped({"total": total}).add(step, check_parts(made), [3] * len(made))
    text = "while merging the windows of row 0 (id 'a'), layer 'h.0' with 'total'"
    assert text in str(getattr(caught.value, "__notes__", [str(caught.value)])[0])


def test_a_layer_without_a_sequence_cannot_be_stored_whole_where_rows_have_several_windows():
    values = {("pooler", "full"): torch.randn(2, 8)}
    grouped = Grouped(resolve_reducers("full"))
    assert [it.places for it in grouped.add(Step(0, 2, values), [Part(0, 0, 1), Part(1, 0, 1)], [3, 3])] == [[0, 1]]
    text = (
        r"hold sequences where a row has several windows, got shape \(2, 8\) of layer 'pooler'\. Leave that layer out"
    )
    with pytest.raises(StepError, match=text):
        grouped.add(Step(0, 2, values), [Part(2, 0, 2), Part(2, 1, 2)], [3, 3])


def test_a_layer_that_ran_for_some_windows_of_a_row_alone_is_an_error_and_one_that_ran_for_none_is_left_out():
    rows, made = rows_of([9, 9]), windows([9, 9], size=5, stride=4)
    grouped = Grouped(REDUCERS)
    first = step_of([made[0]], rows, layers=("h.0", "h.1")), step_of([made[1]], rows, layers=("h.0",))
    grouped.add(*first[0])
    with pytest.raises(StepError, match=r"got layer 'h.1' in 1 of the 2 windows of row 0\. Leave that layer out"):
        grouped.add(*first[1])
    both, one = (step_of(made, rows, layers=layers) for layers in (("h.0", "h.1"), ("h.0",)))
    for step, layers in ((both, {"h.0", "h.1"}), (one, {"h.0"})):
        ((_, whole),) = Grouped(REDUCERS).add(*step)
        assert {layer for layer, _ in whole.values} == layers


def test_rows_with_other_columns_come_in_steps_of_their_own():
    rows, made = rows_of([9, 9]), windows([9, 9], size=5, stride=4)
    grouped = Grouped(REDUCERS)
    grouped.add(*step_of([made[0]], rows, layers=("h.0", "h.1")))
    grouped.add(*step_of([made[2]], rows, layers=("h.0",)))
    step, parts, counts = step_of([made[1]], rows, layers=("h.0", "h.1"))
    found = grouped.add(step, parts, counts) + grouped.add(*step_of([made[3]], rows, layers=("h.0",)))
    assert [(it.places, len(it.step.values)) for it in found] == [([0], 10), ([1], 5)]


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
