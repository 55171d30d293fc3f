"""A callable for select= that writes where version counters do not count, or that changes what holds the tensors."""

from __future__ import annotations

import dataclasses
from collections import OrderedDict, UserDict
from functools import cached_property

import pytest
import torch
from kinds import KINDS, one_process
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from activation_extractor import capture, gradients, inputs, outputs
from activation_extractor.errors import ArgumentError

X = torch.randn(5, 4)
TEXT = "a callable for select= must leave the model's tensors as they are"
MODES = pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])


class Keys:
    """What a layer keeps in a cache."""

    def __init__(self, keys: torch.Tensor) -> None:
        self.keys, self.is_ready, self.memo = keys, True, {}

    @cached_property
    def total(self) -> torch.Tensor:
        return self.keys.sum()


class Cache:
    """Keeps tensors in lists, dicts and objects, as caches do, and is none of these itself."""

    def __init__(self, x: torch.Tensor) -> None:
        self.layers = [Keys(x.clone()), Keys(x + 1)]
        self.by_name = {"a": x * 2, "deep": [x * 3]}
        self.length = 5

    def crop(self, length: int) -> None:
        for layer in self.layers:
            layer.keys = layer.keys[:length]


@dataclasses.dataclass
class Output:
    hidden: torch.Tensor
    cache: Cache


class Returns(nn.Module):
    """A layer that returns a tensor and a cache, in a structure of some kind, and a layer that uses both."""

    def __init__(self, make) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(4, 4), nn.Linear(4, 4)
        self.inner.forward = lambda x: make(x * 2)

    def forward(self, x):
        return self.inner(x)


FORMS = {
    "tuple": lambda x: (x, Cache(x)),
    "list": lambda x: [x, Cache(x)],
    "dict": lambda x: {"hidden": x, "cache": Cache(x)},
    "ordered": lambda x: OrderedDict(hidden=x, cache=Cache(x)),
    "user dict": lambda x: UserDict(hidden=x, cache=Cache(x)),
    "dataclass": lambda x: Output(x, Cache(x)),
    "object": lambda x: (x, {"more": [Cache(x)]}),
}


def parts(value):
    """The tensor and the cache of a structure."""
    if isinstance(value, Output):
        return value.hidden, value.cache
    hidden, cache = value if isinstance(value, tuple | list) else value.values()
    return hidden, cache if isinstance(cache, Cache) else cache["more"][0]


CHANGES = {
    "data of a tensor": lambda cache: cache.layers[0].keys.data.zero_(),
    "numpy": lambda cache: cache.layers[1].keys.detach().numpy().fill(3),
    "data of a tensor in a dict": lambda cache: cache.by_name["a"].data.add_(1),
    "data of a tensor deep in it": lambda cache: cache.by_name["deep"][0].data.mul_(2),
    "other data": lambda cache: setattr(cache.layers[0].keys, "data", torch.zeros(5, 4)),
    "less data": lambda cache: setattr(cache.layers[0].keys, "data", cache.layers[0].keys.data[:2]),
    "resized": lambda cache: cache.layers[1].keys.detach_().resize_(2, 2),
    "crop": lambda cache: cache.crop(2),
    "pop of a list": lambda cache: cache.layers.pop(),
    "append to a list": lambda cache: cache.layers.append(Keys(X)),
    "order of a list": lambda cache: cache.layers.reverse(),
    "clear of a list": lambda cache: cache.layers.clear(),
    "item of a list": lambda cache: cache.by_name["deep"].__setitem__(0, X),
    "item of a dict": lambda cache: cache.by_name.update(a=X),
    "pop of a dict": lambda cache: cache.by_name.pop("a"),
    "another item of a dict": lambda cache: cache.by_name.update(b=X),
    "attribute": lambda cache: setattr(cache, "layers", cache.layers[:1]),
    "a number": lambda cache: setattr(cache, "length", 4),
    "removed attribute": lambda cache: delattr(cache.layers[0], "keys"),
}


@MODES
@pytest.mark.parametrize("change", CHANGES)
def test_what_changes_a_cache_is_an_error(change, mode):
    def select(value):
        hidden, cache = parts(value)
        CHANGES[change](cache)
        return hidden

    model = Returns(FORMS["tuple"])
    with mode(), pytest.raises(ArgumentError, match=TEXT), capture(model, outputs("inner", select=select)):
        model(X)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("change", ["data of a tensor", "crop"])
def test_a_cache_is_found_in_a_structure_of_each_kind(form, change):
    def select(value):
        hidden, cache = parts(value)
        CHANGES[change](cache)
        return hidden

    model = Returns(FORMS[form])
    with pytest.raises(ArgumentError, match=TEXT), capture(model, outputs("inner", select=select)):
        model(X)


@pytest.mark.parametrize("side", [outputs, inputs, gradients])
@pytest.mark.parametrize(
    "write",
    [lambda x: x.data.mul_(2), lambda x: x.detach().numpy().fill(0), lambda x: x.data.fill_(0)],
)
def test_writing_through_data_and_numpy_is_an_error_on_each_side(side, write):
    def select(value):
        x = next(iter(value.values())) if isinstance(value, dict) else value
        write(x)
        return x

    model = nn.Sequential(nn.Linear(4, 4))
    with torch.enable_grad(), pytest.raises(ArgumentError, match=TEXT), capture(model, side("0", select=select)):
        model(X.clone())


@MODES
def test_a_cache_that_is_cropped_in_a_later_call_is_an_error_too(mode):
    calls = []

    def select(value):
        calls.append(1)
        hidden, cache = value
        if len(calls) == 3:
            cache.crop(1)
        return hidden

    model = Returns(FORMS["tuple"])
    with mode(), pytest.raises(ArgumentError, match=TEXT), capture(model, outputs("inner", select=select), calls="all"):
        for _ in range(3):
            model(X)
    assert len(calls) == 3


READS = {
    "a cached property": lambda cache: cache.layers[0].total,
    "a note": lambda cache: cache.layers[0].memo.update(read=1) or cache.layers[0].keys,
    "a noted tensor": lambda cache: setattr(cache, "seen", cache.layers[0].keys) or cache.seen,
    "a noted number": lambda cache: setattr(cache, "reads", 1) or cache.layers[0].keys,
    "a view": lambda cache: cache.layers[1].keys[:2].T,
    "a copy": lambda cache: cache.by_name["a"].clone().zero_(),
    "requires_grad": lambda cache: cache.by_name["deep"][0].sum(1),
}


@MODES
@pytest.mark.parametrize("read", READS)
def test_reading_and_taking_notes_is_no_writing(read, mode):
    model = Returns(FORMS["tuple"])
    layers = outputs("inner", select=lambda value: READS[read](value[1]))
    with mode(), capture(model, layers, calls="all") as acts:
        for _ in range(3):
            model(X)
    expected = READS[read](Cache(X * 2))
    assert all(torch.equal(value, expected) for value in acts["inner"])


def test_a_nan_is_equal_to_itself():
    model = nn.Sequential(nn.Identity())
    x = torch.tensor([[float("nan"), -0.0, float("inf")]])
    with capture(model, outputs("0", select=lambda value: value[:, 1:])) as acts:
        model(x)
    assert torch.equal(acts["0"], x[:, 1:])
    with pytest.raises(ArgumentError, match=TEXT), capture(model, outputs("0", select=lambda x: x.data.abs_())):
        model(torch.tensor([[-0.0]]))


@pytest.mark.filterwarnings("ignore::UserWarning")  # of torch, over kinds of tensors that it may change
@pytest.mark.parametrize("kind", KINDS)
def test_a_tensor_of_each_kind_can_be_selected_from(kind):
    def make(x):
        return (KINDS[kind](x), x)

    with one_process():
        model = Returns(lambda x: make(X[None, :3].expand(2, 3, 4).contiguous()))
        with torch.no_grad(), capture(model, outputs("inner", select=lambda value: value[1])) as acts:
            model(X)
        assert torch.equal(acts["inner"], X[None, :3].expand(2, 3, 4))
    for strange in (torch.zeros(0, 3), torch.tensor(1.0), torch.ones(3, dtype=torch.bool).expand(2, 3)):
        model = Returns(lambda x, strange=strange: (strange, x))
        with capture(model, outputs("inner", select=lambda value: value[0])) as acts:
            model(X)
        assert torch.equal(acts["inner"], strange)


def test_only_the_first_call_of_a_block_copies(monkeypatch):
    copies, clone = [], torch.Tensor.clone
    monkeypatch.setattr(torch.Tensor, "clone", lambda x, **options: copies.append(1) or clone(x, **options))
    model = nn.Sequential(nn.Identity())
    with torch.no_grad(), capture(model, outputs("0", select=lambda value: value), copy=False) as acts:
        model(X)
        assert acts["0"] is X
        first = len(copies)
        for _ in range(3):
            model(X)
            assert acts["0"] is X
    assert first == len(copies) == 1


@MODES
def test_the_cache_of_a_language_model(mode):
    model = GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=2, n_head=2, vocab_size=20, n_positions=32)).eval()
    tokens = torch.tensor([[1, 2, 3, 4]])

    def cropped(value):
        value.past_key_values.crop(-2)
        return value.logits

    def written(value):
        value.past_key_values.layers[0].keys.data.zero_()
        return value.logits

    for select in (cropped, written):
        with mode(), pytest.raises(ArgumentError, match=TEXT), capture(model, outputs("", select=select)):
            model(tokens, use_cache=True)
    keys = outputs("", select=lambda value: value.past_key_values.layers[1].keys)
    with mode(), capture(model, keys, calls="all") as acts:
        expected = model.generate(tokens, max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert torch.equal(expected, model.generate(tokens, max_new_tokens=4, do_sample=False, pad_token_id=0))
    assert [call.shape[2] for call in acts[""]] == [4, 5, 6, 7]
