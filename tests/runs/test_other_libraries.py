"""Runs of models that other libraries change without a trace in weights: adapters, offloading, packed weights."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2Model

from activation_extractor import blocks, extract
from activation_extractor.errors import OtherRunError

TOKENS = torch.randint(0, 50, (8, 6), generator=torch.Generator().manual_seed(0))
BATCHES = [{"input_ids": tokens} for tokens in TOKENS.split(2)]


def gpt2() -> GPT2Model:
    torch.manual_seed(0)
    sizes = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 8}
    return GPT2Model(GPT2Config(vocab_size=50, bos_token_id=1, eos_token_id=1, **sizes)).eval()


def run(model: nn.Module, out):
    return extract(model, BATCHES, blocks(model), reduce="mean", out=out, progress=False)


@pytest.mark.filterwarnings("ignore")
def test_an_adapter_of_peft_that_is_switched_off_is_another_run(tmp_path):
    peft = pytest.importorskip("peft", reason="needs peft")
    config = peft.LoraConfig(r=4, target_modules=["c_attn"], fan_in_fan_out=True, init_lora_weights=False)
    model = peft.get_peft_model(gpt2(), config).eval()
    run(model, tmp_path)
    with model.disable_adapter(), pytest.raises(OtherRunError, match=r"h\.0' with 'mean' differs by"):
        run(model, tmp_path)
    assert run(model, tmp_path).rows == 8
    run(model.merge_and_unload(), tmp_path / "merged")


@pytest.mark.parametrize("place", ["cpu", "disk"])
def test_weights_that_accelerate_offloads_come_to_where_they_run(tmp_path, place):
    accelerate = pytest.importorskip("accelerate", reason="needs accelerate")

    def offloaded(change: float = 0.0) -> GPT2Model:
        model = gpt2()
        with torch.no_grad():
            model.h[1].mlp.c_proj.bias[3] += change
        options = {"offload_dir": str(tmp_path / str(change))} if place == "disk" else {}
        getattr(accelerate, f"{place}_offload")(model, execution_device=torch.device("cpu"), **options)
        assert all(weight.is_meta for weight in model.parameters())
        return model

    expected = run(gpt2(), tmp_path / "plain")["h.1"].torch()
    assert torch.equal(run(offloaded(), tmp_path / "out")["h.1"].torch(), expected)
    with pytest.raises(OtherRunError, match=r"layer 'h\.1' with 'mean' differs by"):
        run(offloaded(0.5), tmp_path / "out")
    assert run(offloaded(), tmp_path / "out").rows == 8


@pytest.mark.filterwarnings("ignore")
def test_weights_that_torchao_packs_are_seen(tmp_path):
    quantization = pytest.importorskip("torchao.quantization", reason="needs torchao")

    def packed(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(32, 32)).eval()
        quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
        return model

    batches = torch.randn(6, 32, generator=torch.Generator().manual_seed(0)).split(2)
    for _ in range(2):
        extract(packed(0), batches, "0", out=tmp_path, progress=False)
    with pytest.raises(OtherRunError, match="weights"):
        extract(packed(1), batches, "0", out=tmp_path, progress=False)
