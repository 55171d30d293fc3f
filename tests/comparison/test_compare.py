"""`compare` on models: one layer is silently broken, and is found."""

from __future__ import annotations

import math

import pytest
import torch
from models import BlockStack
from tiny import tiny_bert
from torch import nn

from activation_extractor import capture, compare, gradients, inputs
from activation_extractor.errors import MatchError

BLOCKS = range(4)
ENCODER = range(3)


@pytest.fixture(autouse=True)
def without_gradients():
    with torch.no_grad():
        yield


def model(blocks: int = 4) -> BlockStack:
    torch.manual_seed(0)
    return BlockStack(blocks).eval()


def record(module, data, layers="**", **options):
    with capture(module, layers, **{"missing": "skip", **options}) as acts:
        module(data)
    return acts


def sequence() -> torch.Tensor:
    return torch.randint(4, 24, (2, 9), generator=torch.Generator().manual_seed(3))


class Rounded(nn.Module):
    """What a layer returns, as bfloat16 holds it."""

    def __init__(self, layer: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.layer, self.dtype = layer, dtype

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x.bfloat16().float()).bfloat16().to(self.dtype)


# -- one layer is broken ----------------------------------------------------------------------------------------------


def wrong_epsilon(block):
    block.norm.eps = 1e-2
    return "norm"


def transposed_weight(block):
    block.mlp.weight.copy_(block.mlp.weight.T.clone())
    return "mlp"


def perturbed_weight(block):
    block.mlp.weight[3, 5] += 0.02
    return "mlp"


def forgotten_bias(block):
    block.mlp.bias.zero_()
    return "mlp"


def rounded_values(block):
    inner = block.mlp.forward
    block.mlp.forward = lambda x: inner(x.bfloat16().float()).bfloat16().float()
    return "mlp"


def missing_residual(block):
    block.forward = lambda x: block.mlp(block.norm(x))
    return ""


BROKEN = [wrong_epsilon, transposed_weight, perturbed_weight, forgotten_bias, rounded_values, missing_residual]


@pytest.mark.parametrize("number", BLOCKS)
@pytest.mark.parametrize("break_one", BROKEN)
def test_the_layer_that_was_broken_is_the_first_that_differs(tokens, break_one, number):
    right, broken, reference = model(), model(), record(model(), tokens)
    part = break_one(broken.h[number])
    found = compare(reference, record(broken, tokens))
    assert found.first_difference == f"h.{number}.{part}".removesuffix(".")
    assert not found.ok
    assert compare(reference, record(right, tokens)).ok


@pytest.mark.parametrize("number", BLOCKS)
def test_no_layer_before_the_broken_one_differs_and_those_behind_it_do(tokens, number):
    broken = model()
    transposed_weight(broken.h[number])
    found = compare(record(model(), tokens), record(broken, tokens))
    layers = [row.layer for row in found]
    assert [row.layer for row in found if not row.ok] == layers[layers.index(f"h.{number}.mlp") :]


@pytest.mark.parametrize("number", ENCODER)
@pytest.mark.parametrize("activation", [nn.SiLU(), nn.ReLU(), nn.GELU(approximate="tanh")], ids=str)
def test_another_activation_is_found_in_bert(number, activation):
    broken, name = tiny_bert(), f"encoder.layer.{number}.intermediate"
    broken.get_submodule(name).intermediate_act_fn = activation
    found = compare(record(tiny_bert(), sequence()), record(broken, sequence()), rtol=1e-6)
    assert found.first_difference == f"{name}.intermediate_act_fn"


@pytest.mark.parametrize("number", ENCODER)
@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("attention.output.LayerNorm", lambda layer: setattr(layer, "eps", 1e-3)),
        ("attention.self.key", lambda layer: layer.weight.copy_(layer.weight.T.clone())),
        ("output.dense", lambda layer: layer.weight[0].mul_(1.01)),
        ("output.LayerNorm", lambda layer: layer.bias.add_(1e-2)),
    ],
)
def test_a_broken_layer_is_found_in_bert(number, name, change):
    broken, name = tiny_bert(), f"encoder.layer.{number}.{name}"
    change(broken.get_submodule(name))
    assert compare(record(tiny_bert(), sequence()), record(broken, sequence())).first_difference == name


@pytest.mark.parametrize("number", BLOCKS)
def test_one_layer_that_returns_bfloat16_is_a_difference_in_dtype(tokens, number):
    broken = model()
    broken.h[number].norm = Rounded(broken.h[number].norm, torch.bfloat16)
    broken.h[number].mlp.forward = lambda x: nn.Linear.forward(broken.h[number].mlp, x.float())
    left, right = record(model(), tokens, "h.*.norm"), record(broken, tokens, "h.*.norm")
    found = compare(left, right)
    assert found.first_difference == f"h.{number}.norm"
    assert found[number].differences == ("dtype",)
    assert found[number].dtypes == (torch.float32, torch.bfloat16)
    assert found[number].rtol == 0.25  # the coarser dtype's
    assert compare(left, right, check_dtype=False)[number].ok
    assert compare(left, right, check_dtype=False, rtol=1e-4)[number].differences == ("values",)


def test_a_whole_model_in_bfloat16_is_the_same_unless_its_dtype_counts(tokens):
    left, right = record(model(), tokens), record(model().bfloat16(), tokens)
    found = compare(left, right)
    assert found.ok, found
    assert {row.rtol for row in found} == {0.25}
    assert compare(left, right, check_dtype=False).ok
    strict = compare(left, right, check_dtype=True)
    assert {row.differences for row in strict} == {("dtype",)}
    broken = model().bfloat16()
    transposed_weight(broken.h[2])
    assert compare(left, record(broken, tokens)).first_difference == "h.2.mlp"


# -- a port under other names -----------------------------------------------------------------------------------------


class Port(nn.Module):
    """The same stack, as somebody else would write it."""

    def __init__(self, source: BlockStack) -> None:
        super().__init__()
        self.wte = source.embed
        parts = [nn.ModuleDict({"ln": block.norm, "fc": block.mlp}) for block in source.h]
        self.layers = nn.ModuleList(map(PortBlock, parts))

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        x = self.wte(input_ids)
        for layer in self.layers:
            x = layer(x)
        return x


class PortBlock(nn.Module):
    def __init__(self, part: nn.ModuleDict) -> None:
        super().__init__()
        self.part = part

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.part["fc"](self.part["ln"](x))


NAMES = {"embed": "wte", "h.*.norm": "layers.*.part.ln", "h.*.mlp": "layers.*.part.fc", "h.*": "layers.*"}


def renamed(name):
    name = name.replace("h.", "layers.", 1).replace("norm", "part.ln").replace("mlp", "part.fc")
    return name.replace("embed", "wte")


@pytest.mark.parametrize("match", [NAMES, renamed, "order"], ids=["dict", "callable", "order"])
def test_a_port_under_other_names_is_matched(tokens, match):
    left = record(model(), tokens)
    assert compare(left, record(Port(model()), tokens), match=match).ok
    broken = model()
    wrong_epsilon(broken.h[1])
    found = compare(left, record(Port(broken), tokens), match=match)
    assert len(found) == 13
    assert found.first_difference == "h.1.norm"
    assert next(row for row in found if not row.ok).other == "layers.1.part.ln"
    with pytest.raises(MatchError, match="must share a layer and reducer"):
        compare(left, record(Port(broken), tokens))


def test_layers_that_one_side_lacks_are_differences(tokens):
    short, long = record(model(2), tokens, "h.*"), record(model(3), tokens, ["embed", "h.*"])
    found = compare(long, short)
    assert {row.layer: row.differences for row in found if not row.ok} == {
        "embed": ("missing on the right",),
        "h.2": ("missing on the right",),
    }
    assert found.first_difference == "embed"
    last = compare(short, long)[-1]
    assert (last.layer, last.other, last.differences) == ("h.2", "h.2", ("missing on the left",))
    assert (last.dtypes, last.shapes) == ((None, torch.float32), (None, (2, 5, 8)))
    assert (found[0].other, found[0].shapes) == (None, ((2, 5, 8), None))
    assert all(math.isnan(one) for one in (last.max_abs, last.max_rel, last.cosine, last.rtol, last.atol))
    assert compare(long, short, match={"h.[01]": "h.[01]"}).ok


def test_reducers_are_compared_one_by_one(tokens):
    left, right = ({"reduce": one} for one in (["mean", "last"], ["last", "max"]))
    found = compare(record(model(), tokens, "h.0", **left), record(model(), tokens, "h.0", **right))
    assert [(row.reducer, row.differences) for row in found] == [
        ("mean", ("missing on the right",)),
        ("last", ()),
        ("max", ("missing on the left",)),
    ]
    pooled = record(model(), tokens, "h.0", reduce="mean")
    assert compare(pooled, {"h.0": pooled["h.0"]})[0].reducer == "mean"
    assert compare({"h.0": pooled["h.0"]}, pooled)[0].reducer == "mean"


@pytest.mark.parametrize("number", BLOCKS)
def test_of_gradients_the_first_difference_is_the_first_of_backward(tokens, number):
    def run(module):
        with torch.enable_grad(), capture(module, [inputs("h.*"), gradients("h.*")]) as acts:
            module(tokens).square().sum().backward()
        return acts

    broken = model()
    broken.h[number].register_full_backward_hook(lambda layer, grads, _: (grads[0] * 2,))
    found = compare(run(model()), run(broken))
    expected = f"h.{number - 1}:gradient" if number else None
    assert found.first_difference == expected
    assert [row.layer for row in found if not row.ok] == [f"h.{one}:gradient" for one in reversed(range(number))]


# -- what is the same -------------------------------------------------------------------------------------------------


def test_a_model_is_the_same_as_itself_to_the_bit(tokens):
    found = compare(record(model(), tokens), record(model(), tokens), rtol=0, atol=0)
    assert found.ok
    assert {(row.max_abs, row.max_rel) for row in found} == {(0.0, 0.0)}


def test_more_threads_and_another_batch_make_no_difference():
    data = torch.randint(4, 24, (6, 40), generator=torch.Generator().manual_seed(3))
    left = record(tiny_bert(), data)
    torch.set_num_threads(2)
    try:
        threaded = record(tiny_bert(), data)
    finally:
        torch.set_num_threads(1)
    assert compare(left, threaded).ok
    alone = {name: value[:2] for name, value in left.items() if len(value) == 6}
    assert compare(alone, record(tiny_bert(), data[:2], list(alone))).ok
