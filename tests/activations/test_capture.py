"""`capture` as a with-block: what comes out, what is checked at the door, what is left behind."""

from __future__ import annotations

import contextlib
import contextvars
import inspect

import pytest
import torch
from models import BlockStack, count_hooks
from torch import nn

from activation_extractor import Capture, MemorySink, capture, gradients, inputs, outputs
from activation_extractor.errors import (
    ActivationNotFoundError,
    ArgumentError,
    ArgumentTypeError,
    DuplicateLayerError,
    LayerNotFoundError,
    StepError,
)


def test_a_block_hands_out_what_the_layers_returned(stack, tokens):
    seen = {}
    handles = [
        stack.h[i].register_forward_hook(lambda module, args, output, i=i: seen.update({f"h.{i}": output.clone()}))
        for i in range(4)
    ]
    with capture(stack, "h.*") as acts:
        stack(tokens)
    assert list(acts) == ["h.0", "h.1", "h.2", "h.3"]
    assert all(torch.equal(acts[name], seen[name]) for name in acts)
    for handle in handles:
        handle.remove()


def test_the_model_computes_the_same_bits_and_is_as_before(cnn):
    images, flags = torch.randn(2, 3, 8, 8), [module.training for module in cnn.modules()]
    addresses = [tensor.data_ptr() for tensor in (*cnn.parameters(), *cnn.buffers())]
    expected = cnn(images)
    with capture(cnn, "**"):
        assert torch.equal(cnn(images), expected)
        assert torch.is_grad_enabled()
    assert torch.equal(cnn(images), expected)
    assert [module.training for module in cnn.modules()] == flags
    assert [tensor.data_ptr() for tensor in (*cnn.parameters(), *cnn.buffers())] == addresses
    assert count_hooks(cnn) == 0


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_a_value_is_as_the_layer_returned_it_whatever_writes_to_it_later(cnn, mode):
    with mode(), capture(cnn, ["norm", "act"]) as acts:
        cnn(torch.randn(2, 3, 8, 8))
    assert acts["norm"].min() < 0  # the ReLU behind it wrote zeros over the layer's own tensor
    assert torch.equal(acts["act"], acts["norm"].relu())


@pytest.mark.parametrize("reduce", [None, "mean"])
def test_what_ran_under_inference_mode_is_usable_by_autograd(stack, tokens, reduce):
    with torch.inference_mode(), capture(stack, "h.1", reduce=reduce) as acts:
        stack(tokens)
    weight = torch.ones(8, requires_grad=True)
    (acts["h.1"] * weight).sum().backward()
    assert not acts["h.1"].is_inference()
    assert weight.grad is not None


def test_values_are_outside_the_graph_unless_asked_for(stack, tokens):
    with capture(stack, "h.1") as detached, capture(stack, "h.1", detach=False) as attached:
        stack(tokens)
    assert not detached["h.1"].requires_grad
    attached["h.1"].sum().backward()
    assert stack.embed.weight.grad is not None


def test_a_reduction_with_detach_off_stays_in_the_graph(stack, tokens):
    with capture(stack, "h.1", reduce="mean", detach=False) as acts:
        stack(tokens)
    acts["h.1"].sum().backward()
    assert stack.embed.weight.grad is not None


def test_results_stay_after_the_block_until_they_are_cleared(stack, tokens):
    with capture(stack, "h.*") as acts:
        stack(tokens)
    assert acts.nbytes == 4 * 2 * 5 * 8 * 4
    acts.clear()
    assert (len(acts), acts.nbytes) == (0, 0)
    with pytest.raises(ActivationNotFoundError, match="Nothing has been recorded yet, or it was cleared"):
        acts["h.0"]


def test_a_capture_is_reusable_and_each_entry_has_results_of_its_own(stack, tokens):
    recorded = capture(stack, "h.0")
    with recorded as first:
        stack(tokens)
    with recorded as second:
        stack(tokens[:1])
    assert (first["h.0"].shape[0], second["h.0"].shape[0]) == (2, 1)


@pytest.mark.filterwarnings("ignore:The model ran")
def test_a_capture_can_be_entered_inside_itself(stack, tokens):
    recorded = capture(stack, "h.0")
    with recorded as outer:
        with recorded as inner:
            stack(tokens)
        assert count_hooks(stack) == 2  # the outer one's hook and its watch over the model's call
        stack(tokens[:1])
    assert (outer["h.0"].shape[0], inner["h.0"].shape[0]) == (1, 2)
    assert count_hooks(stack) == 0


@pytest.mark.filterwarnings("ignore:The model ran")
def test_captures_on_one_model_may_end_in_any_order(stack, tokens):
    one, two = capture(stack, "h.0"), capture(stack, "h.*")
    first = one.__enter__()
    second = two.__enter__()
    stack(tokens)
    one.__exit__(None, None, None)
    stack(tokens[:1])
    two.__exit__(None, None, None)
    assert (first["h.0"].shape[0], second["h.0"].shape[0]) == (2, 1)
    assert count_hooks(stack) == 0


@pytest.mark.parametrize("error", [ValueError("x"), KeyboardInterrupt(), SystemExit()])
def test_hooks_are_gone_when_the_body_raises_and_nobody_elses_are_touched(stack, tokens, error):
    foreign = stack.h[0].register_forward_hook(lambda *call: None)
    with pytest.raises(type(error)), capture(stack, ["h.*", inputs("h.*"), gradients("h.*")]):
        stack(tokens)
        raise error
    assert list(stack.h[0]._forward_hooks) == [foreign.id]
    assert count_hooks(stack) == 1


def test_hooks_are_gone_when_the_forward_raises_or_a_reducer_does(stack, tokens):
    def broken(activation, mask):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError) as caught, capture(stack, "h.0", reduce=broken):
        stack(tokens)
    assert caught.value.__notes__ == ["while reducing layer 'h.0' with 'broken', activation (2, 5, 8)"]
    with pytest.raises(IndexError), capture(stack, "h.0"):
        stack(torch.tensor([[99]]))
    assert count_hooks(stack) == 0


def test_hooks_are_gone_when_a_generator_is_closed_in_another_context(stack, tokens):
    def activations():
        with capture(stack, "h.0") as acts:
            stack(tokens)
            yield acts

    generator = activations()
    acts = contextvars.copy_context().run(next, generator)
    assert count_hooks(stack) == 2
    generator.close()
    assert count_hooks(stack) == 0
    assert acts["h.0"].shape == (2, 5, 8)


def test_an_exit_too_many_is_an_error(stack):
    with pytest.raises(StepError, match="got one exit too many"):
        capture(stack, "h.0").__exit__(None, None, None)


def test_interrupting_the_entry_leaves_no_hook_behind(stack, monkeypatch):
    calls = iter([None, None, KeyboardInterrupt()])
    register = nn.Module.register_forward_hook

    def interrupted(self, *args, **kwargs):
        if (error := next(calls)) is not None:
            raise error
        return register(self, *args, **kwargs)

    monkeypatch.setattr(nn.Module, "register_forward_hook", interrupted)
    with pytest.raises(KeyboardInterrupt), capture(stack, "h.*"):
        pass
    assert count_hooks(stack) == 0


def test_inputs_outputs_and_gradients_are_recorded_side_by_side(stack, tokens):
    with capture(stack, [outputs("h.1"), inputs("h.1"), gradients("h.1")]) as acts:
        stack(tokens).sum().backward()
    assert list(acts) == ["h.1:input", "h.1", "h.1:gradient"]
    with capture(stack, {"before": "h.0"}) as named:
        stack(tokens)
    assert torch.equal(acts["h.1:input"], named["before"])


def test_the_root_itself_can_be_captured_by_its_empty_name_or_as_a_module(stack, tokens):
    with capture(stack, "") as by_name, capture(stack, stack) as by_module:
        returned = stack(tokens)
    assert torch.equal(by_name[""], returned)
    assert torch.equal(by_module[""], returned)


BAD_VALUES = [
    ({"calls": "first"}, "calls must be one of 'last', 'all', 'join', got 'first'."),
    ({"missing": "ignore"}, "missing must be one of 'error', 'skip', got 'ignore'."),
    ({"stop_early": 1}, "stop_early must be True or False, got 1."),
    ({"copy": "no"}, "copy must be True or False, got 'no'."),
    ({"detach": None}, "detach must be True or False, got None."),
    ({"max_bytes": 0}, "max_bytes must be a positive number of bytes or None, got 0."),
    ({"max_bytes": "1GB"}, "max_bytes must be a positive number of bytes or None, got '1GB'."),
    ({"to": "gpu"}, "to must be a device such as 'cpu' or 'cuda:0', got 'gpu'."),
    ({"reduce": "average"}, "reduce must be one of full, mean, first, last, max, FT, LT or a callable, got 'average'."),
    ({"reduce": []}, "reduce must name at least one reducer, got []."),
    ({"reduce": 3}, "reduce must be a name, a callable (activation, mask) -> tensor or several, got 3."),
    ({"sequence_axis": "1"}, "sequence_axis must be an integer or a tuple of integers, got '1'."),
    ({"sequence_axis": (2, 2)}, "sequence_axis must name different axes, got (2, 2)."),
    ({"sequence_axis": (2, 3), "calls": "join"}, "sequence_axis must name one axis with calls='join', got (2, 3)."),
    ({"sink": 3}, "sink must be a Sink or a folder's path, got 3."),
    ({"sink": MemorySink(), "copy": False}, "copy must stay True with a sink, got False."),
    ({"sink": MemorySink(), "detach": False}, "detach must stay True with a sink, got False."),
    ({"mask": 3}, "mask must be an argument's name, a tensor, a dict, a callable"),
    ({"mask": torch.ones(2, 3, 4)}, "The mask must have shape (batch, seq), got shape (2, 3, 4)."),
    ({"mask": "no_such"}, "mask must name an argument of the model (attention_mask, input_ids), got 'no_such'."),
]


@pytest.mark.parametrize(("options", "text"), BAD_VALUES, ids=lambda value: str(value)[:40])
def test_an_unusable_option_is_an_error_before_any_hook_is_attached(stack, options, text):
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the text is compared below
        capture(stack, "h.*", **options)
    assert str(caught.value).startswith(text)
    assert count_hooks(stack) == 0


def test_an_unusable_model_or_selection_is_an_error_that_touches_no_folder(stack, tmp_path):
    with pytest.raises(ArgumentTypeError, match=r"^model must be a torch.nn.Module .*, got 'bert'. Load the model"):
        capture("bert", "h.*")
    with pytest.raises(ArgumentError, match=r"^layers must select at least one layer, got \[\]"):
        capture(stack, [], sink=tmp_path / "out")
    with pytest.raises(LayerNotFoundError, match=r"^No layer matches 'h.00'. Close matches: 'h.0'"):
        capture(stack, "h.00", sink=tmp_path / "out")
    with pytest.raises(DuplicateLayerError):
        capture(stack, ["h.0", "h.0"], sink=tmp_path / "out")
    with pytest.raises(ArgumentTypeError):
        capture(stack, None)
    assert not (tmp_path / "out").exists()
    assert count_hooks(stack) == 0


def test_stop_early_is_refused_with_gradients_which_need_the_whole_forward(stack):
    with pytest.raises(ArgumentError, match="stop_early must be False when gradients are recorded"):
        capture(stack, gradients("h.0"), stop_early=True)


def test_everything_after_the_two_main_arguments_is_keyword_only():
    kinds = [parameter.kind for parameter in inspect.signature(capture).parameters.values()]
    assert kinds[2:] == [inspect.Parameter.KEYWORD_ONLY] * (len(kinds) - 2)


def test_a_capture_shows_what_it_is(stack):
    assert repr(capture(stack, "h.*", reduce="mean")) == "capture(BlockStack, 4 targets, reduce=['mean'])"
    assert isinstance(capture(stack, "h.*"), Capture)


def test_no_memory_is_kept_alive_by_the_library_after_the_block():
    import gc
    import weakref

    model = BlockStack()
    watch = weakref.ref(model)
    with capture(model, "h.*") as acts:
        model(torch.zeros(1, 2, dtype=torch.long))
    del model
    gc.collect()
    assert watch() is None
    assert len(acts) == 4


def test_a_block_can_be_kept_open_by_an_exit_stack(stack, tokens):
    with contextlib.ExitStack() as exits:
        acts = exits.enter_context(capture(stack, "h.0"))
        stack(tokens)
    assert acts["h.0"].shape == (2, 5, 8)
    assert count_hooks(stack) == 0
