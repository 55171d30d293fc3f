"""Layers that cannot be combined: an error that names them, and what it could refuse by mistake."""

from __future__ import annotations

import pytest
import torch
import transformers as tf
from models import Repeating
from torch import nn

from activation_extractor import capture, combined
from activation_extractor.errors import (
    ArgumentError,
    ArgumentTypeError,
    CombinationError,
    DuplicateLayerError,
    LayerNotFoundError,
    LayerNotRunError,
    TensorKindError,
)

LEFT = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
TOKENS = torch.tensor([[3, 4, 5, 6, 7], [9, 8, 7, 6, 5]])


def norm(activation, mask):
    return activation.norm(dim=-1).amax(1)


class Mixed(nn.Module):
    def __init__(self):
        super().__init__()
        self.narrow, self.wide, self.conv, self.low = (
            nn.Linear(4, 4),
            nn.Linear(4, 6),
            nn.Conv1d(4, 4, 1),
            nn.Identity(),
        )

    def forward(self, x):
        self.low(x.half())
        return self.wide(self.narrow(x)), self.conv(x)


@pytest.mark.parametrize("reduce", ["full", "mean", "max", norm])
def test_other_shapes_and_dtypes_are_an_error_that_names_the_layers(reduce):
    for names, how, text in [
        (["narrow", "wide"], "mean", r"have one shape, got \(2, 4(, 4)?\) of 'narrow' and \(2, (4, )?6\) of 'wide'"),
        (["narrow", "low"], "mean", "have one dtype, got float32 of 'narrow' and float16 of 'low'"),
        (["low", "narrow"], "concat", "have one dtype, got float16 of 'low' and float32 of 'narrow'"),
    ]:
        model = Mixed()
        with pytest.raises(CombinationError, match=f"The layers combined as 'x' must {text}"):
            with capture(model, {"x": combined(names, how)}, reduce=reduce, sequence_axis={"low": 1}):
                model(torch.rand(2, 4, 4))


def test_layers_of_other_layouts_are_not_taken_for_each_other():
    model = Mixed()
    for how, kind in (("mean", "axis of the sequence"), ("concat", "axis of features")):
        with pytest.raises(CombinationError, match=f"have one {kind}, got "):
            with capture(model, {"x": combined(["narrow", "conv"], how)}):
                model(torch.rand(2, 4, 4))
    with capture(model, {"x": combined(["narrow", "conv"], "concat")}, reduce="mean") as acts:
        model(x := torch.rand(2, 4, 4))  # reduced, each in its own layout
    assert torch.allclose(acts["x"], torch.cat([model.narrow(x).mean(1), model.conv(x).mean(2)], -1), atol=1e-6)


def test_convolutions_go_side_by_side_in_their_channels():
    model = nn.Sequential(nn.Conv1d(3, 3, 3, padding=1), nn.Conv1d(3, 5, 3, padding=1))
    x = torch.rand(2, 3, 7)
    with capture(model, {"x": combined("*", "concat")}) as acts:
        model(x)
    assert torch.equal(acts["x"], torch.cat([model[0](x), model(x)], 1))
    images = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 5, 3, padding=1))
    x = torch.rand(2, 3, 6, 6)
    with capture(images, {"x": combined("*", "concat")}, sequence_axis=(2, 3), reduce=["full", "mean", norm]) as acts:
        images(x)
    whole = torch.cat([images[0](x), images(x)], 1)
    assert torch.equal(acts["x", "full"], whole)
    assert torch.allclose(acts["x", "mean"], whole.mean((2, 3)), atol=1e-6)
    assert torch.allclose(acts["x", "norm"], whole.norm(dim=1).flatten(1).amax(1), atol=1e-6)
    with capture(images, {"x": combined("0", "mean")}) as acts:  # a mean needs to know no axes
        images(x)
    assert torch.equal(acts["x"], images[0](x))


def test_layers_with_other_padding_are_not_reduced_as_one():
    config = tf.T5Config(vocab_size=30, d_model=8, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
    model, ids = tf.T5Model(config).eval(), torch.tensor([[5, 6, 7], [5, 0, 0]])
    layers, whole = {"x": combined(["encoder.block.0", "decoder.block.0"], "mean")}, torch.ones_like(ids)

    def run(mask):
        with capture(model, layers, reduce=["max", "first"]) as acts:
            model(input_ids=ids, attention_mask=mask, decoder_input_ids=ids, decoder_attention_mask=whole)
        return acts

    got = "others in 'decoder.block.0' than in 'encoder.block.0'"
    with pytest.raises(CombinationError, match=f"have the same real positions, got {got}"):
        run(ids != 0)
    assert run(whole.clone())["x", "max"].shape == (2, 8)  # the same ones, in another mask


def test_a_layer_that_did_not_run_is_named_and_may_be_skipped(branching):
    layers = {"x": combined(["first", "second"], "mean")}
    with pytest.raises(LayerNotRunError, match=r"did not run in the step: 'second' \("):
        with capture(branching, layers):
            branching(torch.rand(2, 4))
    with capture(branching, layers, missing="skip") as acts:
        branching(torch.rand(2, 4))
    assert len(acts) == 0
    assert "x" not in acts
    with pytest.raises(KeyError, match="Nothing"):
        acts["x"]


@pytest.fixture
def branching():
    class Branching(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x, both=False):
            return self.second(self.first(x)) if both else self.first(x)

    return Branching()


def test_values_of_two_forwards_are_never_combined(branching):
    with pytest.raises(LayerNotRunError, match="'second'"):
        with capture(branching, {"x": combined(["first", "second"], "mean")}):
            branching(torch.rand(2, 4), both=True)
            branching(torch.rand(2, 4))


def test_a_layer_that_runs_several_times_counts_as_ever():
    model = nn.Sequential(Repeating(), nn.Linear(4, 4))
    x = torch.rand(2, 4)
    layers = {"x": combined(["0.layer", "1"], "concat")}
    with pytest.warns(UserWarning, match="ran several times"), capture(model, layers) as acts:
        y = model(x)
    assert torch.equal(acts["x"], torch.cat([model[0](x), y], -1))
    with pytest.raises(CombinationError, match="run equally often, got 3 calls of '0.layer' and 1 of '1'"):
        with capture(model, layers, calls="all"):
            model(x)


def test_calls_are_combined_one_by_one_or_joined(stack):
    layers = {"x": combined(["h.0", "h.3"], "concat")}

    def run(layers, **options):
        with capture(stack, layers, **options) as acts:
            stack(TOKENS, LEFT)
            stack(TOKENS.flip(0), LEFT)
        return acts

    parts, plain = run(layers, calls="all", reduce=["full", norm]), run(["h.0", "h.3"], calls="all")
    whole = [torch.cat([plain["h.0"][call], plain["h.3"][call]], -1) for call in range(2)]
    assert all(map(torch.equal, parts["x", "full"], whole))
    assert all(map(torch.equal, parts["x", "norm"], [norm(one, None) for one in whole]))


@pytest.mark.parametrize(
    ("wrong", "error", "text"),
    [
        (combined("h.*", "mean"), ArgumentTypeError, "what is combined must have a name of its own"),
        ({"a": combined(combined("h.*", "mean"), "mean")}, ArgumentTypeError, "must have a name of its own"),
        ({"a": combined("g.*", "mean")}, LayerNotFoundError, "No layer matches 'g.*'"),
        ({"a": combined([], "mean")}, ArgumentError, "the layers combined as 'a' must be at least one"),
        ([{"a": combined("h.*", "mean")}, {"a": combined("h.0", "mean")}], DuplicateLayerError, "twice"),
        ([{"h.0": combined("h.*", "mean")}, "h.0"], DuplicateLayerError, "'h.0' for two things, of which one is"),
        ({"a": combined(["h.0", "h.0"], "mean")}, DuplicateLayerError, "twice"),
        ({3: combined("h.*", "mean")}, ArgumentTypeError, "a new name in layers must be a string"),
    ],
)
def test_what_cannot_be_selected_is_refused_at_the_door(stack, wrong, error, text):
    with pytest.raises(error, match=text.replace("*", r"\*")):
        capture(stack, wrong)


def test_how_is_one_of_two_words():
    with pytest.raises(ArgumentError, match="how of combined must be 'mean' or 'concat', got 'sum'"):
        combined("h.*", "sum")


@pytest.mark.parametrize("how", ["mean", "concat"])
@pytest.mark.parametrize("make", [torch.Tensor.bool, torch.Tensor.to_sparse, lambda x: x.to(torch.float8_e4m3fn)])
def test_every_kind_of_tensor_is_combined_dense(how, make):
    model, x = nn.Sequential(nn.Identity(), nn.Identity()), torch.rand(2, 3, 4)
    for reduce in ("full", "mean", "max"):
        with capture(model, {"x": combined("*", how)}, reduce=reduce) as acts:
            model(make(x))
        assert acts["x"].shape == ((2, 3) if reduce == "full" else (2,)) + ((4,) if how == "mean" else (8,))


def test_nested_activations_are_combined_once_they_are_reduced():
    model, parts = nn.Sequential(nn.Identity(), nn.Identity()), [torch.rand(3, 2), torch.rand(5, 2)]
    nested = torch.nested.nested_tensor(parts, layout=torch.jagged)
    with capture(model, {"x": combined("*", "concat")}, reduce="mean") as acts:
        model(nested)
    assert torch.allclose(acts["x"], torch.stack([part.mean(0).repeat(2) for part in parts]))
    with pytest.raises(TensorKindError, match="layer '0' must hold plain numbers to be combined as 'x', got a nested"):
        with capture(model, {"x": combined("*", "mean")}):
            model(nested)
