"""A `MaskedTensor` of torch.masked, which few of torch's operations know: right, or an error that says what to do."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.masked import MaskedTensor, masked_tensor

from activation_extractor import MemorySink, capture, extract
from activation_extractor.errors import TensorKindError

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # of torch.masked, which is in prototype stage
X = torch.randn(2, 3, 4)
MODES = pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
TEXT = "^The value of layer '0' must hold plain numbers in a step of a sink, got a MaskedTensor, a class that wraps"


class Masks(nn.Module):
    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> MaskedTensor:
        return masked_tensor(x.detach().clone(), x > 0)


def plain(value: MaskedTensor) -> Tensor:
    return value.to_tensor(0)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.add_module("0", Masks())

    def forward(self, x, attention_mask=None):
        return self.get_submodule("0")(x)


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad])
def test_the_rows_of_a_memory_sink_are_right(mode):
    model, sink = Model(), MemorySink()
    with mode(), capture(model, "0", sink=sink):
        model(X)
        model(X[:1] * 2)
    rows = sink["0", "full"]
    assert [type(row) for row in rows] == [MaskedTensor] * 3
    assert all(map(torch.equal, map(plain, rows), [*X.relu(), X[0].relu() * 2]))


def test_where_torch_has_no_operation_the_error_names_the_layer_and_what_to_do():
    model, sink = Model(), MemorySink()
    with torch.inference_mode(), pytest.raises(TensorKindError, match=TEXT), capture(model, "0", sink=sink):
        model(X)
    with pytest.raises(TensorKindError, match=TEXT), capture(model, "0", sink=sink):
        model(X, attention_mask=torch.tensor([[1, 1, 0], [1, 1, 1]]))
    assert not sink.steps


def test_stores_say_so_in_every_mode(tmp_path):
    model = Model()
    with pytest.raises(TensorKindError, match="The value of layer '0' must hold plain numbers"):
        extract(model, [(X,)], "0", out=tmp_path / "a", progress=False)
    with pytest.raises(TensorKindError, match="The value of layer '0' must hold plain numbers"):
        with capture(model, "0", sink=tmp_path / "b"):
            model(X)


@MODES
def test_a_reducer_to_a_plain_tensor_makes_all_of_it_work(mode, tmp_path):
    model, sink = Model(), MemorySink()

    def dense(activation, mask):
        return activation.get_data() * activation.get_mask()

    with mode(), capture(model, "0", reduce=dense, sink=sink):
        model(X)
    assert torch.equal(sink["0", "dense"], X.relu())
    store = extract(model, [(X,)], "0", reduce=dense, out=tmp_path / "store", progress=False)
    assert torch.equal(store["0", "dense"][:], X.relu())


@pytest.mark.parametrize("reduce", ["mean", "max", "first", "last"])
@MODES
def test_reducers_give_masked_results_or_an_error_of_the_layer(reduce, mode):
    model, refused = Model(), []
    with mode():
        try:
            with capture(model, "0", reduce=reduce) as acts:
                model(X)
        except TensorKindError as error:
            refused.append(error.layer)
    if refused:
        assert (refused, mode) == (["0"], torch.inference_mode)
        return
    index, masked = {"first": 0, "last": 2}.get(reduce), masked_tensor(X, X > 0)
    expected = {"mean": masked.mean, "max": masked.amax}.get(reduce, lambda dim: masked[:, index])(1)
    assert torch.equal(acts["0"].get_mask(), expected.get_mask())
    assert torch.allclose(plain(acts["0"]), plain(expected))


@MODES
def test_reading_and_showing_work_in_every_mode(mode):
    model = Model()
    with mode(), capture(model, "0") as acts, capture(model, "0", calls="all") as every:
        model(X)
    assert torch.equal(plain(acts["0"]), X.relu())
    assert torch.equal(plain(every["0"][0]), X.relu())
    assert "(2, 3, 4)" in repr(acts)
    with pytest.raises(TensorKindError):
        acts.numpy()
