"""What a callable for select= is handed: the type that the layer returned, whatever its constructor asks for."""

from __future__ import annotations

import dataclasses
import types
from collections import ChainMap, UserDict
from collections.abc import Mapping, MutableMapping
from typing import NamedTuple

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaModel

from activation_extractor import capture, gradients, outputs
from activation_extractor.errors import ArgumentError

X = torch.randn(5, 4)
MODES = pytest.mark.parametrize("mode", [torch.enable_grad, torch.inference_mode])


class Pair(tuple):
    """A tuple whose constructor takes its members one by one, and which has a property."""

    def __new__(cls, first, second):
        return tuple.__new__(cls, (first, second))

    @property
    def hidden(self):
        return self[0]


class Tagged(tuple):
    """A tuple with attributes."""


class Named(NamedTuple):
    """A named tuple."""

    hidden: torch.Tensor
    index: torch.Tensor


class Numbered(Named):
    """A named tuple whose constructor takes other arguments."""

    def __new__(cls, hidden):
        return tuple.__new__(cls, (hidden, hidden + 1))


class Rows(list):
    """A list whose constructor takes other arguments, and which has an attribute."""

    def __init__(self, first, second):
        super().__init__([first, second])
        self.hidden = first


class View(Mapping):
    """A mapping that is no dictionary."""

    def __init__(self, hidden):
        self.hidden = hidden

    def __getitem__(self, key):
        return {"hidden": self.hidden}[key]

    def __iter__(self):
        return iter(["hidden"])

    def __len__(self):
        return 1


class Nested(MutableMapping):
    """A mapping with keys of several parts, as a tensordict has."""

    def __init__(self, hidden):
        self._members = {"a": {"hidden": hidden}}

    def __getitem__(self, key):
        return self._members[key[0]][key[1]] if isinstance(key, tuple) else self._members[key]

    def __setitem__(self, key, value):
        self._members[key] = value

    def __delitem__(self, key):
        del self._members[key]

    def __iter__(self):
        return iter(self._members)

    def __len__(self):
        return len(self._members)


class ReadOnly(dict):
    """A dictionary that a copy cannot be written to."""

    def __setitem__(self, key, value):
        raise TypeError("read only")


@dataclasses.dataclass
class Late:
    """A dataclass of which a field is set later."""

    hidden: torch.Tensor
    late: object = dataclasses.field(init=False)


@dataclasses.dataclass
class Uncopied:
    """A dataclass that refuses copies."""

    hidden: torch.Tensor

    def __copy__(self):
        raise RuntimeError("no copies")


class Plain:
    """An object with a tensor."""

    def __init__(self, hidden):
        self.hidden = hidden


def tagged(hidden):
    value = Tagged((hidden, hidden + 1))
    value.hidden = hidden
    return value


KINDS = {
    "pair": (lambda x: Pair(x, x + 1), lambda value: value.hidden),
    "tagged": (tagged, lambda value: value.hidden),
    "numbered": (Numbered, lambda value: value.hidden),
    "rows": (lambda x: Rows(x, x + 1), lambda value: value.hidden),
    "struct sequence": (lambda x: torch.return_types.max((x, x.argmax(1))), lambda value: value.values),
    "view": (View, lambda value: value.hidden),
    "nested": (Nested, lambda value: value["a", "hidden"]),
    "read only": (lambda x: ReadOnly(hidden=x), lambda value: value["hidden"]),
    "proxy": (lambda x: types.MappingProxyType({"hidden": x}), lambda value: value["hidden"]),
    "chain": (lambda x: ChainMap({"hidden": x}, {}), lambda value: value["hidden"]),
    "user dict": (lambda x: UserDict(hidden=x), lambda value: value["hidden"]),
    "late": (Late, lambda value: value.hidden),
    "uncopied": (Uncopied, lambda value: value.hidden),
    "plain": (Plain, lambda value: value.hidden),
}


class Layer(nn.Module):
    """Returns what `make` makes of its output."""

    def __init__(self, make):
        super().__init__()
        self.linear, self.make = nn.Linear(4, 4), make

    def forward(self, x):
        return self.make(self.linear(x))


@MODES
@pytest.mark.parametrize(("make", "select"), KINDS.values(), ids=KINDS)
def test_a_value_of_an_odd_type_is_handed_out_as_that_type(make, select, mode):
    model = nn.Sequential(Layer(make))
    with mode(), capture(model, [outputs("0", select=select), {"linear": "0.linear"}]) as acts:
        model(X)
    assert torch.equal(acts["0"], acts["linear"])


@pytest.mark.parametrize(("make", "select"), KINDS.values(), ids=KINDS)
def test_a_tensor_in_a_value_of_an_odd_type_may_not_be_written_to(make, select):
    model = nn.Sequential(Layer(make))
    layers = outputs("0", select=lambda value: select(value).mul_(2))
    with torch.no_grad(), pytest.raises(ArgumentError, match="leave the model's tensors as they are"):
        with capture(model, layers):
            model(X)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_the_cache_of_a_model_is_read_and_not_written_to(mode):
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    model, tokens = LlamaModel(LlamaConfig(**sizes, vocab_size=20)).eval(), torch.randint(0, 20, (2, 5))
    keys = outputs("", select=lambda value: value.past_key_values.layers[0].keys)
    with mode(), capture(model, keys) as acts:
        returned = model(tokens, use_cache=True).past_key_values.layers[0].keys
    assert torch.equal(acts[""], returned)
    twice = outputs("", select=lambda value: value.past_key_values.layers[0].keys.mul_(2))
    with torch.no_grad(), pytest.raises(ArgumentError, match="leave the model's"), capture(model, twice):
        model(tokens, use_cache=True)


def test_a_tensor_of_inference_beside_others_takes_them_out_of_no_graph():
    with torch.inference_mode():
        constant = torch.ones(5, 4)
    model = nn.Sequential(Layer(lambda hidden: (hidden, constant)))
    select = gradients("0", select=lambda value: value[0])
    with capture(model, select) as acts:
        model(X)[0].sum().backward()
    assert torch.equal(acts["0:gradient"], torch.ones(5, 4))
