"""Blocks and calls inside of backward, where a call of a layer may be a checkpoint's that computes again."""

from __future__ import annotations

import pytest
import torch
from models import count_hooks
from torch import nn
from torch.utils.checkpoint import checkpoint

from activation_extractor import MemorySink, capture, gradients, inputs, preview
from activation_extractor.errors import LayerNotRunError


def in_gradient_hook(function):
    """What a function returns that is called in a backward."""
    x, results = torch.ones(2, requires_grad=True), []
    doubled = x * 2
    doubled.register_hook(lambda gradient: results.append(function()))
    doubled.sum().backward()
    return results[0]


class Calling(torch.autograd.Function):
    """Calls a function in backward."""

    @staticmethod
    def forward(context, x, function, results):
        context.function, context.results = function, results
        return x * 2

    @staticmethod
    def backward(context, gradient):
        context.results.append(context.function())
        return gradient, None, None


def in_custom_backward(function):
    results = []
    Calling.apply(torch.ones(2, requires_grad=True), function, results).sum().backward()
    return results[0]


OPTIONS = [{}, {"copy": False}, {"reduce": "mean"}, {"reduce": "mean", "calls": "all"}, {"calls": "join"}]


@pytest.mark.parametrize("run", [in_gradient_hook, in_custom_backward])
@pytest.mark.parametrize("options", OPTIONS)
def test_a_block_inside_of_backward_records_what_it_would_outside(stack, tokens, run, options):
    def record():
        with capture(stack, ["h.*", inputs("h.1"), "embed"], **options) as acts:
            stack(tokens)
        return acts

    expected, acts = record(), run(record)
    assert list(acts) == list(expected)
    for key in expected:
        values, others = acts[key], expected[key]
        pairs = zip(values, others, strict=True) if isinstance(values, list) else [(values, others)]
        assert all(torch.equal(value, other) for value, other in pairs)
    assert count_hooks(stack) == 0


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_a_checkpoint_in_a_block_inside_of_backward_is_recorded_once(stack, tokens, use_reentrant):
    def record():
        with capture(stack.h, ["0", gradients("0")], calls="all") as acts, torch.enable_grad():
            x = torch.randn(2, 5, 8, requires_grad=True)
            checkpoint(stack.h[0], x, use_reentrant=use_reentrant).sum().backward()
        return acts

    acts = in_gradient_hook(record)
    assert (len(acts["0"]), len(acts["0:gradient"])) == (1, 1)


def test_a_layer_called_by_itself_inside_of_backward_is_recorded(stack):
    def record():
        with capture(stack, "h.0") as acts:
            stack.h[0](torch.ones(2, 5, 8))
        return acts["h.0"]

    assert torch.equal(in_gradient_hook(record), stack.h[0](torch.ones(2, 5, 8)))


@pytest.mark.parametrize("options", OPTIONS)
def test_a_block_that_was_entered_inside_of_backward_records_after_it_too(stack, tokens, options):
    block = capture(stack, ["h.1", inputs("h.2")], **options)
    acts = in_gradient_hook(block.__enter__)
    stack(tokens)
    block.__exit__(None, None, None)
    assert acts.names == ["h.1", "h.2:input"]


def test_stop_early_a_sink_and_preview_work_inside_of_backward(stack, tokens):
    def record():
        with capture(stack, "h.0", stop_early=True, sink=(sink := MemorySink())):
            assert stack(tokens) is None
        return sink.steps, preview(stack, "h.0", tokens)

    steps, seen = in_gradient_hook(record)
    assert len(steps) == 1
    assert seen[0].calls == 1


@pytest.mark.parametrize("options", OPTIONS)
def test_a_call_in_a_backward_of_the_blocks_body_is_an_error_that_says_so(stack, tokens, options):
    with pytest.raises(LayerNotRunError, match=r"'h.0' \(called in backward, as a checkpoint does"):
        with capture(stack, "h.0", **options):
            in_gradient_hook(lambda: stack(tokens))


@pytest.mark.filterwarnings("ignore:The model ran 2 times")
@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("order", [[0, 1], [1, 0]], ids=["first first", "last first"])
@pytest.mark.parametrize("calls", ["last", "all"])
def test_gradients_of_two_checkpointed_forwards_are_not_exchanged(use_reentrant, order, calls):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            return checkpoint(lambda hidden: self.b(self.a(hidden).tanh()), x, use_reentrant=use_reentrant)

    model, x = Net(), torch.randn(2, 4, requires_grad=True)
    with capture(model, gradients("b"), calls=calls) as acts:
        losses = [(model(x) * factor).sum() for factor in (1, 3)]
        for index in order:
            losses[index].backward()
    found = [float(value[0, 0]) for value in (acts["b:gradient"] if calls == "all" else [acts["b:gradient"]])]
    assert found == ([1, 3] if calls == "all" else [3])
