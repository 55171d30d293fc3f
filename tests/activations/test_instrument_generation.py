"""Generations with a cache of fixed size: the forward of the prompt is eager, the others are compiled."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers as tf
from compiling import quiet
from torch._dynamo.testing import CompileCounterWithBackend

from activation_extractor import blocks, capture, instrument, without_tokens

pytestmark = [quiet, pytest.mark.filterwarnings("ignore:.* is compiled, and runs eagerly")]
SIZES = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2}
IDS = torch.tensor([[5, 6, 7, 8, 9], [10, 11, 12, 13, 14], [0, 0, 0, 5, 7]])
LEFT = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1], [0, 0, 0, 1, 1]])
OPTIONS = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "pad_token_id": 0}


def llama():
    return tf.LlamaForCausalLM(tf.LlamaConfig(**SIZES, num_key_value_heads=2))


def gpt2():
    sizes = {"n_embd": 16, "n_layer": 2, "n_head": 2, "vocab_size": 50, "n_positions": 64}
    return tf.GPT2LMHeadModel(tf.GPT2Config(**sizes, bos_token_id=0, eos_token_id=1))


def gemma():  # has masks for layers that see all, and for those that see a window
    return tf.Gemma2ForCausalLM(tf.Gemma2Config(**SIZES, num_key_value_heads=2, head_dim=8, sliding_window=16))


def eager_attention():  # whose mask is added to scores
    return tf.LlamaForCausalLM(tf.LlamaConfig(**SIZES, num_key_value_heads=2, attn_implementation="eager"))


def t5():
    sizes = {"d_model": 16, "d_kv": 8, "num_layers": 2, "num_heads": 2, "d_ff": 8, "vocab_size": 50}
    return tf.T5ForConditionalGeneration(tf.T5Config(**sizes, decoder_start_token_id=0))


def build(kind):
    torch._dynamo.reset()
    torch.manual_seed(0)
    return kind().eval()


def assert_equal(acts, expected):
    assert set(acts) == set(expected)
    for key, value in expected.items():
        pairs = zip(acts[key], value, strict=True) if isinstance(value, list) else [(acts[key], value)]
        for made, wanted in pairs:
            torch.testing.assert_close(made, wanted, rtol=1e-4, atol=1e-4)


def generations(kind, *, is_instrumented, **options):
    """What a block records of a generation with a fixed cache, what of one with a growing one, and the graphs."""
    model = build(kind)
    twin, layers = copy.deepcopy(model), list(blocks(model))
    counter = CompileCounterWithBackend("eager")
    config = tf.CompileConfig(backend=counter, mode=None, fullgraph=True)
    config._compile_all_devices = True  # on the CPU too
    generation = copy.deepcopy(model.generation_config)
    model.generation_config.compile_config = config
    if is_instrumented:
        instrument(model, layers)
    with torch.no_grad(), capture(model, layers, **options) as acts:
        made = model.generate(IDS, attention_mask=LEFT, cache_implementation="static", compile_config=config, **OPTIONS)
    twin.generation_config = generation
    with torch.no_grad(), capture(twin, layers, **options) as expected:
        assert torch.equal(twin.generate(IDS, attention_mask=LEFT, **OPTIONS), made)
    return acts, expected


@pytest.mark.parametrize("is_instrumented", [True, False], ids=["instrumented", "plain"])
@pytest.mark.parametrize("kind", [llama, gpt2, gemma, eager_attention, t5])
def test_reducers_of_a_generation_with_a_fixed_cache_are_those_of_one_that_grows(kind, is_instrumented):
    reduce = ["mean", "first", "last", "max"]
    acts, expected = generations(kind, is_instrumented=is_instrumented, reduce=reduce, calls="join")
    assert_equal(acts, expected)


@pytest.mark.parametrize("calls", ["all", "last"])
def test_each_call_is_recorded_by_itself_or_the_last_one(calls):
    acts, expected = generations(llama, is_instrumented=True, reduce=["mean", "full"], calls=calls)
    assert_equal(acts, expected)


@pytest.mark.parametrize("is_instrumented", [True, False], ids=["instrumented", "plain"])
def test_tokens_are_left_out_of_it_too(is_instrumented):
    options = {"reduce": "mean", "mask": without_tokens([7, 9]), "calls": "all"}
    acts, expected = generations(llama, is_instrumented=is_instrumented, **options)
    assert_equal(acts, expected)
