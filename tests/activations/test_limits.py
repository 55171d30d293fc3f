"""What hooks cannot do: limits that the guide states, held to what it says."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from activation_extractor import capture
from activation_extractor.errors import LayerNotRunError, UnhookableLayerError


class Doubling(nn.Linear):
    def __call__(self, x):
        return 2 * super().__call__(x)


class CallingForward(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x):
        return self.inner.forward(x)


def test_what_a_class_makes_of_the_forwards_result_in_its_call_is_not_seen():
    model, x = nn.Sequential(Doubling(4, 4)), torch.ones(2, 4)
    with capture(model, "0") as acts:
        out = model(x)
    assert torch.equal(acts["0"], model[0].forward(x))
    assert torch.equal(out, 2 * acts["0"])


def test_a_layer_whose_forward_is_called_directly_did_not_run():
    model = CallingForward()
    with pytest.raises(LayerNotRunError, match=r"`.forward\(\)` called directly"), capture(model, "inner"):
        model(torch.ones(2, 4))


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace.*")
def test_layers_of_torchscript_are_refused_and_those_beside_them_recorded():
    model = nn.Sequential(torch.jit.trace(nn.Linear(4, 4), torch.ones(2, 4)), nn.Linear(4, 4))
    with pytest.raises(UnhookableLayerError, match="Layer '0' .* a TorchScript module, which refuses hooks"):
        capture(model, "0")
    with capture(model, "1") as acts:
        out = model(torch.ones(2, 4))
    assert torch.equal(acts["1"], out)


def test_a_fused_path_calls_no_layers_inside_of_it():
    model, x = nn.MultiheadAttention(4, 2), torch.ones(3, 1, 4)
    with pytest.raises(LayerNotRunError, match="a fused path"), capture(model, "out_proj"):
        model(x, x, x)
