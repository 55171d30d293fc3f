"""The sides of a comparison: what they hold, and their numbers a few rows at a time."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import Repeating
from torch import nn

from activation_extractor import SafetensorsSink, capture, open_store
from activation_extractor._format._stored_rows import Ragged
from activation_extractor.comparison import _sides as module
from activation_extractor.comparison._match import matched_rows, row_order
from activation_extractor.comparison._sides import Side, paired_pieces
from activation_extractor.errors import ArgumentTypeError, MatchError
from activation_extractor.sinks import Step

ONE = ("a", None)
KEY = ("a", "full")


def value(tensor):
    return Side({"a": tensor}, "left").value(ONE)


def store(folder, values, *, ids=None, rows_per_unit=1_000):
    """A store of the column ``a``: of a tensor, or of rows of different lengths."""
    sink = SafetensorsSink(Path(folder), rows_per_unit=rows_per_unit)
    for row in range(0, len(values), rows_per_unit):
        part = values[row : row + rows_per_unit]
        if isinstance(part, list):
            part = Ragged(torch.cat(part), torch.tensor([len(one) for one in part]))
        count = len(values[row : row + rows_per_unit])
        sink.write(Step(0, count, {KEY: part}, None if ids is None else ids[row : row + rows_per_unit], {}))
    sink.close()
    return open_store(folder)


def ragged(lengths, features=2):
    values = torch.arange(float(sum(lengths) * features)).reshape(-1, features)
    return list(torch.split(values, lengths))


def nested(rows):
    return torch.nested.nested_tensor(rows, layout=torch.jagged)


def read(left, right):
    """All numbers of both, and the sizes of the pieces."""
    pieces = list(paired_pieces(left, right))
    sizes = [piece.numel() for piece, _ in pieces]
    none = torch.empty(0, dtype=left.dtype), torch.empty(0, dtype=right.dtype)
    return *(torch.cat([none[side], *(pair[side] for pair in pieces)]) for side in (0, 1)), sizes


def numbers(value):
    """All numbers of one side."""
    return read(value, value)[0]


def test_a_mapping_may_be_keyed_by_names_or_by_names_and_reducers():
    side = Side({"b": torch.ones(1), ("a", "mean"): torch.ones(1)}, "left")
    assert side.keys == [("b", None), ("a", "mean")]
    assert side.store is None


def test_activations_tell_their_reducer_also_when_there_is_one(stack, tokens):
    with capture(stack, ["h.0", "h.1"], reduce="mean") as acts:
        stack(tokens)
    assert Side(acts, "left").keys == [("h.0", "mean"), ("h.1", "mean")]


def test_each_call_is_a_value_by_itself():
    model, x = Repeating(), torch.randn(2, 4)
    with capture(model, "layer", calls="all") as acts:
        model(x)
    side = Side(acts, "left")
    assert side.keys == [(f"layer#{call}", "full") for call in range(3)]
    assert torch.equal(numbers(side.value(side.keys[1])), acts["layer"][1].reshape(-1))


@pytest.mark.parametrize("source", [3, "folder", [("a", torch.ones(1))], torch.ones(1), nn.Linear(1, 1)], ids=str)
def test_another_side_is_a_type_error(source):
    with pytest.raises(ArgumentTypeError) as caught:
        Side(source, "right")
    condition = "right must be Activations, a Store, or a mapping of names to tensors, got "
    assert str(caught.value).startswith(condition)
    assert str(caught.value).endswith(" Open a store with open_store.")


@pytest.mark.parametrize("wrong", [3.0, None, "text", [1.0], {"b": torch.ones(1)}], ids=str)
def test_a_value_of_another_kind_is_a_type_error(wrong):
    with pytest.raises(ArgumentTypeError, match="^a value in left must be a tensor, or an array of numbers, got "):
        Side({"a": wrong}, "left")


@pytest.mark.parametrize(
    "tensor",
    [
        torch.arange(6.0).reshape(2, 3),
        torch.arange(6).reshape(3, 2).t(),
        torch.tensor(3.0),
        torch.ones(0, 3),
        torch.ones(3, 0),
        torch.ones(2, dtype=torch.bfloat16),
        nn.Parameter(torch.ones(2, 2)),
        torch.tensor([1 + 2j]).conj(),
        torch.eye(3).to_sparse(),
        np.arange(3, dtype=np.int16),
        np.asfortranarray(np.arange(6.0).reshape(2, 3)),
    ],
    ids=repr,
)
def test_a_tensor_or_array_is_read_flat(tensor):
    found = value(tensor)
    plain = torch.as_tensor(tensor).detach().resolve_conj()
    plain = plain.to_dense() if plain.is_sparse else plain
    assert (found.dtype, found.shape, found.lengths()) == (plain.dtype, tuple(plain.shape), None)
    assert torch.equal(numbers(found), plain.reshape(-1))
    assert not numbers(found).requires_grad
    assert not numbers(found).is_conj()


def test_what_inference_mode_made_can_be_compared():
    with torch.inference_mode():
        tensor = torch.ones(3)
    assert torch.equal(numbers(value(tensor)), torch.ones(3))


@pytest.mark.parametrize("kind", ["read-only", "turned"])
def test_any_array_of_numbers_can_be_compared(kind):
    array = np.arange(3.0)
    array.flags.writeable = kind != "read-only"
    array = array[::-1] if kind == "turned" else array
    assert numbers(value(array)).tolist() == array.tolist()


@pytest.mark.parametrize("array", [np.array([None]), np.array(["x"])], ids=str)
def test_an_array_of_anything_but_numbers_is_an_error_of_the_library(array):
    with pytest.raises(ArgumentTypeError, match="a value in left"):
        value(array)


def test_a_nested_tensor_has_rows_of_different_lengths(tmp_path):
    rows = ragged([2, 0, 3])
    for found in (value(nested(rows)), Side(store(tmp_path / "s", rows), "left").value(KEY)):
        assert (found.shape, found.lengths()) == ((3, None, 2), [2, 0, 3])
        assert numbers(found).tolist() == torch.cat(rows).flatten().tolist()


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=9).filter(sum), st.integers(1, 12), st.integers(1, 4))
def test_ragged_rows_are_read_in_pieces_of_one_size_on_both_sides(lengths, piece_values, rows_per_unit):
    rows = ragged(lengths)
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_PIECE_VALUES", piece_values)
        left, right = value(nested(rows)), Side(store(folder, rows, rows_per_unit=rows_per_unit), "right").value(KEY)
        one, other, sizes = read(left, right)
    assert torch.equal(one, torch.cat(rows).flatten())
    assert torch.equal(one, other)
    assert sizes == [len(part) for part in torch.split(one, piece_values)]


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 9), st.integers(1, 3), st.integers(1, 12))
def test_dense_rows_are_read_in_such_pieces_too(rows, features, piece_values):
    tensor = torch.randn(rows, features)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_PIECE_VALUES", piece_values)
        one, other, sizes = read(value(tensor), value(tensor.double()))
    assert torch.equal(one, tensor.reshape(-1))
    assert torch.equal(other, tensor.double().reshape(-1))
    assert sizes == [len(part) for part in torch.split(one, piece_values) if len(part)]


@pytest.mark.parametrize(
    ("left", "right"),
    [
        (torch.ones(2, 3), torch.ones(3, 2)),
        (torch.ones(6), torch.ones(2, 3)),
        (torch.ones(2), torch.ones(2, 1)),
        (torch.tensor(1.0), torch.ones(1)),
        (torch.ones(0, 2), torch.ones(0, 3)),
        (nested(ragged([1, 2])), nested(ragged([2, 1]))),
        (nested(ragged([1, 2])), torch.ones(2, 2, 2)),
        (nested(ragged([2, 2])), torch.ones(2, 2, 3)),
        (torch.ones(2, 2, 2), nested(ragged([2, 2, 2]))),
    ],
)
def test_values_of_other_shapes_have_no_blocks(left, right):
    assert paired_pieces(value(left), value(right)) is None


def test_ragged_rows_of_one_length_have_the_shape_of_a_tensor():
    rows = ragged([3, 3])
    for left, right in [(nested(rows), torch.stack(rows)), (torch.stack(rows), nested(rows))]:
        one, other, _ = read(value(left), value(right))
        assert torch.equal(one, other)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_a_nested_tensor_whose_rows_differ_in_a_later_axis_is_refused():
    with pytest.raises(ArgumentTypeError, match="^a nested tensor must be one whose rows differ in their length alone"):
        value(torch.nested.nested_tensor([torch.ones(2, 3), torch.ones(2, 5)]))


# -- rows that belong together ----------------------------------------------------------------------------------------


def test_the_same_ids_in_the_same_order_and_rows_without_ids_need_no_order(tmp_path):
    values = torch.arange(3.0)[:, None]
    one, same = (store(tmp_path / name, values, ids=[7, 5, 6]) for name in "ab")
    bare = store(tmp_path / "bare", values)
    for left, right in [(one, same), (one, bare), (bare, one), (bare, bare), (None, one), (one, None)]:
        assert row_order(left, right) is None
    assert matched_rows(one, same, KEY, KEY, None) is None


@settings(deadline=None, max_examples=30)
@given(st.permutations(range(6)), st.permutations(range(6)), st.integers(1, 6))
def test_rows_are_found_by_their_ids(ids, others, rows_per_unit):
    with tempfile.TemporaryDirectory() as folder:
        left, right = (
            store(Path(folder) / name, torch.tensor(these)[:, None], ids=list(map(str, these)), rows_per_unit=size)
            for name, these, size in [("a", ids, 2), ("b", others, rows_per_unit)]
        )
        order = row_order(left, right)
        rows = matched_rows(left, right, KEY, KEY, order)
        found = numbers(Side(right, "right").value(KEY, rows)).tolist()
    assert (order is None) == (ids == others)
    assert found == list(ids)


@pytest.mark.parametrize(
    ("ids", "others", "got"),
    [
        (["a", "b"], ["a", "c"], "1 id on the left alone, such as 'b'"),
        (["a", "b"], ["a"], "1 id on the left alone, such as 'b'"),
        (["a"], ["a", "b"], "1 id on the right alone, such as 'b'"),
        (["b"], ["c", "b", "a"], "2 ids on the right alone, such as 'c'"),
        ([1, 2], ["1", "2"], "2 ids on the left alone, such as 1"),
    ],
)
def test_other_ids_are_a_match_error(tmp_path, ids, others, got):
    left, right = (
        store(tmp_path / name, torch.ones(len(one), 1), ids=one) for name, one in [("a", ids), ("b", others)]
    )
    with pytest.raises(MatchError) as caught:
        row_order(left, right)
    assert (
        str(caught.value)
        == f"What is compared must have the same row ids on both sides, got {got}. Compare stores of the same data set."
    )


def test_a_column_that_is_short_of_rows_belongs_to_one_that_is_short_of_the_same(tmp_path):
    stores = []
    for name, ids in [("a", "wxyz"), ("b", "zyxw"), ("c", "yzwx")]:
        sink = SafetensorsSink(tmp_path / name)
        for index, pair in enumerate([ids[:2], ids[2:]]):
            has = "w" in pair
            values = {
                ("all", "a"): torch.ones(2, 1),
                **({KEY: torch.tensor([[ord(one)] for one in pair])} if has else {}),
            }
            sink.write(Step(index, 2, values, list(pair), {}))
        sink.close()
        stores.append(open_store(tmp_path / name))
    left, right, other = stores
    assert matched_rows(left, right, KEY, KEY, row_order(left, right)).tolist() == [1, 0]
    assert matched_rows(left, other, KEY, KEY, row_order(left, other)).tolist() == [0, 1]
    with pytest.raises(LookupError):
        matched_rows(left, right, KEY, ("all", "a"), row_order(left, right))
    with pytest.raises(LookupError):
        matched_rows(left, left, ("all", "a"), KEY, None)
    assert matched_rows(left, left, KEY, KEY, None) is None
