"""Quantized models: right values, and weights that are packed are in the digest."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.ao import quantization

from activation_extractor import capture, extract
from activation_extractor._format._fingerprints import structure_digest, weights_digest
from activation_extractor.errors import OtherRunError

pytestmark = pytest.mark.filterwarnings("ignore:.*")  # of torch and the libraries: old, or new
X = torch.randn(4, 6, 64, generator=torch.Generator().manual_seed(0))
LAYERS = ["a", "b"]


class Net(nn.Module):
    def __init__(self, change: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.act, self.b = nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64)
        with torch.no_grad():
            self.b.weight[0, 0] += change

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(self.act(self.a(x)))


class Static(Net):
    def __init__(self, change: float) -> None:
        super().__init__(change)
        self.quant, self.dequant = quantization.QuantStub(), quantization.DeQuantStub()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.dequant(super().forward(self.quant(x)))


def dynamic(change: float) -> nn.Module:
    return quantization.quantize_dynamic(Net(change).eval(), {nn.Linear}, dtype=torch.qint8)


def static(change: float) -> nn.Module:
    model = Static(change).eval()
    model.qconfig = quantization.get_default_qconfig(torch.backends.quantized.engine)
    prepared = quantization.prepare(model)
    prepared(X)
    return quantization.convert(prepared)


def static_by_fx(change: float) -> nn.Module:
    from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx

    mapping = quantization.get_default_qconfig_mapping(torch.backends.quantized.engine)
    prepared = prepare_fx(Net(change).eval(), mapping, (X,))
    prepared(X)
    return convert_fx(prepared)


def of_torchao(config: str) -> Callable[[float], nn.Module]:
    def make(change: float) -> nn.Module:
        torchao = pytest.importorskip("torchao.quantization", reason="needs torchao")
        model = Net(change).eval()
        torchao.quantize_(model, getattr(torchao, config)())
        return model

    return make


def of_bitsandbytes(layer: str) -> Callable[[float], nn.Module]:
    def make(change: float) -> nn.Module:
        bitsandbytes = pytest.importorskip("bitsandbytes", reason="needs bitsandbytes")
        options = {"has_fp16_weights": False} if "8" in layer else {"quant_type": "nf4"}
        model = Net(change).eval()
        packed = getattr(bitsandbytes.nn, layer)(64, 64, **options)
        packed.load_state_dict(model.b.state_dict())
        model.b = packed
        return model.to("cpu").eval()

    return make


KINDS = {
    "torch, dynamic": dynamic,
    "torch, static": static,
    "torch, static by fx": static_by_fx,
    **{f"torchao, {it}": of_torchao(it) for it in ("Int8WeightOnlyConfig", "Int8DynamicActivationInt8WeightConfig")},
    "torchao, Float8WeightOnlyConfig": of_torchao("Float8WeightOnlyConfig"),
    "bitsandbytes, 8 bits": of_bitsandbytes("Linear8bitLt"),
    "bitsandbytes, 4 bits": of_bitsandbytes("Linear4bit"),
}


def by_hand(model: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    values = {}

    def keep(name):
        def hook(module, args, output):
            values[name] = (output.dequantize() if output.is_quantized else output).detach().clone()

        return hook

    handles = [getattr(model, name).register_forward_hook(keep(name)) for name in LAYERS]
    with torch.no_grad():
        model(x)
    for handle in handles:
        handle.remove()
    return values


@pytest.mark.parametrize("make", KINDS.values(), ids=KINDS)
def test_values_are_right_and_a_run_goes_on_with_the_same_weights_alone(tmp_path, make):
    model = make(0.0)
    wanted = [by_hand(model, x) for x in X.split(2)]
    with torch.no_grad(), capture(model, LAYERS) as acts:
        model(X[:2])
    for name in LAYERS:
        value = acts[name]
        assert torch.equal(value.dequantize() if value.is_quantized else value, wanted[0][name])
    assert acts.numpy()["b"].shape == (2, 6, 64)
    store = extract(make(0.0), X.split(2), LAYERS, out=tmp_path, reduce="mean", progress=False)
    for name in LAYERS:
        expected = torch.cat([values[name].float().mean(1) for values in wanted])
        torch.testing.assert_close(store[name].torch().float(), expected, rtol=1e-5, atol=1e-5)
    assert weights_digest(make(0.0)) == weights_digest(make(0.0))  # in a forward bitsandbytes packs 4 bits anew
    assert structure_digest(make(0.0)) == structure_digest(model)  # which has run meanwhile
    assert weights_digest(make(0.9)) != weights_digest(make(0.0))
    assert extract(make(0.0), X.split(2), LAYERS, out=tmp_path, reduce="mean", progress=False).rows == 4
    with pytest.raises(OtherRunError, match="weights"):
        extract(make(0.9), X.split(2), LAYERS, out=tmp_path, reduce="mean", progress=False)
