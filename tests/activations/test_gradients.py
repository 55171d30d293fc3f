"""Gradients as a block records them: which ones, in which order, and what happens when they do not come."""

from __future__ import annotations

import pytest
import torch
from models import Repeating, count_hooks

from activation_extractor import MemorySink, capture, gradients
from activation_extractor.errors import GradientNotFoundError, LayerNotRunError, StepError


def test_gradients_of_every_layer_come_in_the_order_of_backward(stack, tokens):
    with capture(stack, gradients("h.*")) as acts:
        hidden = stack.embed(tokens)
        kept = []
        for block in stack.h:
            hidden = block(hidden)
            hidden.retain_grad()
            kept.append(hidden)
        (hidden * torch.arange(8.0)).sum().backward()
    assert list(acts) == [f"h.{index}:gradient" for index in (3, 2, 1, 0)]
    assert all(torch.equal(acts[f"h.{index}:gradient"], kept[index].grad) for index in range(4))


def test_a_gradient_is_the_one_of_what_the_layer_returned_before_it_was_overwritten(cnn):
    with capture(cnn, gradients("norm")) as acts, capture(cnn, gradients("act")) as after:
        cnn(torch.randn(2, 3, 8, 8)).sum().backward()
    assert (acts["norm:gradient"] == 0).any()  # the ReLU's derivative is in it
    assert not (after["act:gradient"] == 0).any()


@pytest.mark.parametrize("run", ["no backward", "no grad"])
def test_a_gradient_that_never_came_is_an_error(stack, tokens, run):
    with pytest.raises(GradientNotFoundError) as caught, capture(stack, gradients("h.0")):
        with torch.set_grad_enabled(run == "no backward"):
            stack(tokens)
    assert str(caught.value) == (
        "Requested gradients did not come before the step ended: 'h.0:gradient' (no backward, grad mode off, or an "
        "output that the loss does not depend on). Call backward inside the block, or pass missing='skip'."
    )
    assert count_hooks(stack) == 0


def test_a_gradient_that_comes_after_the_block_is_not_recorded(stack, tokens):
    with capture(stack, gradients("h.0"), missing="skip") as acts:
        out = stack(tokens)
    out.sum().backward()
    assert len(acts) == 0


def test_gradients_of_all_calls_are_in_the_order_of_the_calls():
    model = Repeating()
    with capture(model, gradients("layer"), calls="all") as acts:
        model(torch.randn(2, 4)).sum().backward()
    grads = acts["layer:gradient"]
    assert torch.equal(grads[2], torch.ones(2, 4))
    torch.testing.assert_close(grads[1], grads[2] @ model.layer.weight)
    torch.testing.assert_close(grads[0], grads[1] @ model.layer.weight)


def test_gradients_of_the_last_call_are_kept_by_default():
    model = Repeating()
    with capture(model, gradients("layer")) as acts:
        model(torch.randn(2, 4)).sum().backward()
    assert torch.equal(acts["layer:gradient"], torch.ones(2, 4))


def test_gradients_are_reduced_with_the_mask_of_their_forward(stack, tokens):
    mask = torch.tensor([[1, 1, 0, 0, 0], [1, 1, 1, 1, 1]])
    with capture(stack, gradients("h.3"), reduce=["full", "mean"]) as acts:
        stack(tokens, attention_mask=mask).square().sum().backward()
    whole = acts["h.3:gradient", "full"]
    torch.testing.assert_close(acts["h.3:gradient", "mean"][0], whole[0, :2].mean(0))


def test_gradients_go_to_a_sink_inside_a_step_block_only(stack, tokens):
    sink = MemorySink()
    with capture(stack, gradients("h.0"), sink=sink) as acts:
        for _ in range(2):
            with acts.step():
                stack(tokens).sum().backward()
    assert len(sink["h.0:gradient", "full"]) == 4
    with pytest.raises(StepError, match="hold forward and backward when gradients go to a sink"):
        with capture(stack, gradients("h.0"), sink=sink):
            stack(tokens).sum().backward()


def test_a_gradient_that_comes_in_a_later_step_does_not_belong_there(stack, tokens):
    sink = MemorySink()
    with capture(stack, gradients("h.3"), sink=sink, missing="skip") as acts:
        with acts.step():
            early = stack(tokens).sum()
        with acts.step():
            late = stack(tokens[:1]).sum()
            (late * 2).backward()
            early.backward()
    assert torch.equal(sink["h.3:gradient", "full"][0], torch.full((5, 8), 2.0))
    assert len(sink.steps) == 1


def test_a_gradient_of_an_earlier_step_does_not_count_for_a_later_one(stack, tokens):
    with pytest.raises(LayerNotRunError, match=r"'h.3'"), capture(stack, gradients("h.3"), sink=MemorySink()) as acts:
        with acts.step():
            stack(tokens).sum().backward()
        with acts.step():
            pass
