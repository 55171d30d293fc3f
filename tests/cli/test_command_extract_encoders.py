"""``activation-extractor extract`` with models of an encoder and a decoder."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import commands
import pytest
import torch
import transformers
from tiny import tiny_tokenizer

from activation_extractor import capture, open_store

TEXTS = ["MKTLL", "AC", "DEFGH"]
SIZES = {"d_model": 16, "vocab_size": 24, "pad_token_id": 0, "decoder_start_token_id": 0}
T5 = {**SIZES, "num_layers": 2, "num_heads": 2, "d_kv": 8, "d_ff": 32}
BART = {**SIZES, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
BART |= {"max_position_embeddings": 64}

run = partial(commands.run, "extract")


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("x.txt").write_text("\n".join(TEXTS))
    # No model here takes token_type_ids: they must not reach one.
    tiny_tokenizer(returns=("input_ids", "token_type_ids", "attention_mask")).save_pretrained("model")
    return tmp_path


def saved(kind, config, sizes):
    torch.manual_seed(0)
    model = getattr(transformers, kind)(getattr(transformers, config)(**sizes)).eval()
    model.save_pretrained("model")
    return model


def raw(model, layer, **options):
    rows = []
    for text in TEXTS:
        with torch.no_grad(), capture(model, layer, reduce="mean") as acts:
            model(**tiny_tokenizer()([text], return_tensors="pt"), **options)
        rows.append(acts[layer])
    return torch.cat(rows)


def test_an_encoder_that_was_saved_alone_is_loaded_without_a_decoder(here):
    model = saved("T5EncoderModel", "T5Config", T5)
    said = run("--model", "model", "--input", "x.txt", "--out", "out").stderr
    assert "Random numbers" not in said
    store = open_store("out")
    assert list(store) == ["encoder.block.0", "encoder.block.1"]
    torch.testing.assert_close(store["encoder.block.1"].torch(), raw(model, "encoder.block.1"), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("kind", "config", "sizes", "layer"),
    [
        ("T5ForConditionalGeneration", "T5Config", T5, "encoder.block.1"),
        ("MarianMTModel", "MarianConfig", BART, "encoder.layers.1"),
    ],
)
def test_a_decoder_that_needs_input_is_given_its_first_token(here, kind, config, sizes, layer):
    model = saved(kind, config, sizes).get_encoder()
    said = run("--model", "model", "--input", "x.txt", "--out", "out").stderr
    assert "The decoder is given its first token alone (0), since the input is for the encoder." in said
    found = open_store("out")[layer].torch()
    torch.testing.assert_close(found, raw(model, layer.removeprefix("encoder.")), atol=1e-5, rtol=1e-5)


def test_a_decoder_that_makes_its_own_input_is_left_alone(here):
    model = saved("BartModel", "BartConfig", BART)
    said = run("--model", "model", "--input", "x.txt", "--out", "out").stderr
    assert "The decoder is given" not in said
    found = open_store("out")["decoder.layers.1"].torch()
    torch.testing.assert_close(found, raw(model, "decoder.layers.1"), atol=1e-5, rtol=1e-5)
