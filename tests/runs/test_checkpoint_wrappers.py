"""Models with wrappers that compute a layer again in backward, or keep what it saves elsewhere."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint import checkpoint_wrapper as wrappers

from activation_extractor import blocks, capture, extract, gradients
from activation_extractor._format._fingerprints import weights_digest

X = torch.randn(4, 6, 8, generator=torch.Generator().manual_seed(0))
NAMES = ["h.0", "h.1", "h.1.0"]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.h = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.h:
            x = block(x)
        return x


def with_each(wrap, **options):
    def make():
        model = Net()
        for index, block in enumerate(model.h):
            model.h[index] = wrap(block, **options)
        return model

    return make


def applied():
    model = Net()
    wrappers.apply_activation_checkpointing(model, check_fn=lambda module: isinstance(module, nn.Sequential))
    return model


WRAPPED = {
    "not re-entrant": with_each(wrappers.checkpoint_wrapper, checkpoint_impl=wrappers.CheckpointImpl.NO_REENTRANT),
    "re-entrant": with_each(wrappers.checkpoint_wrapper, checkpoint_impl=wrappers.CheckpointImpl.REENTRANT),
    "offloaded": with_each(wrappers.offload_wrapper),
    "applied": applied,
}


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # of torch, without gradients
@pytest.mark.parametrize("make", WRAPPED.values(), ids=WRAPPED)
def test_layers_in_wrappers_have_their_plain_names_values_and_gradients(make, tmp_path):
    def recorded(model):
        x = X.clone().requires_grad_()
        with capture(model, [*NAMES, gradients("h.1")], calls="all") as acts:
            model(x).square().sum().backward()
        return {key: [it.detach() for it in value] for key, value in acts.items()}

    found, wanted = recorded(make()), recorded(Net())
    assert found.keys() == wanted.keys()
    assert all(len(value) == 1 for value in found.values())  # not once more in backward
    for key, value in wanted.items():
        torch.testing.assert_close(found[key], value)
    assert blocks(make()) == blocks(Net())
    assert weights_digest(make()) == weights_digest(Net())
    for _ in range(2):
        store = extract(make(), X.split(2), NAMES, out=tmp_path, reduce="mean", progress=False)
    for name in NAMES:
        torch.testing.assert_close(store[name].torch(), wanted[name][0].mean(1))
