"""Steps of a block: how they begin and end, and what must have come by then."""

from __future__ import annotations

import pytest
import torch
from models import BlockStack, Repeating, count_hooks
from torch import nn

from activation_extractor import MemorySink, capture
from activation_extractor.errors import LayerNotRunError, StepError


class Branching(nn.Module):
    """Runs one of two layers, and one of them through its forward alone."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.direct = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor, side: str = "left") -> torch.Tensor:
        x = self.left(x) if side == "left" else self.right(x)
        return self.direct.forward(x)


@pytest.mark.parametrize("layers", ["right", "direct", ["left", "right"]])
def test_a_layer_that_did_not_run_is_an_error_that_names_it_and_the_likely_reasons(layers):
    model = Branching()
    with pytest.raises(LayerNotRunError) as caught, capture(model, layers):
        model(torch.randn(2, 4))
    assert caught.value.layers == (("direct",) if layers == "direct" else ("right",))
    assert str(caught.value) == (
        f"Requested layers did not run in the step: {caught.value.layers[0]!r} (a branch that was not taken, "
        "`.forward()` called directly, another thread, an error that the model caught, or a fused path such as "
        "MultiheadAttention's). Leave out what does not run, or pass missing='skip'."
    )
    assert count_hooks(model) == 0


def test_its_advice_is_right():
    model = Branching()
    with capture(model, ["left", "right"], missing="skip") as acts:
        model(torch.randn(2, 4))
    assert list(acts) == ["left"]


def test_many_layers_that_did_not_run_are_three_names_and_a_count(stack):
    with pytest.raises(LayerNotRunError, match="did not run in the step: 'embed', 'h.0', 'h.0.norm' and 10 more"):
        with capture(stack, "**"):
            pass


def test_a_layer_that_did_not_run_never_hides_an_exception_of_the_body(stack):
    with pytest.raises(ZeroDivisionError), capture(stack, "h.*"):
        raise ZeroDivisionError


def test_a_part_of_multihead_attention_that_is_fused_away_is_an_error():
    attention = nn.Sequential(nn.MultiheadAttention(8, 2, batch_first=True))
    x = torch.randn(1, 3, 8)
    with pytest.raises(LayerNotRunError, match="0.out_proj"), capture(attention, "0.out_proj"):
        attention[0](x, x, x)


def test_the_whole_block_is_one_step_without_a_sink():
    model = Branching()
    with capture(model, ["left", "right"], calls="all") as acts:
        model(torch.randn(2, 4), "left")
        model(torch.randn(3, 4), "right")
    assert [[len(call) for call in acts[name]] for name in ("left", "right")] == [[2], [3]]


def test_each_forward_is_a_step_with_a_sink():
    model, sink = Branching(), MemorySink()
    with pytest.raises(LayerNotRunError, match="'left'"), capture(model, "left", sink=sink):
        model(torch.randn(2, 4), "left")
        model(torch.randn(3, 4), "right")
    assert [(step.index, step.rows) for step in sink.steps] == [(0, 2)]


def test_a_step_block_groups_forwards(stack, tokens):
    sink = MemorySink()
    with capture(stack, "h.0", calls="join", sink=sink) as acts:
        with acts.step(ids=["a", "b"], keep={"label": [7, 8]}):
            stack(tokens)
            stack(tokens)
        stack(tokens[:1])
    assert [step.ids for step in sink.steps] == [["a", "b"], None]
    assert [len(row) for row in sink["h.0", "full"]] == [10, 10, 5]
    assert sink.steps[0].keep["label"].tolist() == [7, 8]


def test_with_a_sink_the_activations_are_those_of_the_latest_step(stack, tokens):
    sink = MemorySink()
    with capture(stack, "h.0", sink=sink) as acts:
        stack(tokens)
        assert acts["h.0"].shape == (2, 5, 8)
        stack(tokens[:1])
    assert acts["h.0"].shape == (1, 5, 8)
    acts["h.0"].zero_()
    assert sink["h.0", "full"][-1].abs().sum() > 0  # the sink owns what it was given


def test_a_step_block_without_a_sink_is_an_error(stack):
    with pytest.raises(StepError) as caught, capture(stack, "h.0", missing="skip") as acts, acts.step():
        pass
    assert str(caught.value) == (
        "A step must have a sink to go to, got none. Without a sink the whole block is one step."
    )


def test_a_step_block_inside_another_or_after_the_block_is_an_error(stack, tokens):
    with capture(stack, "h.0", sink=MemorySink()) as acts:
        with pytest.raises(StepError, match="got one inside another step"), acts.step():
            stack(tokens)
            with acts.step():
                pass
    with pytest.raises(StepError, match="got one after the block was left"), acts.step():
        pass


def test_a_call_that_belongs_to_no_step_is_an_error_that_says_what_to_do(stack, tokens):
    x = stack.embed(tokens).detach()
    with pytest.raises(StepError) as caught, capture(stack, "h.0", sink=MemorySink()):
        stack.h[0](x)
    assert str(caught.value) == (
        "A step must hold every recorded call when there is a sink, got a call of 'h.0' outside the model's own call. "
        "Wrap what belongs together in `with acts.step(): ...`, or capture the module that is called."
    )
    sink = MemorySink()
    with capture(stack, "h.0", sink=sink, mask=None) as acts, acts.step():
        stack.h[0](x)
    with capture(stack.h[0], "", sink=sink):
        stack.h[0](x)
    assert len(sink.steps) == 2


def test_an_unfinished_step_does_not_reach_the_sink_and_finished_ones_do(stack, tokens):
    sink = MemorySink()
    with pytest.raises(IndexError), capture(stack, "h.0", sink=sink):
        stack(tokens)
        stack(torch.tensor([[99]]))
    assert len(sink.steps) == 1
    with pytest.raises(ZeroDivisionError), capture(stack, "h.0", sink=sink) as acts, acts.step():
        stack(tokens)
        raise ZeroDivisionError
    assert len(sink.steps) == 1


def test_a_failed_forward_that_is_caught_inside_the_block_is_no_step(stack, tokens):
    sink = MemorySink()
    with capture(stack, "h.0", sink=sink):
        with pytest.raises(IndexError):
            stack(torch.tensor([[99]]))
        stack(tokens)
    assert [step.rows for step in sink.steps] == [2]


def test_columns_of_a_step_must_have_the_same_rows(stack, tokens):
    with capture(stack, "h.0", sink=MemorySink()) as acts:
        with pytest.raises(StepError, match=r"have the same rows in every column, got 2 in \('h.0', 'full'\) beside 3"):
            with acts.step(ids=[1, 2, 3]):
                stack(tokens)


def test_the_last_call_of_several_is_kept_with_one_warning():
    model = Repeating()
    x = torch.randn(2, 4)
    with pytest.warns(UserWarning, match="'layer' ran several times in one forward") as caught:
        with capture(model, "layer") as acts:
            assert torch.equal(model(x), acts["layer"])
            model(x)
    assert len(caught) == 1


def test_calls_of_several_forwards_that_are_read_do_not_warn(stack, tokens):
    with capture(stack, "h.0") as acts:
        stack(tokens)
        assert len(acts["h.0"]) == len(tokens)
        stack(tokens[:1])
    assert len(acts["h.0"]) == 1


def test_all_calls_are_a_list_in_order():
    model = Repeating()
    x = torch.randn(2, 4)
    with capture(model, "layer", calls="all") as acts:
        last = model(x)
    expected = [model.layer(x), model.layer(model.layer(x)), last]
    assert all(map(torch.equal, acts["layer"], expected))
    assert len(acts["layer"]) == 3


def test_all_calls_become_numbered_columns_in_a_sink():
    model, sink = Repeating(), MemorySink()
    with capture(model, "layer", calls="all", sink=sink):
        model(torch.randn(2, 4))
    assert list(sink.steps[0].values) == [("layer#0", "full"), ("layer#1", "full"), ("layer#2", "full")]


def test_joined_calls_are_one_sequence_and_are_reduced_as_one(stack, tokens):
    with capture(stack, "h.1", calls="join", reduce=["full", "mean", "last"]) as acts:
        stack(tokens[:, :3], attention_mask=torch.tensor([[1, 1, 1], [0, 1, 1]]))
        stack(tokens[:, 3:])
    with capture(stack, "h.1") as whole:
        stack(tokens)
    torch.testing.assert_close(acts["h.1", "full"], whole["h.1"])
    torch.testing.assert_close(acts["h.1", "last"], whole["h.1"][:, -1])
    torch.testing.assert_close(acts["h.1", "mean"][1], whole["h.1"][1, 1:].mean(0))


def test_joined_values_grow_while_the_block_is_open(stack, tokens):
    with capture(stack, "h.1", calls="join") as acts:
        stack(tokens)
        assert acts["h.1"].shape == (2, 5, 8)
        stack(tokens)
        assert acts["h.1"].shape == (2, 10, 8)


def test_a_sink_that_cannot_be_closed_does_not_hide_the_error_of_the_body(stack):
    class Stuck(MemorySink):
        def close(self):
            raise OSError("disk full")

    with pytest.raises(ZeroDivisionError) as caught, capture(stack, "h.0", sink=Stuck()):
        raise ZeroDivisionError
    assert caught.value.__notes__ == ["The sink could not be closed either: disk full"]
    with pytest.raises(OSError, match="disk full"), capture(stack, "h.0", sink=Stuck()):
        pass


def test_a_model_that_calls_itself_is_one_forward():
    class Recursive(BlockStack):
        def forward(self, input_ids, attention_mask=None, again=True):
            if again:
                self(input_ids, again=False)
            return super().forward(input_ids)

    model, sink = Recursive(), MemorySink()
    with pytest.warns(UserWarning, match="several times in one forward"), capture(model, "h.0", sink=sink):
        model(torch.zeros(2, 3, dtype=torch.long))
    assert len(sink.steps) == 1
