"""Forwards that go on from the one before, as those of a generation do, replace nothing."""

from __future__ import annotations

import warnings
import weakref

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, T5Config, T5ForConditionalGeneration

from activation_extractor import capture

TOKENS = torch.tensor([[5, 6, 7, 8, 9], [10, 11, 12, 13, 14]])
OPTIONS = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
REPLACED = "The model ran {} times in this block, and the values of {} of these forwards were replaced"


def gpt2() -> GPT2LMHeadModel:
    sizes = {"n_embd": 8, "n_layer": 2, "n_head": 2, "vocab_size": 20, "n_positions": 64}
    return GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=1)).eval()


def t5() -> T5ForConditionalGeneration:
    sizes = {"d_model": 8, "d_kv": 4, "num_layers": 2, "num_heads": 2, "d_ff": 8, "vocab_size": 20}
    return T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0)).eval()


def longer(tokens: torch.Tensor, token: int = 3) -> torch.Tensor:
    return torch.cat([tokens, tokens.new_full((len(tokens), 1), token)], 1)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_beams": 3},
        {"num_beams": 2, "num_return_sequences": 2},
        {"do_sample": True, "num_return_sequences": 2},
        {"attention_mask": torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])},
        {"use_cache": True},
    ],
)
def test_a_generation_without_a_cache_replaces_nothing(options):
    model = gpt2()
    with torch.no_grad(), warnings.catch_warnings(), capture(model, "transformer.h.1") as acts:
        warnings.simplefilter("error")
        made = model.generate(TOKENS, **{**OPTIONS, "use_cache": False, **options})
    if not options:
        with torch.no_grad(), capture(model, "transformer.h.1") as whole:
            model(made[:, :-1])
        assert torch.equal(acts["transformer.h.1"], whole["transformer.h.1"])


@pytest.mark.parametrize("tokens", [TOKENS, TOKENS[:1]])
def test_nor_does_that_of_an_encoder_decoder(tokens):
    model = t5()
    with torch.no_grad(), warnings.catch_warnings(), capture(model, ["encoder.block.1", "decoder.block.1"]) as acts:
        warnings.simplefilter("error")
        model.generate(tokens, use_cache=False, **OPTIONS)
    assert acts["decoder.block.1"].shape == (len(tokens), 4, 8)


@pytest.mark.parametrize("call", [lambda model, x: model(x), lambda model, x: model(input_ids=x)])
def test_tokens_that_are_added_by_hand_go_on(call):
    model, tokens = gpt2(), TOKENS
    with torch.no_grad(), warnings.catch_warnings(), capture(model, "transformer.h.1") as acts:
        warnings.simplefilter("error")
        for token in range(4):
            call(model, tokens)
            tokens = longer(tokens, token)
    assert acts["transformer.h.1"].shape == (2, 8, 8)


def test_two_generations_lose_one():
    model = gpt2()
    with torch.no_grad(), pytest.warns(UserWarning, match=REPLACED.format(8, 1)), capture(model, "transformer.h.1"):
        model.generate(TOKENS, use_cache=False, **OPTIONS)
        model.generate(TOKENS, use_cache=False, **OPTIONS)


@pytest.mark.parametrize("options", [{}, {"cache_implementation": "static"}, {"num_beams": 2}])
def test_a_loop_of_generations_with_a_cache_says_what_it_loses(options):
    model, options = gpt2(), {**OPTIONS, **options}
    with torch.no_grad(), pytest.warns(UserWarning, match=REPLACED.format(12, 2)), capture(model, "transformer.h.1"):
        for _ in range(3):
            model.generate(TOKENS, **options)
    with torch.no_grad(), warnings.catch_warnings(), capture(model, "transformer.h.1") as acts:
        warnings.simplefilter("error")
        for _ in range(3):
            model.generate(TOKENS, **options)
            assert len(acts["transformer.h.1"])
        del acts


def test_a_recurrent_state_that_says_no_length_goes_on():
    from transformers import MambaConfig, MambaForCausalLM

    model = MambaForCausalLM(MambaConfig(vocab_size=20, hidden_size=8, num_hidden_layers=2, state_size=4)).eval()
    with torch.no_grad(), warnings.catch_warnings(), capture(model, "backbone.layers.1") as acts:
        warnings.simplefilter("error")
        model.generate(TOKENS, **OPTIONS)
    assert acts["backbone.layers.1"].shape == (2, 1, 8)


def test_a_conversation_that_goes_on_with_its_cache_replaces_nothing():
    model = gpt2()
    with torch.no_grad(), warnings.catch_warnings(), capture(model, "transformer.h.1") as acts:
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", ".*past_key_values.*")
        first = model.generate(TOKENS, return_dict_in_generate=True, **OPTIONS)
        model.generate(longer(first.sequences), past_key_values=first.past_key_values, **OPTIONS)
    assert acts["transformer.h.1"].shape == (2, 1, 8)


def test_batches_of_lengths_that_grow_are_forwards_of_their_own():
    model, other = gpt2(), TOKENS.flip(1)
    types = torch.zeros(2, 6, dtype=torch.int64)
    pairs = [
        ({"input_ids": TOKENS}, {"input_ids": longer(other)}),
        ({"input_ids": TOKENS}, {"input_ids": longer(TOKENS)[:1]}),
        ({"input_ids": TOKENS}, {"input_ids": longer(longer(TOKENS))}),
        ({"input_ids": TOKENS}, {"input_ids": TOKENS}),
        ({"input_ids": longer(TOKENS)}, {"input_ids": TOKENS}),
        ({"input_ids": TOKENS}, {"input_ids": torch.cat([longer(TOKENS)[:1], longer(other)[1:]])}),
        (
            {"input_ids": TOKENS, "token_type_ids": types[:, :5], "attention_mask": types[:, :5] + 1},
            {"input_ids": longer(other), "token_type_ids": types, "attention_mask": types + 1},
        ),
        ({"inputs_embeds": torch.randn(2, 5, 8)}, {"inputs_embeds": torch.randn(2, 6, 8)}),
        ({"input_ids": TOKENS}, {"inputs_embeds": torch.randn(2, 6, 8)}),
    ]
    for first, second in pairs:
        with torch.no_grad(), pytest.warns(UserWarning, match=REPLACED.format(2, 1)):
            with capture(model, "transformer.h.1"):
                model(**first)
                model(**second)


def test_a_block_keeps_no_tokens():
    model, tokens = gpt2(), TOKENS.clone()
    alive = weakref.ref(tokens)
    with torch.no_grad(), capture(model, "transformer.h.1") as acts:
        model(tokens)
    del tokens
    assert alive() is None
    assert len(acts) == 1
