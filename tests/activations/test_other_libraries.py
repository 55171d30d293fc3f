"""Beside libraries that hook or change models: captum, PEFT, accelerate."""

from __future__ import annotations

import pytest
import torch
from tiny import tiny_bert
from torch import nn

from activation_extractor import capture, inputs
from activation_extractor.errors import LayerNotRunError

peft = pytest.importorskip("peft", reason="needs peft")
accelerate = pytest.importorskip("accelerate", reason="needs accelerate")
attr = pytest.importorskip("captum.attr", reason="needs captum")

TOKENS = torch.tensor([[1, 5, 6, 7], [1, 8, 9, 3]])
LAYER = "encoder.layer.1"
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore:The model ran")


def plain(model: nn.Module, layer: str = LAYER, **options) -> torch.Tensor:
    """What a layer returns, by a hook of torch's."""
    kept: list[torch.Tensor] = []
    module = model.get_submodule(layer)
    handle = module.register_forward_hook(lambda called, args, output: kept.append(output))
    with torch.no_grad():
        model(TOKENS, **options)
    handle.remove()
    return kept[-1][0] if isinstance(kept[-1], tuple) else kept[-1]


def lora() -> nn.Module:
    config = peft.LoraConfig(r=2, target_modules=["query", "value"], init_lora_weights=False)
    return peft.get_peft_model(tiny_bert(), config).eval()


def test_captum_and_a_block_around_it_see_the_same():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    x = torch.randn(3, 4)
    with capture(model, "*") as acts:
        activation = attr.LayerActivation(model, model[1]).attribute(x)
        assert torch.equal(acts["1"], activation)
        attr.LayerIntegratedGradients(model, model[0]).attribute(x, target=0, n_steps=4)
        model(x)
    assert torch.equal(acts["1"], activation)
    assert not any(layer._forward_hooks or layer._forward_pre_hooks for layer in model)


def test_an_adapter_has_its_say_when_it_is_on_and_none_when_it_is_off():
    model = lora()
    with torch.no_grad(), capture(model, f"**.{LAYER}") as acts:
        model(TOKENS)
        (adapted,) = acts.values()
        with model.disable_adapter():
            model(TOKENS)
        (bare,) = acts.values()
    layer = f"base_model.model.{LAYER}"
    assert torch.equal(adapted, plain(model, layer))
    assert torch.equal(bare, plain(tiny_bert()))
    assert not torch.equal(adapted, bare)


def test_a_layer_that_is_merged_away_in_the_block_did_not_run():
    model = lora()
    layer = f"base_model.model.{LAYER}"
    adapted = plain(model, layer)
    with torch.no_grad(), pytest.raises(LayerNotRunError, match="another module took its place"):
        with capture(model.base_model.model, [LAYER, f"{LAYER}.attention.self.query"]) as acts:
            model(TOKENS)
            assert torch.equal(acts[LAYER], adapted)
            merged = model.merge_and_unload()
            merged(TOKENS)
            torch.testing.assert_close(acts[LAYER], adapted)


def test_adapters_that_are_added_in_the_block_are_part_of_what_the_layer_returns():
    model = tiny_bert()
    with torch.no_grad(), capture(model, [LAYER, inputs(LAYER)]) as acts:
        peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["query"], init_lora_weights=False))
        model(TOKENS)
    assert torch.equal(acts[LAYER], plain(model))
    assert not torch.equal(acts[LAYER], plain(tiny_bert()))


def test_a_layer_that_an_adapter_wraps_in_the_block_did_not_run_until_it_is_unloaded():
    model, query = tiny_bert(), f"{LAYER}.attention.self.query"
    expected, config = (
        plain(tiny_bert(), query),
        peft.LoraConfig(r=2, target_modules=["query"], init_lora_weights=False),
    )
    text = f"'{query}' .another module took its place since the block began"
    with torch.no_grad(), pytest.raises(LayerNotRunError, match=text), capture(model, [LAYER, query]) as acts:
        peft.get_peft_model(model, config)
        model(TOKENS)
        assert acts.names == [LAYER]
    model = tiny_bert()
    with torch.no_grad(), capture(model, query) as acts:
        peft.get_peft_model(model, config).unload()
        model(TOKENS)
    assert torch.equal(acts[query], expected)


@pytest.mark.parametrize("place", ["cpu", "disk"])
def test_offloaded_weights_give_the_same_values(tmp_path, place):
    model, expected = tiny_bert(), plain(tiny_bert())
    options = {"offload_dir": str(tmp_path)} if place == "disk" else {}
    getattr(accelerate, f"{place}_offload")(model, execution_device=torch.device("cpu"), **options)
    with torch.no_grad(), capture(model, LAYER) as whole, capture(model, LAYER, reduce="mean") as acts:
        model(TOKENS)
    assert torch.equal(whole[LAYER], expected)
    torch.testing.assert_close(acts[LAYER], expected.mean(1))
