"""The fast recorders of the commonest case, by copy and by reference."""

from __future__ import annotations

import pytest
import torch
from models import Repeating, count_hooks
from torch import nn

from activation_extractor import capture
from activation_extractor.errors import TransformedCallError, ValueNotFoundError

BOTH = pytest.mark.parametrize("copy", [True, False])


class Pair(nn.Module):
    def forward(self, x):
        return None, (x,)


class Nothing(nn.Module):
    def forward(self, x):
        return None


@BOTH
def test_the_main_tensor_of_a_structure_is_kept(copy):
    model, x = nn.Sequential(Pair()), torch.randn(2, 3)
    with capture(model, "0", copy=copy) as acts:
        model(x)
    assert torch.equal(acts["0"], x)
    assert (acts["0"].data_ptr() == x.data_ptr()) is not copy


@BOTH
def test_a_call_inside_vmap_is_an_error(copy):
    model = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(TransformedCallError), capture(model, "0", copy=copy):
        torch.vmap(model)(torch.randn(3, 4))
    assert count_hooks(model) == 0


@BOTH
def test_an_output_without_a_tensor_is_an_error(copy):
    model = nn.Sequential(Nothing())
    with pytest.raises(ValueNotFoundError, match="or leave the layer out"), capture(model, "0", copy=copy):
        model(torch.randn(1))


@BOTH
def test_a_layer_that_runs_again_in_one_forward_warns(copy):
    model = Repeating()
    with pytest.warns(UserWarning, match="several times in one forward"):
        with capture(model, "layer", copy=copy):
            model(torch.randn(2, 4))


@BOTH
def test_the_forward_stops_early(stack, tokens, copy):
    with capture(stack, "h.1", copy=copy, stop_early=True) as acts:
        assert stack(tokens) is None
    assert acts["h.1"].shape == (2, 5, 8)


def test_a_reference_lets_go_of_its_graph_when_it_is_read_and_when_the_block_ends(stack, tokens):
    with capture(stack, ["h.0", "h.1"], copy=False) as acts:
        stack(tokens)
        assert not acts["h.0"].requires_grad
    assert not acts["h.1"].requires_grad


class BackwardInForward(nn.Module):
    """Returns the gradient of what a checkpointed layer computes, which runs the layer again."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x):
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            y = torch.utils.checkpoint.checkpoint(lambda x: self.layer(x).tanh(), x, use_reentrant=False)
            return torch.autograd.grad(y.sum(), x)[0]


@BOTH
def test_a_forward_that_runs_a_backward_of_its_own_has_each_layer_once(copy):
    model, x = BackwardInForward(), torch.randn(2, 4)
    with capture(model, "layer", copy=copy) as acts:
        model(x)  # a warning would be an error here
    assert torch.equal(acts["layer"], model.layer(x))


@BOTH
def test_a_value_of_a_transform_can_be_read_neither_in_the_block_nor_behind_it(copy):
    model = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(TransformedCallError), capture(model, "0", copy=copy, missing="skip") as acts:
        torch.vmap(model)(torch.randn(3, 4))
        with pytest.raises(TransformedCallError):
            acts["0"]
    with pytest.raises(TransformedCallError):
        acts["0"]
