"""Tensors in structures, and copies of them."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
import pytest
import torch
from transformers import BatchEncoding
from transformers.modeling_outputs import BaseModelOutputWithPooling

from activation_extractor._tensors import snapshot
from activation_extractor.layers._structures import copied, main_tensor, select_part

A, B = torch.tensor([1.0, 2.0]), torch.tensor([3.0])


class Pair(NamedTuple):
    """A tuple with names."""

    left: object
    right: object


@dataclass
class Value:
    """A structured value."""

    left: object
    right: object = None


@dataclass(frozen=True, slots=True)
class Frozen:
    """One that cannot be assigned to."""

    left: object
    right: object = None


def model_output() -> BaseModelOutputWithPooling:
    return BaseModelOutputWithPooling(last_hidden_state=None, pooler_output=A, hidden_states=(B, B))


# -- finding ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "value",
    [
        A,
        (A, B),
        [None, A, B],
        {"none": None, "a": A, "b": B},
        OrderedDict(a=A),
        Pair(None, A),
        Value(None, A),
        Frozen(A, B),
        ((), [None, {"x": ("text", 3)}], (Value([], Pair(None, A)), B)),
        model_output(),
        BatchEncoding({"a": A}),
        torch.return_types.max((A, B)),
        MappingProxyType({"a": A}),
    ],
)
def test_the_main_tensor_is_the_first_of_the_structure(value):
    assert main_tensor(value) is A


@pytest.mark.parametrize("value", [None, (), {}, [None], "text", 3, np.ones(2), Value, Value(None), {"a": {"b": ()}}])
def test_a_structure_without_tensors_has_no_main_tensor(value):
    assert main_tensor(value) is None


@pytest.mark.parametrize(
    ("value", "select", "part"),
    [
        ((A, B), 1, B),
        ([A, B], -1, B),
        ([A, B], -2, A),
        (Pair(A, B), "right", B),
        (Pair(A, B), 1, B),
        (Value(A, B), "right", B),
        ({"left": A, "right": B}, "right", B),
        ({"left": A, "right": B}, 1, B),
        ({"left": A, "right": B}, -1, B),
        ({7: B, 0: A}, 7, B),
        ({7: B, 0: A}, 0, A),  # a key before it is an index
        (model_output(), "pooler_output", A),
        (model_output(), 0, A),  # None members do not count, as in transformers
        (torch.return_types.max((A, B)), "indices", B),
        ((A, B), lambda value: value[1], B),
        ({"left": A}, lambda value: value["left"], A),
    ],
)
def test_a_part_is_an_index_a_key_an_attribute_or_what_a_callable_returns(value, select, part):
    assert select_part(value, select) is part


@pytest.mark.parametrize(
    ("value", "select"),
    [
        ((A, B), 2),
        ((A, B), -3),
        ({"left": A}, "right"),
        ({"left": A}, 1),
        ({"left": A}, -2),
        (Value(A), 0),
        (Value(A), "other"),
        (None, 0),
        (A, 0),
    ],
)
def test_a_part_that_is_not_there_is_none(value, select):
    assert select_part(value, select) is None


# -- copying ----------------------------------------------------------------------------------------------------------


def same(one: object, other: object) -> bool:
    """Whether two structures are equal, type by type."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, tuple | list):
        return type(one) is type(other) and len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, dict | BatchEncoding):
        return type(one) is type(other) and list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    if isinstance(one, Value | Frozen):
        return type(one) is type(other) and same(one.left, other.left) and same(one.right, other.right)
    return one is other


@pytest.mark.parametrize(
    "value",
    [
        A,
        (A, None, "text"),
        [A, [B]],
        {"a": A, "b": {"c": B}},
        OrderedDict(b=B, a=A),
        Pair(A, (B,)),
        Value(A, [B]),
        Frozen(A, B),
        BatchEncoding({"a": A}),
        torch.return_types.max((A, B)),
        torch.Size([2]),
        model_output(),
        None,
    ],
)
def test_a_copied_structure_is_equal_and_shares_no_tensor(value):
    twin = copied(value)
    assert same(value, twin)
    if main_tensor(value) is not None:
        assert main_tensor(twin).data_ptr() != main_tensor(value).data_ptr()


def test_a_copied_model_output_has_one_copy_of_each_member():
    value = model_output()
    twin = copied(value)
    assert twin.pooler_output is twin["pooler_output"]
    assert twin.pooler_output is not value.pooler_output
    assert twin.hidden_states[0] is not value.hidden_states[0]
    assert value.pooler_output is A


def test_a_read_only_mapping_is_copied_too():
    value = MappingProxyType({"a": A})
    assert copied(value)["a"] is not A


def test_members_that_are_no_tensors_are_shared():
    member = object()
    assert copied([A, member])[1] is member


def test_a_copy_is_outside_the_graph():
    assert not copied((A.clone().requires_grad_(),))[0].requires_grad


@pytest.mark.parametrize("source", [A, A.clone().requires_grad_(), A.expand(3, 2)])
def test_a_snapshot_owns_its_memory_and_has_no_graph(source):
    taken = snapshot(source)
    assert torch.equal(taken, source)
    assert not taken.requires_grad
    assert taken.untyped_storage().data_ptr() != source.untyped_storage().data_ptr()
