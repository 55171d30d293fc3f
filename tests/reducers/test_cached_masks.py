"""Of a mask that is longer than a layer's positions: which columns are theirs in a call that goes on from a cache."""

from __future__ import annotations

import inspect

import pytest
import torch
import transformers as tf
from torch import nn

from activation_extractor import capture, without_tokens
from activation_extractor.errors import MaskError

IDS = torch.tensor([[5, 6, 7, 8, 9], [10, 11, 12, 13, 14]])
LEFT = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])


def mean_of(model, layer, **kwargs):
    with torch.no_grad(), capture(model, layer, reduce=["mean", "full"]) as acts:
        model(**kwargs)
    return acts[layer, "mean"], acts[layer, "full"]


def masked_mean(activation, mask):
    return torch.stack([row[real.bool()].mean(0) for row, real in zip(activation, mask, strict=True)])


@pytest.fixture(scope="module")
def llama():
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 8, "num_attention_heads": 2, "num_key_value_heads": 2}
    return tf.LlamaModel(tf.LlamaConfig(vocab_size=50, num_hidden_layers=2, **sizes)).eval()


def cache_argument(model):
    takes = inspect.signature(model.forward).parameters
    return "cache" if "cache" in takes else "past_key_values"  # renamed in transformers 5.24


@pytest.mark.parametrize("layer", ["embed_tokens", "layers.0", "layers.1"])  # before and behind the cache was written
def test_a_mask_for_all_that_a_static_cache_holds_counts_from_its_beginning(llama, layer):
    cache = tf.StaticCache(config=llama.config, max_cache_len=9)
    mask = torch.cat([LEFT, torch.ones(2, 4, dtype=torch.long)], 1)
    mask[1, 3] = 0
    for begin, end in ((0, 3), (3, 5)):
        options = {"input_ids": IDS[:, begin:end], "attention_mask": mask, cache_argument(llama): cache}
        mean, full = mean_of(llama, layer, **options)
        torch.testing.assert_close(mean, masked_mean(full, mask[:, begin:end]))


def test_tokens_are_left_out_of_the_columns_that_a_static_cache_has_reached(llama):
    cache = tf.StaticCache(config=llama.config, max_cache_len=9)
    mask = torch.cat([LEFT, torch.ones(2, 4, dtype=torch.long)], 1)
    for begin, end in ((0, 3), (3, 5)):
        ids, options = IDS[:, begin:end], {"attention_mask": mask, cache_argument(llama): cache}
        with torch.no_grad(), capture(llama, "layers.1", reduce=["mean", "full"], mask=without_tokens([8, 11])) as acts:
            llama(input_ids=ids, **options)
        real = mask[:, begin:end].bool() & (ids != 8) & (ids != 11)
        torch.testing.assert_close(acts["layers.1", "mean"], masked_mean(acts["layers.1", "full"], real))


def test_a_mask_of_an_encoder_is_never_cut_for_a_cache():
    torch.manual_seed(0)
    sizes = {"encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
    sizes |= {"d_model": 16, "encoder_ffn_dim": 8, "decoder_ffn_dim": 8, "num_mel_bins": 8, "max_source_positions": 20}
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    model = tf.WhisperModel(tf.WhisperConfig(vocab_size=50, **sizes, **tokens)).eval()
    frames = (torch.arange(40)[None] < torch.tensor([[30], [40]])).long()
    arguments = {"input_features": torch.randn(2, 8, 40), "attention_mask": frames, "decoder_input_ids": IDS}
    layer = "decoder.layers.0.encoder_attn.k_proj"
    for more in ({}, {cache_argument(model): tf.EncoderDecoderCache(tf.DynamicCache(), tf.DynamicCache())}):
        mean, full = mean_of(model, layer, **arguments, **more)
        torch.testing.assert_close(mean, masked_mean(full, torch.arange(20)[None] < torch.tensor([[15], [20]])))


class Halving(nn.Module):
    def __init__(self):
        super().__init__()
        self.halved, self.whole = nn.Linear(16, 4), nn.Linear(8, 4)

    def forward(self, x, past_key_values=None):
        return self.halved(x.reshape(len(x), -1, 16)), self.whole(x)


class MakesItsCache(nn.Module):
    """Hands a part of it a cache that it was not given."""

    def __init__(self):
        super().__init__()
        self.part = Halving()

    def forward(self, x, attention_mask=None):
        return self.part(x, past_key_values=object())


def test_a_cache_that_the_model_made_itself_holds_nothing_before_the_call():
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]])
    mean, full = mean_of(MakesItsCache(), "part.whole", x=torch.randn(2, 4, 8), attention_mask=mask)
    torch.testing.assert_close(mean, masked_mean(full, mask))
    with pytest.raises(MaskError, match=r"must have shape \(2, 2\), got shape \(2, 4\)"):
        mean_of(MakesItsCache(), "part.halved", x=torch.randn(2, 4, 8), attention_mask=mask)
