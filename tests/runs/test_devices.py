"""Where batches go when weights are elsewhere, and models that cannot run yet."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from activation_extractor import extract
from activation_extractor.errors import ArgumentError, OtherRunError
from activation_extractor.runs._devices import devices

X = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))


def offload(module: nn.Linear, **hook) -> nn.Linear:
    """What accelerate does: the weights are placeholders, and come for the time of a call, to the execution device."""
    weights = {name: value.detach() for name, value in module.named_parameters()}

    def bring(module, args):
        for name, value in weights.items():
            module._parameters[name] = nn.Parameter(value, requires_grad=False)

    def take(module, args, output):
        for name, value in weights.items():
            module._parameters[name] = nn.Parameter(value.to("meta"), requires_grad=False)

    take(module, (), None)
    module.register_forward_pre_hook(bring)
    module.register_forward_hook(take)
    if hook:
        module._hf_hook = SimpleNamespace(**hook)
    return module


def offloaded(seed: int = 0, **hook) -> nn.Sequential:
    torch.manual_seed(seed)
    model = nn.Sequential(*(offload(nn.Linear(4, 4), **hook) for _ in range(2)))
    if hook:
        model._hf_hook = SimpleNamespace(execution_device=None)
    return model


HOOKS = {
    "one": {"execution_device": torch.device("cpu")},
    "a_word": {"execution_device": "cpu"},
    "several": {"hooks": (SimpleNamespace(), SimpleNamespace(execution_device="cpu"))},
}


@pytest.mark.parametrize("hook", HOOKS.values(), ids=HOOKS)
def test_batches_go_where_the_hooks_of_accelerate_run_an_offloaded_model(tmp_path, hook):
    torch.manual_seed(0)
    expected = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))(X)
    store = extract(offloaded(**hook), X.split(2), "1", out=tmp_path, progress=False)
    assert torch.allclose(store["1"].torch(), expected)
    assert devices(offloaded(**hook)) == {torch.device("cpu")}


def test_other_offloaded_weights_are_another_run(tmp_path):
    extract(offloaded(execution_device="cpu"), X.split(2), "1", out=tmp_path, progress=False)
    with pytest.raises(OtherRunError, match="layer '1' with 'full' differs by"):
        extract(offloaded(1, execution_device="cpu"), X.split(2), "1", out=tmp_path, progress=False)
    extract(offloaded(execution_device="cpu"), X.split(2), "1", out=tmp_path, progress=False)


def test_weights_that_come_another_way_need_the_device(tmp_path):
    text = "model must have weights to compute with, got 'placeholders on the meta device'. Load them"
    with pytest.raises(ArgumentError, match=text):
        extract(offloaded(), X.split(2), "1", out=tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()
    assert extract(offloaded(), X.split(2), "1", out=tmp_path / "out", device="cpu", progress=False).rows == 6  # advice


def test_a_head_that_is_not_loaded_is_not_in_the_way_of_what_is_before_it(tmp_path):
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 9, device="meta"))
    assert extract(model, X.split(2), "0", out=tmp_path / "a", stop_early=True, progress=False).rows == 6
    model = nn.Sequential(offload(nn.Linear(4, 4)), nn.Linear(4, 4))
    assert extract(model, X.split(2), "*", out=tmp_path / "b", progress=False).rows == 6


@pytest.mark.parametrize("lazy", [nn.LazyLinear(4), nn.LazyBatchNorm1d(affine=False)], ids=["weight", "buffer"])
def test_a_lazy_model_is_an_error_until_a_batch_went_through(tmp_path, lazy):
    model = nn.Sequential(nn.Linear(4, 4), lazy)
    text = r"model must have all of its weights, got 'none yet for 1\.\w+'\. Run one batch through it first"
    with pytest.raises(ArgumentError, match=text):
        extract(model, X.split(3), "*", out=tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()
    model(X)  # as the text advises
    assert extract(model, X.split(3), "*", out=tmp_path / "out", progress=False).rows == 6


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
def test_sparse_weights_run_without_inference_mode(tmp_path):
    model = nn.Sequential(nn.Linear(4, 4))
    expected = model(X).detach()
    model[0].weight = nn.Parameter(model[0].weight.detach().to_sparse_csr(), requires_grad=False)
    for _ in range(2):
        store = extract(model, X.split(2), "0", out=tmp_path, progress=False)
    torch.testing.assert_close(store["0"].torch(), expected)
