"""The model computes the same bits, whatever a user's callable does with what it is given."""

from __future__ import annotations

import pytest
import torch
from models import BlockStack
from torch import nn

from activation_extractor import MemorySink, capture, extract, gradients, inputs, outputs, preview
from activation_extractor.errors import ArgumentError
from activation_extractor.sinks import Ragged

MASK = torch.tensor([[True, True, True, False, False], [True] * 5])
MODES = pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])


def zero_padding(activation, mask):
    activation[~mask] = 0
    mask[:] = False
    return activation.sum(1)


def through_numpy(activation, mask):
    activation.detach().numpy()[:] = 0
    return activation[:, 0]


def total(activation, mask):
    return activation.sum(1) + mask.sum()


class Structured(nn.Module):
    """Its inner layer returns a structure of each kind that can be written to."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = Returning(), nn.Linear(4, 4)

    def forward(self, x):
        made = self.inner(x)
        return self.outer(made["first"] + made["nested"][0])


class Returning(nn.Module):
    def forward(self, x):
        return {"first": x * 2, "nested": [x + 1, None]}


@MODES
@pytest.mark.parametrize("options", [{}, {"to": "cpu"}, {"calls": "all"}, {"calls": "join"}, {"copy": False}])
def test_a_reducer_may_write_to_what_it_is_given(stack, tokens, mode, options):
    if mode is torch.inference_mode and not options.get("copy", True):
        pytest.skip("copy=False is refused there")
    with mode():
        expected = stack(tokens, MASK)
        reducers = {"a": zero_padding, "b": through_numpy, "c": total, "d": "mean"}
        with capture(stack, "h.*", reduce=reducers, **options) as acts:
            assert torch.equal(stack(tokens, MASK), expected)
        with capture(stack, "h.*", reduce={"c": total, "d": "mean"}, **options) as alone:
            stack(tokens, MASK)
    assert MASK.sum() == 8
    for key in alone:
        found, right = ([*values[key]] for values in (acts, alone))  # of each call, or of each row
        assert all(map(torch.equal, found, right))


def test_what_a_reducer_writes_to_is_no_part_of_what_extract_stores(stack, tokens, tmp_path):
    expected = extract(stack, [(tokens, MASK)], "h.*", reduce={"c": total}, out=tmp_path / "a", progress=False)
    found = extract(
        stack, [(tokens, MASK)], "h.*", reduce={"a": zero_padding, "c": total}, out=tmp_path / "b", progress=False
    )
    assert all(torch.equal(found[layer, "c"][:], expected[layer][:]) for layer in expected)


@MODES
def test_a_callable_for_the_mask_may_write_to_what_it_is_given(stack, tokens, mode):
    def own_mask(layer, activation, mask):
        activation.zero_()
        mask[:, 3:] = False
        return mask

    with mode():
        expected = stack(tokens, MASK)
        with capture(stack, "h.*", reduce="mean", mask=own_mask) as acts, capture(stack, "h.*") as whole:
            assert torch.equal(stack(tokens, MASK), expected)
    assert all(torch.allclose(acts[layer], whole[layer][:, :3].mean(1)) for layer in acts)
    assert MASK.sum() == 8


SELECTS = {
    "value": lambda made: made["first"].mul_(3),
    "nested": lambda made: made["nested"][0].zero_(),
    "numpy": lambda made: made["first"].data.numpy().fill(3) or made["first"],
}


@pytest.mark.parametrize("select", [SELECTS["value"], SELECTS["nested"]])
@pytest.mark.parametrize("side", [outputs, gradients])
def test_a_callable_that_selects_a_part_may_not_write_to_it(select, side):
    model = Structured()
    with pytest.raises(ArgumentError, match="a callable for select= must leave the model's tensors as they are"):
        with capture(model, side("inner", select=select)):
            model(torch.randn(2, 4))


@pytest.mark.parametrize("select", SELECTS.values())
def test_under_inference_mode_it_writes_to_a_copy(select):
    model, x = Structured(), torch.randn(2, 4)
    with torch.inference_mode():
        expected = model(x)
        with capture(model, outputs("inner", select=select)) as acts:
            assert torch.equal(model(x), expected)
        preview(model, outputs("inner", select=select), x)
    assert acts["inner"].shape == (2, 4)


@MODES
def test_a_callable_that_selects_a_part_may_change_the_structure(mode):
    def taken_out(made):
        made["nested"].clear()
        return made.pop("first")

    def renamed(arguments):
        return arguments.pop("x")

    model, x = Structured(), torch.randn(2, 4)
    with mode():
        expected = model(x)
        with capture(model, [outputs("inner", select=taken_out), inputs("inner", select=renamed)]) as acts:
            assert torch.equal(model(x), expected)
    assert torch.equal(acts["inner"], x * 2)
    assert torch.equal(acts["inner:input"], x)


def test_the_selected_part_stays_a_part_of_the_graph():
    model, x = Structured(), torch.randn(2, 4, requires_grad=True)
    with capture(model, outputs("inner", select=lambda made: made["first"]), detach=False) as acts:
        model(x)
    (gradient,) = torch.autograd.grad(acts["inner"].sum(), x)
    assert torch.equal(gradient, torch.full((2, 4), 2.0))


def test_a_predicate_may_not_write_to_the_model(stack):
    def zeroed(name, module):
        for weight in module.parameters():
            weight.detach().zero_()
        return True

    with pytest.raises(ArgumentError, match="a predicate in layers must leave the model's weights as they are"):
        capture(stack, zeroed)


def test_a_sink_may_write_to_what_it_is_given(stack, tokens):
    class Zeroing(MemorySink):
        def write(self, step):
            for value in step.values.values():
                (value.values if isinstance(value, Ragged) else value).zero_()
            super().write(step)

    expected = stack(tokens, MASK)
    with capture(stack, "h.*", reduce=["full", "mean"], sink=Zeroing()):
        assert torch.equal(stack(tokens, MASK), expected)


@pytest.mark.parametrize("calls", ["last", "all"])
def test_layers_that_a_callable_calls_are_called_by_hand(tokens, calls):
    class WithHead(BlockStack):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(8, 3)

        def forward(self, input_ids, attention_mask=None):
            return self.head(super().forward(input_ids, attention_mask))

    model = WithHead().eval()

    def lens(activation, mask):
        return model.head(activation)[:, -1]

    with torch.no_grad(), capture(model, "head", calls=calls) as acts, capture(model, "h.*", reduce=lens) as read:
        expected = model(tokens)
    heads = acts["head"] if calls == "all" else [acts["head"]]
    assert len(heads) == 1
    assert torch.equal(heads[0], expected)
    assert read["h.2"].shape == (2, 3)


@pytest.mark.parametrize("options", [{}, {"to": "cpu"}, {"calls": "all"}])
def test_a_reducer_may_use_a_buffer_again(stack, tokens, options):
    buffer = torch.zeros(2, 8)

    def total(activation, mask):
        torch.sum(activation, 1, out=buffer)
        return buffer

    reducers = {"own": total, "sum": lambda x, mask: x.sum(1)}
    with torch.no_grad(), capture(stack, "h.*", reduce=reducers, **options) as acts:
        stack(tokens)
    for name in acts.names:
        own, expected = acts[name, "own"], acts[name, "sum"]
        assert torch.equal(*(own, expected) if isinstance(own, torch.Tensor) else (own[0], expected[0]))


@pytest.mark.parametrize("options", [{}, {"to": "cpu"}, {"calls": "join"}])
def test_what_a_reducer_with_weights_returns_holds_no_graph_unless_it_is_wanted(stack, tokens, options):
    probe = nn.Linear(8, 2)
    for detach in (True, False):
        with capture(stack, "h.1", reduce=lambda x, mask: probe(x.mean(1)), detach=detach, **options) as acts:
            stack(tokens)
        assert acts["h.1"].requires_grad is not detach
