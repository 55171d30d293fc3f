"""Runs of models that other libraries change without a trace in weights: adapters, offloading, packed weights."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2Model

from activation_extractor import blocks, capture, extract
from activation_extractor.errors import ArgumentError, OtherRunError

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


def accelerate():
    return pytest.importorskip("accelerate", reason="needs accelerate")


def in_the_cpu(model, folder, **options):
    return accelerate().cpu_offload(model, **options)


def on_the_disk(model, folder, **options):
    return accelerate().disk_offload(model, str(folder), **options)


def in_both(model, folder):
    places = {"wte": "disk", "wpe": "cpu", "h.0": "disk", "h.1": "cpu", "ln_f": "disk"}
    return accelerate().dispatch_model(model, places, main_device="cpu", offload_dir=str(folder), force_hooks=True)


def in_the_cpu_by_a_hook(model, folder):
    return accelerate().cpu_offload_with_hook(model, execution_device="cpu")[0]


PLACES = {
    "cpu": in_the_cpu,
    "cpu, run where it is said": lambda model, folder: in_the_cpu(model, folder, execution_device=torch.device("cpu")),
    "cpu, buffers too": lambda model, folder: in_the_cpu(model, folder, offload_buffers=True),
    "disk": on_the_disk,
    "disk, buffers too": lambda model, folder: on_the_disk(model, folder, offload_buffers=True),
    "a device map": in_both,
    "a hook": in_the_cpu_by_a_hook,
}


@pytest.mark.parametrize("place", PLACES.values(), ids=PLACES)
def test_weights_that_accelerate_offloads_come_to_where_they_run_and_are_in_the_digest(tmp_path, place):
    def offloaded(token: int | None = None) -> GPT2Model:
        model = gpt2()
        if token is not None:
            with torch.no_grad():
                model.wte.weight[token, 3] += 0.5
        return place(model, tmp_path / f"weights {token}")

    expected = run(gpt2(), tmp_path / "plain")["h.1"].torch()
    model = offloaded()
    assert torch.equal(run(model, tmp_path / "out")["h.1"].torch(), expected)
    with torch.no_grad(), capture(model, "h.1", reduce="mean") as acts:
        model(TOKENS)
    torch.testing.assert_close(acts["h.1"], expected)
    unused = next(token for token in range(50) if token not in TOKENS)  # no batch shows that it is another one
    for token in (int(TOKENS[0, 0]), unused):
        with pytest.raises(OtherRunError, match="it differs in weights"):
            run(offloaded(token), tmp_path / "out")
    assert run(offloaded(), tmp_path / "out").rows == 8
    assert run(gpt2(), tmp_path / "out").rows == 8  # the same weights, wherever they are


def test_a_model_that_runs_on_placeholders_is_refused(tmp_path):
    with torch.device("meta"):
        empty = GPT2Model(gpt2().config).eval()
    accelerate().cpu_offload(empty, state_dict=gpt2().state_dict())  # which takes the empty weights' device
    with pytest.raises(ArgumentError, match="must have weights to compute with, got 'placeholders on the meta device'"):
        run(empty, tmp_path / "out")
