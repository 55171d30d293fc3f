"""Ids, kept columns and rows of a step."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from activation_extractor._format._stored_rows import Ragged
from activation_extractor.errors import ArgumentError, ArgumentTypeError, MaskError, StepError
from activation_extractor.reducers._mask_fit import MaskCheck
from activation_extractor.sinks._step import check_ids, check_keep, make_step

KEY = ("h.0", "mean")


def names():
    yield "a"
    yield "b"


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (None, None),
        (["a", "b"], ["a", "b"]),
        (("a", "b"), ["a", "b"]),
        (names(), ["a", "b"]),
        (np.array(["a", "b"]), ["a", "b"]),
        ([3, -1], [3, -1]),
        (range(2), [0, 1]),
        (torch.tensor([3, 1]), [3, 1]),
        (np.array([3, 1], dtype=np.uint8), [3, 1]),
        ([np.int64(3), 1], [3, 1]),
        ([], []),
        ([""], [""]),
    ],
)
def test_ids_become_a_list_of_strings_or_integers(given, expected):
    checked = check_ids(given)
    assert checked == expected
    assert all(type(one) in (int, str) for one in checked or ())


@pytest.mark.parametrize("ids", ["abc", 3, torch.tensor(3), object()])
def test_ids_must_be_a_sequence(ids):
    with pytest.raises(
        ArgumentTypeError, match="ids must be a sequence of strings or integers, one for each row, got "
    ):
        check_ids(ids)


@pytest.mark.parametrize(
    ("ids", "shown"),
    [
        (["a", 1], "'a'"),
        ([1, "a"], "1"),
        ([1, None], "None"),
        ([1.5, 2.5], "1.5"),
        ([True, False], "True"),
        (torch.tensor([1.0]), "1.0"),
        (torch.tensor([[1], [2]]), r"\[1\]"),
        ([b"a"], "b'a'"),
    ],
)
def test_ids_of_mixed_or_other_types_are_an_error_that_shows_one(ids, shown):
    with pytest.raises(ArgumentTypeError, match=f"ids must be all strings or all integers, got {shown}"):
        check_ids(ids)


def test_kept_columns_become_tensors_of_their_own():
    labels = torch.tensor([1, 0])
    columns = check_keep({"label": labels, "weight": np.array([0.5, 1.0]), "list": [1, 2], "pairs": [[1, 2], [3, 4]]})
    labels.zero_()
    assert columns["label"].tolist() == [1, 0]
    assert columns["weight"].dtype == torch.float64
    assert columns["list"].tolist() == [1, 2]
    assert columns["pairs"].shape == (2, 2)
    assert check_keep(None) == {}


def test_a_kept_column_with_a_gradient_is_taken_out_of_the_graph():
    assert not check_keep({"w": torch.ones(2, requires_grad=True)})["w"].requires_grad


@pytest.mark.parametrize("keep", [[1, 2], "label", {1: [1]}, {"": [1]}])
def test_kept_columns_must_have_names(keep):
    with pytest.raises(ArgumentTypeError, match="keep must be a dict from names to tensors, arrays or lists"):
        check_keep(keep)


@pytest.mark.parametrize("values", [[None], [[1, 2], [3]], {"a": 1}])
def test_kept_columns_must_hold_numbers_or_text(values):
    with pytest.raises(ArgumentTypeError, match="keep must hold numbers or text in column 'label', got '"):
        check_keep({"label": values})


def test_a_kept_column_must_have_rows():
    with pytest.raises(ArgumentError, match="keep must have one row for each sample in column 'label', got 3"):
        check_keep({"label": 3})


def test_an_array_that_cannot_be_written_to_is_kept_without_a_warning():
    labels = np.arange(2)
    labels.flags.writeable = False
    assert check_keep({"label": labels})["label"].tolist() == [0, 1]


def test_ragged_rows_are_views_by_their_lengths():
    ragged = Ragged(torch.arange(10.0).reshape(5, 2), torch.tensor([2, 0, 3]))
    first, second, third = ragged.rows()
    assert first.tolist() == [[0, 1], [2, 3]]
    assert second.shape == (0, 2)
    assert third.data_ptr() == ragged.values[2].data_ptr()


def test_a_step_counts_its_rows_by_ids_or_by_its_first_column():
    ragged = Ragged(torch.zeros(5, 2), torch.tensor([2, 3]))
    assert make_step(0, {KEY: torch.zeros(2, 3)}, None, {}).rows == 2
    assert make_step(0, {("h.0", "full"): ragged, KEY: torch.zeros(2, 3)}, None, {}).rows == 2
    step = make_step(4, {KEY: torch.zeros(2, 3)}, ["a", "b"], {"label": torch.zeros(2)})
    assert (step.index, step.rows, step.ids, list(step.keep)) == (4, 2, ["a", "b"], ["label"])


@pytest.mark.parametrize(
    ("values", "ids", "keep", "got"),
    [
        (torch.zeros(2, 3), ["a"], {}, r"2 in \('h.0', 'mean'\) beside 1"),
        (torch.zeros(2, 3), ["a", "b", "c"], {}, r"2 in \('h.0', 'mean'\) beside 3"),
        (torch.zeros(2, 3), None, {"label": torch.zeros(3)}, "3 in 'label' beside 2"),
        (Ragged(torch.zeros(5, 2), torch.tensor([2, 3])), ["a"], {}, r"2 in \('h.0', 'mean'\) beside 1"),
    ],
)
def test_a_wrong_number_of_rows_is_an_error_that_names_the_column(values, ids, keep, got):
    with pytest.raises(StepError, match=f"A step must have the same rows in every column, got {got}"):
        make_step(0, {KEY: values}, ids, keep)


def test_a_value_without_a_batch_axis_is_an_error_also_without_ids():
    with pytest.raises(StepError):
        make_step(0, {KEY: torch.zeros(())}, None, {})


@pytest.mark.parametrize("ids", [[2**63], [-(2**63) - 1]])
def test_an_integer_id_must_fit_64_bits(ids):
    with pytest.raises(ArgumentError):
        check_ids(ids)


def test_the_masks_of_a_step_are_checked_once():
    masks = [torch.tensor([[1, 1], [0, 1]]), torch.tensor([[1, 1], [0, 0]])]
    step = make_step(0, {KEY: torch.zeros(2, 3)}, None, {}, [MaskCheck("h.0", mask, mask != 0) for mask in masks])
    with pytest.raises(MaskError, match=r"The mask for layer 'h.0' must have a real .* got none in row 1\."):
        step.check_masks()
    step.check_masks()
