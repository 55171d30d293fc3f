"""Hooks on one module: whose call it is, and which tensor is meant."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import pytest
import torch
from models import count_hooks
from torch import nn
from torch.utils.checkpoint import checkpoint

from activation_extractor import capture, gradients, inputs, outputs
from activation_extractor.errors import TransformedCallError, ValueNotFoundError


class Returning(nn.Module):
    """Returns whatever structure a function makes of its input."""

    def __init__(self, make) -> None:
        super().__init__()
        self.make = make

    def forward(self, x, scale=1, *rest, bias=None, **named):
        return self.make(x)


class Checkpointed(nn.Module):
    def __init__(self, use_reentrant: bool) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.use_reentrant = use_reentrant

    def forward(self, x):
        x = checkpoint(lambda x: self.first(x).relu(), x, use_reentrant=self.use_reentrant)
        return checkpoint(lambda x: self.second(x).tanh(), x, use_reentrant=self.use_reentrant)


class Pair(NamedTuple):
    hidden: torch.Tensor
    weights: torch.Tensor | None


@dataclasses.dataclass
class Output:
    nothing: None
    hidden: torch.Tensor


STRUCTURES = [
    lambda x: x,
    lambda x: (x, None),
    lambda x: [None, {"a": None, "b": (x,)}],
    lambda x: {"loss": None, "hidden": x},
    lambda x: Pair(x, None),
    lambda x: Output(None, x),
]


@pytest.mark.parametrize("make", STRUCTURES)
def test_the_main_tensor_is_the_first_one_of_the_structure(make):
    model, x = nn.Sequential(Returning(make)), torch.randn(2, 3)
    with capture(model, "0") as acts:
        model(x)
    assert torch.equal(acts["0"], x)


@pytest.mark.parametrize(
    ("make", "select"),
    [
        (lambda x: (x + 1, x), 1),
        (lambda x: (x + 1, x), -1),
        (lambda x: {"a": x + 1, "b": x}, "b"),
        (lambda x: {"a": x + 1, "b": x}, 1),
        (lambda x: Pair(x + 1, x), "weights"),
        (lambda x: Output(None, x), "hidden"),
        (lambda x: (x + 1, (x + 2, x)), lambda value: value[1][1]),
    ],
)
def test_select_takes_an_index_a_key_or_a_callable(make, select):
    model, x = nn.Sequential(Returning(make)), torch.randn(2, 3)
    with capture(model, outputs("0", select=select)) as acts:
        model(x)
    assert torch.equal(acts["0"], x)


@pytest.mark.parametrize("select", [None, 5, "no", lambda value: None])
def test_a_value_without_a_tensor_is_an_error_and_the_hooks_are_gone(select):
    model = nn.Sequential(Returning(lambda x: ("text", None)))
    with pytest.raises(ValueNotFoundError, match="Layer '0' has no tensor to record") as caught:
        with capture(model, outputs("0", select=select)):
            model(torch.randn(2, 3))
    assert (caught.value.layer, caught.value.value_type) == ("0", "tuple")
    assert count_hooks(model) == 0


@pytest.mark.parametrize(
    ("make", "select", "reason"),
    [
        (lambda x: (x, None), 1, "at select=1, the selected part of its tuple is None. Choose another part"),
        (lambda x: Pair(x, None), "weights", "the selected part of its Pair is None"),
        (lambda x: {"hidden": x, "loss": None}, "loss", "the selected part of its dict is None"),
        (lambda x: (x, None), 5, "its value is a tuple of 2, which has no such part. Choose the part"),
        (lambda x: (x, None), -3, "its value is a tuple of 2, which has no such part"),
        (lambda x: {"a": x, "b": x}, "c", "its value is a dict with 'a', 'b', which has no such part"),
        (lambda x: Output(None, x), "hiden", "its value is a Output, which has no such part"),
        (lambda x: (x, 3), 1, "the selected part of its tuple is of type int"),
        (lambda x: x, lambda x: None, "the selected part of its Tensor is None"),
        (lambda x: None, None, "has no tensor to record, its value is of type NoneType"),
    ],
)
def test_why_a_part_has_no_tensor_is_said(make, select, reason):
    model = nn.Sequential(Returning(make))
    with pytest.raises(ValueNotFoundError) as caught, capture(model, outputs("0", select=select)):
        model(torch.ones(2, 4))
    assert reason in str(caught.value)
    assert ("eager" in str(caught.value)) is False


def test_attention_weights_that_sdpa_does_not_compute_are_named_with_the_remedy():
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    config = transformers.BertConfig(vocab_size=9, **sizes)
    wanted, ids = outputs("encoder.layer.0.attention.self", select=1), torch.tensor([[1, 2, 3]])
    fused = transformers.AutoModel.from_config(config, attn_implementation="sdpa").eval()
    with pytest.raises(ValueNotFoundError) as caught, capture(fused, wanted):
        fused(ids)
    assert "the selected part of its tuple is None. Attention weights are computed with attn_impl" in str(caught.value)
    eager = transformers.AutoModel.from_config(config, attn_implementation="eager").eval()
    with capture(eager, wanted) as acts:
        eager(ids)
    assert acts["encoder.layer.0.attention.self"].shape == (1, 2, 3, 3)


def test_weights_that_multihead_attention_was_not_asked_for_are_named_with_the_remedy():
    model, x = nn.MultiheadAttention(4, 2, batch_first=True), torch.ones(1, 3, 4)
    with pytest.raises(ValueNotFoundError, match="need_weights=True"), capture(model, outputs("", select=1)):
        model(x, x, x, need_weights=False)
    with capture(model, outputs("", select=1)) as acts:
        model(x, x, x, need_weights=True)
    assert acts[""].shape == (1, 3, 3)


@pytest.mark.parametrize("options", [{}, {"copy": False}, {"calls": "all"}, {"reduce": "mean", "mask": None}])
def test_the_first_of_several_tensors_is_said_in_the_table(options):
    structures = [lambda x: (x, [x, None]), lambda x: {"a": x, "b": Pair(x, x)}, lambda x: [x]]
    model = nn.ModuleList(map(Returning, structures))
    wanted = [{"tuple": "0"}, {"dict": "1"}, {"one": "2"}, {"part": outputs("1", select="b")}]
    with capture(model, wanted, **options) as acts:
        for module in model:
            module(torch.ones(2, 3, 4))
    lines = repr(acts).splitlines()
    notes = {line.split()[0].partition("#")[0]: line.partition("first of ")[2] for line in lines[2:]}
    assert notes == {"tuple": "2 tensors", "dict": "3 tensors", "one": "", "part": "2 tensors"}


def test_tables_of_plain_tensors_have_no_column_of_notes(stack, tokens):
    with capture(stack, "h.*") as acts:
        stack(tokens)
    assert "note" not in repr(acts)
    assert "note" not in acts._repr_html_()


def test_inputs_are_taken_before_the_call_and_by_the_signatures_names():
    def overwrite(x):
        return x.zero_()

    model, x, bias = nn.Sequential(), torch.randn(2, 3), torch.randn(3)
    model.add_module("layer", Returning(overwrite))
    model.forward = lambda *args, **kwargs: model.layer(*args, **kwargs)
    wanted = {
        "main": inputs("layer"),
        "by_name": inputs("layer", select="bias"),
        "by_position": inputs("layer", select=0),
        "extra": inputs("layer", select="mask"),
        "rest": inputs("layer", select="rest"),
        "made": inputs("layer", select=lambda arguments: arguments["x"] * arguments["scale"]),
    }
    expected = x.clone()
    with capture(model, wanted) as acts:
        model(x, 3, bias + 1, bias=bias, mask=bias + 2)
    assert (x == 0).all()
    assert torch.equal(acts["main"], expected)
    assert torch.equal(acts["by_position"], expected)
    assert torch.equal(acts["made"], expected * 3)
    assert torch.equal(acts["by_name"], bias)
    assert torch.equal(acts["rest"], bias + 1)
    assert torch.equal(acts["extra"], bias + 2)


def test_a_module_called_with_keywords_alone_has_inputs_too():
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = Returning(lambda x: (x, None))

        def forward(self, x):
            return self.layer(x=x, bias=None)

    model, x = Outer(), torch.randn(2, 3)
    with capture(model, [inputs("layer"), "layer"]) as acts:
        model(x)
    assert torch.equal(acts["layer:input"], x)


def test_a_call_that_does_not_fit_the_signature_raises_the_models_own_error():
    model = nn.Sequential(nn.Linear(3, 3))
    with pytest.raises(TypeError, match="forward"), capture(model, inputs("0", select=lambda arguments: torch.ones(1))):
        model[0](torch.randn(2, 3), 4, 5)


def test_vmap_is_an_error_that_says_so(stack):
    model = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(TransformedCallError) as caught, capture(model, "0"):
        torch.vmap(model)(torch.randn(3, 4))
    assert str(caught.value) == (
        "Layer '0' ran inside vmap or another transform of torch.func, where a value is a slice of the batch. "
        "Capture a plain call of the model instead."
    )
    for selection in (inputs("0"), gradients("0")):
        with pytest.raises(TransformedCallError), capture(model, selection):
            torch.func.grad(lambda x: model(x).sum())(torch.randn(4))
    assert count_hooks(model) == 0


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_a_layer_that_checkpointing_runs_again_is_recorded_once_and_its_gradient_is_right(use_reentrant):
    torch.manual_seed(0)
    model, x = Checkpointed(use_reentrant), torch.randn(2, 4, requires_grad=True)
    with capture(model, ["*", gradients("*"), inputs("*")], calls="all") as acts:
        out = model(x)
        out.square().sum().backward()
    hidden = model.first(x)
    other = model.second(hidden.relu())
    expected = torch.autograd.grad(other.tanh().square().sum(), [hidden, other])
    assert [len(acts[name]) for name in acts] == [1] * 6
    assert torch.equal(acts["first"][0], hidden)
    torch.testing.assert_close(acts["first:gradient"][0], expected[0])
    torch.testing.assert_close(acts["second:gradient"][0], expected[1])


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_a_checkpointed_root_is_one_forward(use_reentrant):
    model, x = nn.Sequential(nn.Linear(4, 4), nn.Tanh()), torch.randn(2, 4, requires_grad=True)
    with capture(model, ["0", gradients("0")], calls="all") as acts:
        checkpoint(model, x, use_reentrant=use_reentrant).sum().backward()
    assert (len(acts["0"]), len(acts["0:gradient"])) == (1, 1)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradients_of_a_checkpointed_layer_that_runs_twice_are_in_order(use_reentrant):
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x):
            for _ in range(2):
                x = checkpoint(self.layer, x, use_reentrant=use_reentrant)
            return x

    model, x = Twice(), torch.randn(2, 4, requires_grad=True)
    with capture(model, gradients("layer"), calls="all") as acts:
        model(x).sum().backward()
    first, second = acts["layer:gradient"]
    assert torch.equal(second, torch.ones(2, 4))
    torch.testing.assert_close(first, second @ model.layer.weight)


def test_a_second_backward_replaces_the_gradient(stack, tokens):
    with capture(stack, gradients("h.3")) as acts:
        out = stack(tokens)
        out.sum().backward(retain_graph=True)
        (out * 3).sum().backward()
    assert torch.equal(acts["h.3:gradient"], torch.full((2, 5, 8), 3.0))


def test_hooks_on_tensors_are_gone_after_the_block(stack, tokens):
    with capture(stack, gradients("")) as acts:
        out = stack(tokens)
        out.sum().backward(retain_graph=True)
    assert not out._backward_hooks
    (out * 3).sum().backward()
    assert torch.equal(acts[":gradient"], torch.ones(2, 5, 8))


def test_a_tied_module_is_recorded_under_each_of_its_names():
    shared = nn.Linear(4, 4)
    model, x = nn.Sequential(shared, nn.ReLU(), nn.Sequential(shared)), torch.randn(2, 4)
    with capture(model, ["0", "2.0"], calls="all") as acts:
        model(x)
    assert [len(acts[name]) for name in ("0", "2.0")] == [2, 2]
    assert torch.equal(acts["2.0"][1], acts["0"][1])


def test_a_hook_of_another_goes_on_working_beside_ours(stack, tokens):
    handle = stack.h[0].register_forward_hook(lambda module, args, output: output * 0)
    with capture(stack, "h.0") as acts:
        stack(tokens)
    assert (acts["h.0"] == 0).all()  # what the layer hands on, foreign hooks included
    handle.remove()
