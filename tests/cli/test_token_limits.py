"""How many tokens a model takes."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import transformers
from tiny import tiny_bert, tiny_tokenizer
from torch import nn

from activation_extractor.cli._token_limits import NO_LIMIT, token_limit
from activation_extractor.errors import ArgumentError

UNLIMITED = SimpleNamespace(model_max_length=10**30)

SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32, "vocab_size": 40}
GPT = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 32}
BART = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "decoder_attention_heads": 2}
BART |= {"encoder_attention_heads": 2, "max_position_embeddings": 32}

WITH_A_TABLE = {
    "Bert": {"max_position_embeddings": 32},
    "Roberta": {"max_position_embeddings": 34},
    "Esm": {"max_position_embeddings": 34, "position_embedding_type": "absolute", "pad_token_id": 1},
    "Longformer": {"max_position_embeddings": 34, "attention_window": 4},
    "BigBird": {"max_position_embeddings": 32, "attention_type": "original_full"},
    "Nystromformer": {"max_position_embeddings": 32},
    "OPT": {"max_position_embeddings": 32, "ffn_dim": 32, "word_embed_proj_dim": 16},
    "Bart": BART,
    "GPT2": GPT,
    "CLIPText": {"max_position_embeddings": 32},
}
WITHOUT_ONE = {
    "Esm": {"max_position_embeddings": 32, "position_embedding_type": "rotary", "pad_token_id": 1},
    "Llama": {"max_position_embeddings": 32},
    "ModernBert": {"max_position_embeddings": 32, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    | {"cls_token_id": 1, "sep_token_id": 2},
    "Deberta": {"max_position_embeddings": 32, "position_biased_input": False, "relative_attention": True},
}
NO_END = {
    "Bloom": {"n_layer": 1, "n_head": 2},
    "Mamba": {},
    "T5Encoder": {"d_model": 16, "num_layers": 1, "num_heads": 2, "d_kv": 8, "d_ff": 32},
    "XLNet": {"d_model": 16, "n_layer": 1, "n_head": 2, "d_inner": 32},
}


def build(name, options):
    torch.manual_seed(0)
    config = getattr(transformers, f"{name.removesuffix('Encoder')}Config")(**{**SIZES, **options})
    return getattr(transformers, f"{name}Model")(config).eval()


def run(model, tokens):
    with torch.no_grad():
        model(input_ids=torch.full((1, tokens), 5), attention_mask=torch.ones(1, tokens, dtype=torch.long))


@pytest.mark.parametrize("name", WITH_A_TABLE)
def test_a_table_of_positions_is_a_limit_that_the_model_has_indeed(name):
    model = build(name, WITH_A_TABLE[name])
    assert token_limit(model, UNLIMITED) == token_limit(model, UNLIMITED, 32) == 32
    run(model, 32)
    with pytest.raises((RuntimeError, IndexError, ValueError)):
        run(model, 33)
    with pytest.raises(ArgumentError, match=r"max_length must be from 1 to the 32 tokens that the model takes, got 33"):
        token_limit(model, UNLIMITED, 33)


@pytest.mark.parametrize("name", WITHOUT_ONE)
def test_a_configured_length_is_a_default_for_rotary_and_relative_positions(name):
    model = build(name, WITHOUT_ONE[name])
    assert token_limit(model, UNLIMITED) == 32
    assert token_limit(model, UNLIMITED, 50) == 50
    run(model, 50)


@pytest.mark.parametrize("name", NO_END)
def test_a_model_without_positions_takes_rows_of_any_length(name):
    model = build(name, NO_END[name])
    assert token_limit(model, UNLIMITED) == NO_LIMIT
    assert token_limit(model, SimpleNamespace(model_max_length=20)) == 20
    assert token_limit(model, SimpleNamespace(model_max_length=20), 50) == 50
    run(model, 50)


def test_the_shorter_of_table_and_tokenizer_is_the_default_and_the_table_the_end():
    assert token_limit(tiny_bert(), tiny_tokenizer(20)) == 20
    assert token_limit(tiny_bert(), tiny_tokenizer(20), 64) == 64
    assert token_limit(tiny_bert(), tiny_tokenizer(10**30)) == 64
    assert token_limit(nn.Linear(1, 1), tiny_tokenizer(20)) == 20


def test_a_table_within_a_model_of_ones_own_counts_and_one_of_pictures_does_not():
    class Wrapper(nn.Module):
        def __init__(self):
            super().__init__()
            self.text = tiny_bert()
            self.vision_model = nn.ModuleDict({"position_embedding": nn.Embedding(5, 4)})

    assert token_limit(Wrapper(), UNLIMITED) == 64


def test_a_length_without_room_for_text_is_refused():
    for length in (1, 2):
        with pytest.raises(
            ArgumentError, match=rf"have room for a token of the text, got {length}\. The tokenizer adds 2"
        ):
            token_limit(tiny_bert(), tiny_tokenizer(), length)
    with pytest.raises(
        ArgumentError, match=r"max_length must be from 1 to the 64 tokens that the model takes, got 0\."
    ):
        token_limit(tiny_bert(), tiny_tokenizer(), 0)
    with pytest.raises(ArgumentError, match=r"max_length must be positive, got -3\."):
        token_limit(nn.Linear(1, 1), tiny_tokenizer(), -3)
    assert token_limit(tiny_bert(), tiny_tokenizer(), 3) == 3
