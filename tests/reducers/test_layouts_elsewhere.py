"""Layers of other libraries that are known to have the time first, although no attribute says so."""

from __future__ import annotations

import pytest
import torch
import transformers as tf
from torch import nn

from activation_extractor import capture, outputs
from activation_extractor.errors import SequenceAxisError


def test_layers_of_xlnet_have_the_time_first_also_where_batch_and_time_are_equal():
    torch.manual_seed(0)
    model = tf.XLNetModel(tf.XLNetConfig(vocab_size=30, d_model=16, n_layer=2, n_head=2, d_inner=8)).eval()
    ids, mask = torch.randint(3, 30, (5, 5)), torch.ones(5, 5, dtype=torch.long)
    mask[0, 3:] = 0
    with torch.no_grad(), capture(model, ["layer.1", outputs("")], reduce=["full", "mean"]) as acts:
        model(ids, attention_mask=mask)
    for layer, whole in (("layer.1", acts["layer.1", "full"].transpose(0, 1)), ("", acts["", "full"])):
        expected = torch.stack([row[real.bool()].mean(0) for row, real in zip(whole, mask, strict=True)])
        torch.testing.assert_close(acts[layer, "mean"], expected)
    with pytest.raises(SequenceAxisError, match="Pass sequence_axis=.'layer.0.ff.layer_1': 0."):
        with torch.no_grad(), capture(model, "layer.0.ff.layer_1", reduce="mean"):
            model(ids, attention_mask=mask)


class TransformerLayer(nn.Linear):
    def forward(self, x):
        return super().forward(x)


class Protein(nn.Module):
    """As fair-esm has it."""

    def __init__(self):
        super().__init__()
        self.embed_tokens, self.layers = nn.Embedding(30, 8), nn.ModuleList([TransformerLayer(8, 8)])

    def forward(self, tokens):
        return self.layers[0](self.embed_tokens(tokens).transpose(0, 1)).transpose(0, 1)


def test_layers_of_fair_esm_have_the_time_first(monkeypatch):
    monkeypatch.setattr(TransformerLayer, "__module__", "esm.modules")
    model, tokens = Protein(), torch.randint(0, 30, (4, 4))
    with capture(model, "layers.0", reduce="mean") as acts:
        whole = model(tokens)
    torch.testing.assert_close(acts["layers.0"], whole.mean(1).detach())
