"""The model's own call: `stop_early`, and what stands in for the call while a block is open."""

from __future__ import annotations

import pytest
import torch
from models import BlockStack, count_hooks
from torch import nn
from torch.utils.checkpoint import checkpoint

from activation_extractor import MemorySink, capture, inputs
from activation_extractor.errors import StopEarlyError


def counted(module: nn.Module) -> list[int]:
    calls: list[int] = []
    module.register_forward_hook(lambda *call: calls.append(1))
    return calls


@pytest.mark.filterwarnings("ignore:The model ran")
@pytest.mark.parametrize("layers", [["h.0", "h.1"], ["h.1", "h.0"], "h.[01]", inputs("h.2")])
def test_the_rest_of_the_forward_is_not_run_once_every_layer_has_run(stack, tokens, layers):
    late, early = counted(stack.h[2]), counted(stack.h[1])
    with capture(stack, layers, stop_early=True) as acts:
        assert stack(tokens) is None
        stack(tokens)
    assert (len(early), len(late)) == (2, 0)
    with capture(stack, layers) as whole:
        assert stack(tokens) is not None
    assert all(torch.equal(acts[name], whole[name]) for name in whole)


def test_every_other_capture_in_the_context_is_served_first(stack, tokens):
    last, layer_two = counted(stack.h[3]), counted(stack.h[2])
    with capture(stack, "h.2") as served, capture(stack, "h.0", stop_early=True) as acts:
        assert stack(tokens) is None
    assert (len(acts), len(served), len(layer_two), len(last)) == (1, 1, 1, 0)
    with capture(stack, "h.0", stop_early=True), capture(stack, "h.2") as served:
        assert stack(tokens) is None
    assert (len(served), len(last)) == (1, 0)


def test_a_capture_of_gradients_needs_the_whole_forward(stack, tokens):
    from activation_extractor import gradients

    with capture(stack, gradients("h.0")) as grads, capture(stack, "h.0", stop_early=True):
        stack(tokens).sum().backward()
    assert len(grads) == 1


def test_captures_of_other_models_do_not_matter(stack, tokens):
    other = BlockStack()
    with capture(other, "h.0", missing="skip"), capture(stack, "h.0", stop_early=True):
        assert stack(tokens) is None


def test_a_stop_in_a_model_inside_a_captured_one_ends_the_inner_one_alone():
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.head = BlockStack(), nn.Linear(8, 1)

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.head(torch.ones(8) if self.inner(ids) is None else torch.zeros(8))

    model = Outer()
    with capture(model, "head") as outer, capture(model.inner, "h.0", stop_early=True):
        model(torch.zeros(1, 2, dtype=torch.long))
    torch.testing.assert_close(outer["head"], model.head(torch.ones(8)).detach())


def test_a_stop_that_passes_through_a_captured_part_ends_its_step_well(tokens):
    model, sink = nn.Sequential(BlockStack()), MemorySink()
    with capture(model[0], "h.0", sink=sink), capture(model, "0.h.1", stop_early=True):
        assert model(tokens) is None
    assert [step.rows for step in sink.steps] == [2]


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_a_checkpointed_model_is_one_step_although_backward_runs_it_again(stack, use_reentrant):
    block, sink, x = stack.h[0], MemorySink(), torch.randn(2, 5, 8, requires_grad=True)
    with capture(block, "mlp", sink=sink):
        checkpoint(block, x, use_reentrant=use_reentrant).sum().backward()
    assert len(sink.steps) == 1


def test_each_stopped_forward_is_a_step(stack, tokens):
    sink = MemorySink()
    with capture(stack, "h.0", stop_early=True, sink=sink):
        stack(tokens)
        stack(tokens[:1])
    assert [step.rows for step in sink.steps] == [2, 1]


def test_a_stop_cannot_be_swallowed_by_the_model():
    class Careful(BlockStack):
        def forward(self, input_ids, attention_mask=None):
            try:
                return super().forward(input_ids)
            except Exception:
                return "swallowed"

    model = Careful()
    with capture(model, "h.0", stop_early=True):
        assert model(torch.zeros(1, 2, dtype=torch.long)) is None


@pytest.mark.parametrize("use", [lambda out: out.sum(), lambda out: out[0], lambda out: [*out]])
def test_an_outer_caller_that_needs_the_output_is_an_error_with_advice(stack, tokens, use):
    with pytest.raises(StopEarlyError) as caught, capture(stack, "h.0", stop_early=True):
        use(stack(tokens))
    assert str(caught.value) == (
        "With stop_early the model returns None, and an outer caller (generate, a pipeline, a loss) needed its output. "
        "Call the model directly and do not use what it returns, or leave stop_early out."
    )
    assert caught.value.__cause__ is not None


def test_generate_with_stop_early_is_an_error_with_advice():
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=16, n_head=2, vocab_size=20, bos_token_id=1, eos_token_id=1))
    with pytest.raises(StopEarlyError, match="generate"), capture(model, "transformer.h.0", stop_early=True):
        model.generate(torch.zeros(1, 2, dtype=torch.long), attention_mask=torch.ones(1, 2), max_new_tokens=2)
    assert count_hooks(model) == 0


def test_another_error_of_the_body_passes_as_it_is(stack, tokens):
    with pytest.raises(ZeroDivisionError), capture(stack, "h.0", stop_early=True):
        stack(tokens)
        raise ZeroDivisionError


def test_a_layer_that_never_runs_lets_the_forward_run_to_its_end(stack, tokens):
    stack.spare = nn.Linear(8, 8)
    with capture(stack, ["h.0", "spare"], stop_early=True, missing="skip"):
        assert stack(tokens).shape == (2, 5, 8)


@pytest.mark.filterwarnings("ignore:.* is compiled, and runs eagerly")
def test_what_stood_in_for_the_call_before_is_put_back_in_any_order_of_exits(stack, tokens):
    calls = []

    def foreign_call(*args, **kwargs):
        calls.append(1)
        return stack._call_impl(*args, **kwargs)

    stack._compiled_call_impl = foreign_call
    one, two = capture(stack, "h.0"), capture(stack, "h.1")
    one.__enter__(), two.__enter__()
    stack(tokens)
    one.__exit__(None, None, None)
    two.__exit__(None, None, None)
    assert stack.__dict__["_compiled_call_impl"] is foreign_call
    assert len(calls) == 1


def test_a_call_that_is_replaced_inside_the_block_stays(stack, tokens):
    with capture(stack, "h.0"):
        stack._compiled_call_impl = stack._call_impl
        stack(tokens)
    assert stack.__dict__["_compiled_call_impl"] == stack._call_impl


def test_the_stand_in_is_gone_after_the_block(stack, tokens):
    with capture(stack, "h.0"):
        stack(tokens)
        assert "_compiled_call_impl" in stack.__dict__
    assert "_compiled_call_impl" not in stack.__dict__
