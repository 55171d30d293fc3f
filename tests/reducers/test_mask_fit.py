"""Fitting a mask to an activation, and refusing those that do not fit."""

from __future__ import annotations

import inspect

import pytest
import torch
import transformers
from models import BlockStack
from pooling import assert_mean_over, mean_by
from torch import nn

from activation_extractor import MemorySink, capture
from activation_extractor.errors import ArgumentError, ArgumentTypeError, MaskError
from activation_extractor.layers._selections import Target
from activation_extractor.layers._signatures import bind, positions_of, signature_of
from activation_extractor.reducers import _masks
from activation_extractor.reducers._calls import CallArguments
from activation_extractor.reducers._given_masks import check_mask
from activation_extractor.reducers._masks import Masks

RIGHT = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]])
ALL = torch.ones(2, 5, dtype=torch.int64)
POLICY = "be an argument's name, a tensor, a dict, a callable (layer, activation, mask) -> mask, or None"


# -- cached decoding --------------------------------------------------------------------------------------------------


def test_a_decoding_step_with_a_cache_takes_the_last_columns():
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=30, n_embd=8, n_layer=1, n_head=2, n_positions=16, bos_token_id=1, eos_token_id=2
    )
    model = transformers.GPT2Model(config).eval()
    ids, mask = torch.randint(3, 30, (2, 5)), torch.tensor([[0, 1, 1, 0, 1], [1, 1, 1, 1, 0]])
    with torch.no_grad():
        first = model(ids[:, :3], attention_mask=mask[:, :3], use_cache=True)
    takes = inspect.signature(model.forward).parameters
    name = "cache" if "cache" in takes else "past_key_values"  # renamed in transformers 5.24
    cache = first.get("cache", first.get("past_key_values"))
    arguments = {"input_ids": ids[:, 3:], "attention_mask": mask, name: cache}
    assert_mean_over(mask[:, 3:], mean_by(model, "h.0", "attention_mask", **arguments))


class Cached(BlockStack):
    """Takes a cache under some name."""

    def forward(self, input_ids, attention_mask=None, past_key_values=None, mems=None, other=None):
        return super().forward(input_ids)


@pytest.mark.parametrize("cache", ["past_key_values", "mems"])
def test_without_a_cache_a_longer_mask_is_an_error(tokens, cache):
    model, longer = Cached().eval(), torch.cat([ALL, RIGHT], 1)
    assert_mean_over(RIGHT, mean_by(model, "h.0", "attention_mask", tokens, longer, **{cache: object()}))
    for kwargs in ({}, {cache: None}, {"other": object()}):
        with pytest.raises(MaskError, match=r"must have shape \(2, 5\), got shape \(2, 10\)"):
            mean_by(model, "h.0", "attention_mask", tokens, longer, **kwargs)
    with pytest.raises(MaskError, match=r"must have shape \(2, 5\), got shape \(2, 3\)"):
        mean_by(model, "h.0", "attention_mask", tokens, RIGHT[:, :3], **{cache: object()})


# -- masks that do not fit --------------------------------------------------------------------------------------------

FORM = "Pass mask=None if every position is real, or the two-dimensional mask that the tokenizer made as mask=."
BROKEN = [
    (RIGHT[:1], "have shape (2, 5), got shape (1, 5)"),
    (RIGHT[:, :1], "have shape (2, 5), got shape (2, 1)"),
    (RIGHT[:, None, None], f"have shape (batch, seq), got shape (2, 1, 1, 5). {FORM}"),
    (RIGHT[0], f"have shape (batch, seq), got shape (5,). {FORM}"),
    (
        (RIGHT - 1) * 1e4,
        "hold zeros and ones, got an additive mask. Pass mask=None if every position is real, or the mask of zeros",
    ),
    (RIGHT.tolist(), "be a tensor, got list. Convert it, or pass mask=None."),
    (RIGHT.numpy(), "be a tensor, got ndarray. Convert it, or pass mask=None."),
    (RIGHT * torch.tensor([[1], [0]]), "have a real position in every row, got none in row 1. Leave empty rows out"),
]


@pytest.mark.parametrize(("mask", "text"), BROKEN)
def test_a_mask_that_does_not_fit_is_an_error_and_no_broadcast(stack, tokens, mask, text):
    with pytest.raises(MaskError) as caught:
        mean_by(stack, "h.2", "attention_mask", tokens, attention_mask=mask)
    assert str(caught.value).startswith(f"The mask for layer 'h.2' must {text}")
    assert caught.value.layer == "h.2"
    for advised in (None, RIGHT):
        mean_by(stack, "h.2", advised, tokens, attention_mask=mask)
    with pytest.raises(MaskError) as caught:
        mean_by(stack, "h.2", lambda layer, activation, _: mask, tokens)
    assert str(caught.value).startswith(f"The mask for layer 'h.2' must {text}")


def test_whole_activations_in_memory_need_no_mask(stack, tokens):
    with capture(stack, "h.2") as acts:
        stack(tokens, RIGHT[:, None, None])
    assert acts["h.2"].shape == (2, 5, 8)


# -- at the door ------------------------------------------------------------------------------------------------------


def test_an_unknown_argument_is_an_error_that_names_the_known_ones(stack):
    with pytest.raises(ArgumentError) as caught:
        capture(stack, "h.0", reduce="mean", mask="attn_mask")
    text = "mask must name an argument of the model (attention_mask, input_ids), got 'attn_mask'."
    assert str(caught.value) == text
    with pytest.raises(ArgumentError) as caught:
        capture(stack, "h.0", reduce="mean", mask={"h.*": "attn_mask"})
    assert str(caught.value) == text
    capture(stack, "h.0", reduce="mean", mask="input_ids")


@pytest.mark.parametrize(
    ("mask", "text"),
    [
        (3, f"mask must {POLICY}, got 3."),
        ([[1, 0]], f"mask must {POLICY}, got [[1, 0]]."),
        (
            {"h.*": 3},
            "mask must map layer patterns to argument names, tensors or None, got {'h.*': 3}. "
            "Write it as {'decoder.**': 'decoder_attention_mask'}.",
        ),
        (
            {3: "attention_mask"},
            "mask must map layer patterns to argument names, tensors or None, got {3: 'attention_mask'}. "
            "Write it as {'decoder.**': 'decoder_attention_mask'}.",
        ),
    ],
)
def test_what_is_no_policy_is_an_error(mask, text):
    with pytest.raises(ArgumentTypeError) as caught:
        check_mask(mask)
    assert str(caught.value) == text


@pytest.mark.parametrize("mask", [RIGHT[:, None], RIGHT[0], (RIGHT - 1) * 1e4])
def test_a_tensor_of_the_wrong_form_is_an_error_at_the_door(stack, mask):
    with pytest.raises(MaskError, match=r"^The mask must (have shape \(batch, seq\)|hold zeros and ones), got"):
        capture(stack, "h.0", reduce="mean", mask=mask)


# -- the arguments of a call ------------------------------------------------------------------------------------------


class Signature(nn.Module):
    """Has every kind of parameter."""

    def forward(self, first, /, second=2, *more, third=3, **others): ...


@pytest.mark.parametrize(
    ("args", "kwargs", "bound"),
    [
        ((1,), {}, {"first": 1}),
        ((1, 5), {"third": 6}, {"first": 1, "second": 5, "third": 6}),
        ((1, 5, 7, 8), {"any": 9}, {"first": 1, "second": 5, "more": (7, 8), "any": 9}),
        ((), {"second": 1}, {}),  # the call is about to raise
    ],
)
def test_arguments_have_the_names_of_the_signature(args, kwargs, bound):
    assert bind(signature_of(Signature()), args, kwargs) == bound


def test_arguments_without_a_signature_are_numbered():
    assert bind(None, (1, 2), {"third": 3}) == {"0": 1, "1": 2, "third": 3}


def target(layer):
    return Target(layer, layer, nn.Identity(), "output", None)


def test_a_mask_is_checked_once_in_a_call_for_all_layers_of_one_shape(stack, tokens):
    masks, call = (
        Masks("attention_mask", stack),
        CallArguments(positions_of(signature_of(stack)), (tokens, RIGHT), {}),
    )
    found = masks.for_layer(target("h.0"), torch.ones(2, 5, 8), call)
    assert masks.for_layer(target("h.1"), torch.ones(2, 5, 4), call) is found
    assert found.dtype == torch.bool
    with pytest.raises(MaskError, match=r"layer 'h.2' must have shape \(2, 6\)"):
        masks.for_layer(target("h.2"), torch.ones(2, 6, 8), call)


def test_the_signature_is_read_only_where_it_can_matter(stack, monkeypatch):
    read = []
    monkeypatch.setattr(_masks, "signature_of", lambda module: read.append(module) or signature_of(module))
    for options in ({}, {"mask": None}, {"mask": RIGHT}, {"copy": False}):
        capture(stack, "h.1", **options)
        assert read == []
    needs = ({"reduce": "mean"}, {"reduce": ["full", "last"]}, {"sink": MemorySink()})
    for options in (*needs, {"mask": "input_ids"}, {"mask": {"h.*": None}}):
        capture(stack, "h.1", **options)
        assert read.pop() is stack
