"""Arguments that may say what is padding, under names that do not say how: asked for, never passed over in silence."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

from activation_extractor import capture
from activation_extractor.errors import MaskError

X = torch.randn(2, 5, 4)
RIGHT = torch.tensor([[1, 1, 0, 0, 0], [1, 1, 1, 1, 1]])


def model_with(*names):
    scope = {"nn": nn}
    arguments = "".join(f", {name}=None" for name in names)
    exec(
        "class Model(nn.Module):\n"
        "    def __init__(self):\n        super().__init__(); self.layer = nn.Linear(4, 4)\n"
        f"    def forward(self, x{arguments}):\n        return self.layer(x)\n",
        scope,
    )
    return scope["Model"]()


def mean_by(model, *args, mask="attention_mask", **kwargs):
    with torch.no_grad(), capture(model, "layer", reduce="mean", mask=mask) as acts:
        model(*args, **kwargs)
    return acts["layer"]


def expected(model, mask):
    values = model.layer(X).detach()
    return torch.stack([row[real.bool()].mean(0) for row, real in zip(values, mask, strict=True)])


@pytest.mark.parametrize("name", ["padding_mask", "pad_mask", "encoder_padding_mask", "src_pad_mask", "padding_masks"])
def test_a_padding_mask_of_unknown_sense_is_asked_for(name):
    model = model_with(name)
    for args, kwargs in (((RIGHT,), {}), ((), {name: RIGHT.bool()})):
        with pytest.raises(MaskError, match=f"must be one whose sense is known, got {name!r} .* Pass mask={name!r} if"):
            mean_by(model, X, *args, **kwargs)
    torch.testing.assert_close(mean_by(model, X, RIGHT, mask=name), expected(model, RIGHT))
    torch.testing.assert_close(mean_by(model, X, 1 - RIGHT, mask=(1 - RIGHT) == 0), expected(model, RIGHT))
    assert mean_by(model, X, RIGHT, mask=None).shape == mean_by(model, X).shape == (2, 4)


def test_a_key_padding_mask_of_another_name_is_asked_for():
    model = model_with("history_key_padding_mask")
    with pytest.raises(MaskError, match="got 'history_key_padding_mask' .* if it is this layer's"):
        mean_by(model, X, RIGHT == 0)
    given = mean_by(model, X, RIGHT == 0, mask="history_key_padding_mask")
    torch.testing.assert_close(given, expected(model, RIGHT))


@pytest.mark.parametrize("name", ["mask", "input_mask", "token_mask", "valid_mask", "seq_mask"])
def test_a_mask_that_says_nothing_of_padding_is_passed_over_with_one_warning(name):
    model = model_with(name)
    with (
        torch.no_grad(),
        pytest.warns(UserWarning, match=f"'layer' is reduced over all positions.*mask={name!r}") as told,
    ):
        with capture(model, "layer", reduce=["mean", "last"]) as acts:
            model(X, RIGHT)
            acts["layer", "mean"]
            model(X, RIGHT)
    assert len(told) == 1
    torch.testing.assert_close(acts["layer", "mean"], model.layer(X).mean(1).detach())
    torch.testing.assert_close(mean_by(model, X, RIGHT, mask=name), expected(model, RIGHT))
    assert mean_by(model, X, RIGHT, mask=None).shape == mean_by(model, X, RIGHT[:, :3]).shape == (2, 4)


def test_other_masks_and_those_beside_an_attention_mask_ask_nothing():
    names = ["bool_masked_pos", "head_mask", "loss_mask", "attn_mask", "src_mask", "special_tokens_mask", "mask_time"]
    model = model_with(*names)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name in names:
            torch.testing.assert_close(mean_by(model, X, **{name: RIGHT}), model.layer(X).mean(1).detach())
        both = model_with("attention_mask", "padding_mask", "mask")
        given = mean_by(both, X, attention_mask=RIGHT, padding_mask=RIGHT == 0, mask=RIGHT)
        torch.testing.assert_close(given, expected(both, RIGHT))
