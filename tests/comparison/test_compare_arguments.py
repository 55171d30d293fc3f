"""The arguments of `compare`: tolerances by layer, and when another dtype is a difference."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from activation_extractor import compare
from activation_extractor.errors import ArgumentError, ArgumentTypeError, MatchError, TensorKindError


def test_a_tolerance_may_be_given_by_layer_and_the_first_pattern_counts():
    left = {name: torch.ones(2) for name in ("h.0", "h.1", "top")}
    right = {name: torch.ones(2) * 1.01 for name in left}
    found = compare(left, right, rtol={"h.0": 0.1, "h.*": 0.0}, atol={"**": 0})
    assert [row.ok for row in found] == [True, False, False]
    assert [row.rtol for row in found] == [0.1, 0.0, 1e-4]
    assert {row.atol for row in found} == {0}
    assert [row.ok for row in compare(left, right, atol={"top": 0.1})] == [False, False, True]
    assert compare(left, right, rtol={"**": 0.1}).ok
    assert compare(left, right, rtol=0, atol=0.02).ok
    assert not compare(left, right, rtol={}, atol={}).ok


@pytest.mark.parametrize("argument", ["rtol", "atol"])
@pytest.mark.parametrize(
    ("given", "error", "text"),
    [
        (-1e-9, ArgumentError, "{} must be finite and not negative, got -1e-09."),
        (math.nan, ArgumentError, "{} must be finite and not negative, got nan."),
        (math.inf, ArgumentError, "{} must be finite and not negative, got inf."),
        ({"a": 1.0, "b": -1}, ArgumentError, "{} must be finite and not negative, got -1."),
        ({"a": 1.0, "x*": 1.0}, ArgumentError, "a pattern in {} must fit a layer of left, got 'x*'."),
        ("1e-3", ArgumentTypeError, "{} must be a number, or map layer patterns to numbers, got '1e-3'."),
        (True, ArgumentTypeError, "{} must be a number, or map layer patterns to numbers, got True."),
        ({"a": None}, ArgumentTypeError, "{} must be a number, or map layer patterns to numbers, got {{'a': None}}."),
        ({1: 1.0}, ArgumentTypeError, "{} must be a number, or map layer patterns to numbers, got {{1: 1.0}}."),
    ],
)
def test_a_tolerance_that_is_none_is_an_error(argument, given, error, text):
    with pytest.raises(error) as caught:
        compare({"a": torch.ones(1)}, {"a": torch.ones(1)}, **{argument: given})
    assert str(caught.value) == text.format(argument)


def test_no_tolerance_lets_through_no_bit():
    left = {"a": torch.tensor([1.0, 0.0, 3.0])}
    for value in (math.nextafter(1, 2), 1.0):
        right = {"a": torch.tensor([value, -0.0, 3.0], dtype=torch.float64)}
        assert compare(left, right, rtol=0, atol=0, check_dtype=False).ok == (value == 1.0)


def test_layers_of_integers_do_not_make_a_dtype_count():
    left = {"ids": torch.arange(3), "a": torch.ones(3), "b": torch.ones(3)}
    whole = {name: one if name == "ids" else one.bfloat16() for name, one in left.items()}
    assert compare(left, whole).ok
    assert compare(left, {**whole, "b": left["b"]}).first_difference == "a"


def test_a_dtype_of_integers_counts_where_it_is_the_only_one():
    left, right = (
        {"ids": torch.arange(3), "a": torch.ones(3)},
        {"ids": torch.arange(3, dtype=torch.int32), "a": torch.ones(3)},
    )
    assert compare(left, right)[0].differences == ("dtype",)
    assert compare(left, right, check_dtype=False).ok


def test_dtype_stands_in_front_of_what_else_differs():
    nan, inf = math.nan, math.inf
    left = {"a": torch.tensor([1.0, nan, inf]), "b": torch.ones(1)}
    right = {"a": torch.tensor([3.0, 0, 0], dtype=torch.float64), "b": torch.ones(1)}
    row = compare(left, right)[0]
    assert row.differences == ("dtype", "NaN", "infinity", "values")
    assert (row.nan_count, row.inf_count, row.max_abs, row.max_rel) == (1, 1, 2.0, 2.0)


def test_arrays_of_another_framework_are_compared():
    left = {"a": torch.linspace(0, 1, 6).view(2, 3)}
    assert compare(left, {"a": left["a"].numpy() + np.float32(1e-6)}).ok
    assert compare({"a": left["a"].numpy()}, left, rtol=0, atol=0).ok


def test_complex_numbers_are_compared_with_real_ones():
    left, right = torch.tensor([1 + 2j, 3j]), torch.tensor([1.0, 0.0])
    found = compare({"a": left}, {"a": right}, check_dtype=False)
    assert (found[0].max_abs, found[0].differences) == (3.0, ("values",))
    assert compare({"a": right.to(torch.complex64)}, {"a": right}).ok


@pytest.mark.parametrize("key", [1, ("a", "b", "c"), ("a", 2), (1, "mean"), None], ids=str)
def test_a_key_that_is_no_name_is_refused(key):
    with pytest.raises(ArgumentTypeError, match=r"^a key of right must be a name or a \(name, reducer\), got "):
        compare({"a": torch.ones(1)}, {key: torch.ones(1)})


@pytest.mark.parametrize("match", [{}, lambda name: None], ids=["dict", "callable"])
def test_a_match_that_names_nothing_is_refused(match):
    with pytest.raises(MatchError, match=r"^What is compared must share a layer, got no name from match=\. "):
        compare({"a": torch.ones(1)}, {"a": torch.ones(1)}, match=match)


def test_check_dtype_is_a_boolean_or_none():
    with pytest.raises(ArgumentTypeError, match="^check_dtype must be True, False or None, got 'no'"):
        compare({"a": torch.ones(1)}, {"a": torch.ones(1)}, check_dtype="no")


def test_a_value_without_numbers_that_torch_has_is_refused():
    with pytest.raises(ArgumentTypeError, match="^a value in left must be a tensor, or an array of numbers, got "):
        compare({"a": np.ones(1, dtype=np.longdouble)}, {"a": torch.ones(1)})
    with pytest.raises(TensorKindError, match=r"^The value of layer 'a' must hold plain numbers in a comparison, got "):
        compare({"a": torch.ones(1, device="meta")}, {"a": torch.ones(1)})


def test_arrays_of_another_byte_order_are_read():
    assert compare({"a": np.arange(3, dtype=">f4")}, {"a": torch.arange(3.0)}).ok


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_tensors_without_rows_and_of_scalars_are_compared():
    for rows in ([], [torch.tensor(1.0), torch.tensor(2.0)]):
        nested = torch.nested.nested_tensor(rows)
        assert compare({"a": nested}, {"a": nested}).ok
