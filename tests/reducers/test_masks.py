"""Which positions are real: where a mask comes from."""

from __future__ import annotations

import pytest
import torch
import transformers
from models import BlockStack
from pooling import assert_mean_over, mean_by
from torch import nn

from activation_extractor import capture, inputs
from activation_extractor.errors import ArgumentError, MaskError

RIGHT = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]])
LEFT = torch.tensor([[0, 1, 1, 1, 1], [0, 0, 0, 0, 1]])
ALL = torch.ones(2, 5, dtype=torch.int64)


class TakesAnything(BlockStack):
    """Takes a dict of features, or keyword arguments of any name."""

    def forward(self, features=None, **others):
        return super().forward({**(features or {}), **others}["input_ids"])


# -- the default ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mask", [RIGHT, LEFT, RIGHT.bool(), RIGHT.float(), RIGHT.to(torch.uint8), 2 * RIGHT])
def test_by_default_the_mask_is_the_attention_mask_of_the_call(stack, tokens, mask):
    assert_mean_over(mask, mean_by(stack, "h.2", "attention_mask", tokens, attention_mask=mask))
    assert_mean_over(mask, mean_by(stack, "h.2", "attention_mask", tokens, mask))
    with torch.no_grad(), capture(stack, "h.2", reduce="mean") as acts:
        stack(attention_mask=mask, input_ids=tokens)
    assert torch.equal(acts["h.2"], mean_by(stack, "h.2", "attention_mask", tokens, mask)[1])


@pytest.mark.parametrize("make", [dict, transformers.BatchEncoding])
def test_the_mask_is_found_in_a_dict_that_is_an_argument(tokens, make):
    model = TakesAnything().eval()
    features = make({"input_ids": tokens, "attention_mask": RIGHT})
    for args, kwargs in (((features,), {}), ((), {"features": features}), ((), dict(features))):
        assert_mean_over(RIGHT, mean_by(model, "h.0", "attention_mask", *args, **kwargs))


@pytest.mark.parametrize("kwargs", [{}, {"attention_mask": None}])
def test_without_a_mask_every_position_is_real(stack, tokens, kwargs):
    assert_mean_over(ALL, mean_by(stack, "h.2", "attention_mask", tokens, **kwargs))


def test_a_model_without_such_an_argument_has_no_padding():
    assert_mean_over(ALL, mean_by(nn.Sequential(nn.Linear(3, 3)), "0", "attention_mask", torch.randn(2, 5, 3)))


def test_a_mask_fits_inputs_and_each_call_has_its_own(stack, tokens):
    with torch.no_grad(), capture(stack, inputs("h.1"), reduce="last", calls="all") as acts:
        whole = []
        with capture(stack, "h.0") as before:
            for mask in (RIGHT, LEFT):
                stack(tokens, mask)
                whole.append(before["h.0"])
    assert torch.equal(acts["h.1:input"][0], torch.stack([whole[0][0, 4], whole[0][1, 1]]))
    assert torch.equal(acts["h.1:input"][1], whole[1][:, 4])


# -- encoder and decoder ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def t5() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.T5Config(vocab_size=30, d_model=8, d_kv=4, d_ff=16, num_layers=2, num_heads=2)
    return transformers.T5Model(config).eval()


@pytest.fixture
def pairs() -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    return {
        "input_ids": torch.randint(1, 30, (2, 5)),
        "attention_mask": RIGHT,
        "decoder_input_ids": torch.randint(1, 30, (2, 5)),
        "decoder_attention_mask": torch.tensor([[1, 0, 0, 0, 0], [1, 1, 1, 1, 0]]),
    }


def test_a_decoder_takes_its_own_mask_by_default(t5, pairs):
    assert_mean_over(pairs["decoder_attention_mask"], mean_by(t5, "decoder.block.1", "attention_mask", **pairs))
    assert_mean_over(RIGHT, mean_by(t5, "encoder.block.1", "attention_mask", **pairs))


def test_a_decoder_without_a_mask_of_its_own_has_no_padding(t5, pairs):
    del pairs["decoder_attention_mask"]
    assert_mean_over(ALL, mean_by(t5, "decoder.block.1", "attention_mask", **pairs))


def test_a_decoder_takes_its_own_mask_also_in_a_model_that_takes_any_argument(t5, pairs):
    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = t5

        def forward(self, **batch):
            return self.inner(**batch)

    values = mean_by(Wrapped(), "inner.decoder.block.1", "attention_mask", **pairs)
    assert_mean_over(pairs["decoder_attention_mask"], values)


# -- what else mask= takes --------------------------------------------------------------------------------------------


def test_a_tensor_is_the_mask_of_every_layer(stack, tokens):
    assert_mean_over(LEFT, mean_by(stack, "h.2", LEFT, tokens, attention_mask=RIGHT))


def test_another_argument_may_be_named(t5, pairs, tokens):
    assert_mean_over(RIGHT, mean_by(t5, "decoder.block.0", {"**": "attention_mask"}, **pairs))
    assert_mean_over(pairs["decoder_attention_mask"], mean_by(t5, "encoder.block.0", "decoder_attention_mask", **pairs))
    anything = {"input_ids": tokens, "pads": LEFT}
    assert_mean_over(LEFT, mean_by(TakesAnything().eval(), "h.0", "pads", **anything))
    assert_mean_over(LEFT, mean_by(TakesAnything().eval(), "h.0", "pads", anything))


def test_an_argument_inside_a_dict_may_be_named(tokens):
    class TakesFeatures(BlockStack):
        def forward(self, features):
            return super().forward(features["input_ids"])

    features = {"input_ids": tokens, "pads": LEFT}
    assert_mean_over(LEFT, mean_by(TakesFeatures().eval(), "h.0", "pads", features))


def test_none_means_that_nothing_is_padding(stack, tokens):
    assert_mean_over(ALL, mean_by(stack, "h.2", None, tokens, attention_mask=RIGHT))


def test_a_dict_says_it_by_pattern_and_the_first_that_fits_counts(stack, tokens):
    mask = {"h.0": None, "h.[01]": LEFT, "h.2.**": "attention_mask"}
    for layer, expected in (("h.0", ALL), ("h.1", LEFT), ("h.2.mlp", RIGHT), ("h.3", RIGHT)):
        assert_mean_over(expected, mean_by(stack, layer, mask, tokens, attention_mask=RIGHT))


def test_a_callable_is_given_layer_activation_and_mask(stack, tokens):
    seen = []

    def shift(layer, activation, mask):
        seen.append((layer, tuple(activation.shape), mask.dtype))
        return mask.flip(1) if layer == "h.0" else None

    assert_mean_over(RIGHT.flip(1), mean_by(stack, "h.0", shift, tokens, attention_mask=RIGHT))
    assert_mean_over(ALL, mean_by(stack, "h.1", shift, tokens, attention_mask=RIGHT))
    assert seen == [("h.0", (2, 5, 8), torch.bool), ("h.1", (2, 5, 8), torch.bool)]


def test_a_callable_is_given_none_where_the_call_had_no_mask(stack, tokens):
    assert_mean_over(LEFT, mean_by(stack, "h.0", lambda layer, activation, mask: mask or LEFT, tokens))


class Pooling(nn.Module):
    """Leaves out every second position."""

    def forward(self, x):
        return x[:, ::2]


class Shorter(BlockStack):
    """Its layer ``pool`` changes the sequence length."""

    def __init__(self):
        super().__init__()
        self.pool = Pooling()

    def forward(self, input_ids, attention_mask=None):
        return self.pool(super().forward(input_ids))

    def encode(self, input_ids):
        return self.pool(super().forward(input_ids))


def test_a_layer_that_changes_the_length_is_an_error_with_advice(tokens):
    model = Shorter().eval()
    with pytest.raises(MaskError) as caught:
        mean_by(model, "pool", "attention_mask", tokens, RIGHT)
    assert str(caught.value) == (
        "The mask for layer 'pool' must have shape (2, 3), got shape (2, 5). "
        "Pass mask=None if every position is real, or mask=callable(layer, activation, mask) that makes it fit."
    )
    assert caught.value.layer == "pool"
    assert_mean_over(ALL[:, :3], mean_by(model, "pool", None, tokens, RIGHT))


@pytest.mark.parametrize("mask", [RIGHT, RIGHT[:, None, None]])
def test_a_callable_may_give_the_mask_of_a_layer_that_changes_the_length(tokens, mask):
    model = Shorter().eval()
    values = mean_by(model, "pool", lambda layer, activation, mask: RIGHT[:, ::2], tokens, mask)
    assert_mean_over(RIGHT[:, ::2], values)


# -- outside the model's own call -------------------------------------------------------------------------------------


def test_a_layer_outside_the_models_own_call_is_an_error_and_the_advice_works(tokens):
    model = Shorter().eval()
    with pytest.raises(MaskError) as caught, capture(model, "h.0", reduce="mean"):
        model.encode(tokens)
    assert str(caught.value) == (
        "The mask for layer 'h.0' must come from 'attention_mask' of the model's own call, or of a module's around the "
        "layer, got a layer that ran outside of such a call. Capture the module that is called, or pass the mask "
        "itself as mask=; None only if nothing is padding."
    )
    for mask in (None, RIGHT):
        with torch.no_grad(), capture(model, "h.0", reduce=["full", "mean"], mask=mask) as acts:
            model.encode(tokens)
        assert_mean_over(ALL if mask is None else mask, (acts["h.0", "full"], acts["h.0", "mean"]))
    with capture(model.h[0], "", reduce="mean") as acts:
        model.encode(tokens)
    assert acts[""].shape == (2, 8)


def test_a_callable_may_give_the_mask_outside_the_models_own_call(tokens):
    model = Shorter()
    with capture(model, "h.0", reduce="mean", mask=lambda layer, activation, mask: RIGHT):
        model.encode(tokens)


def test_a_named_argument_that_the_call_does_not_have_is_an_error(tokens):
    with pytest.raises(MaskError, match="must come from 'pads' of the model's call, got no such argument"):
        mean_by(TakesAnything().eval(), "h.0", "pads", input_ids=tokens)


def test_a_mistyped_pattern_in_a_mask_is_an_error(stack):
    with pytest.raises(ArgumentError, match=r"a pattern in mask must match a layer of the model, got 'emebd'"):
        capture(stack, "h.0", reduce="mean", mask={"emebd": None})
