"""Values that were let go with `acts.clear()`: their layers have run nevertheless."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from activation_extractor import MemorySink, capture, gradients, inputs
from activation_extractor.errors import ActivationNotFoundError, GradientNotFoundError, LayerNotRunError

X = torch.randn(5, 4)
EACH_KIND = pytest.mark.parametrize(
    "options",
    [
        {},
        {"copy": False},
        {"reduce": "max", "sequence_axis": 1, "mask": None},
        {"reduce": ["max", lambda activation, mask: activation.sum(1)], "sequence_axis": 1, "mask": None},
        {"to": "cpu"},
        {"max_bytes": 2**20},
        {"calls": "all"},
        {"calls": "join", "sequence_axis": 0},
    ],
    ids=["copy", "reference", "ours", "users", "to", "max_bytes", "all", "join"],
)


class Net(nn.Module):
    """Two layers and a head, which a forward may skip."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x, skip=False):
        hidden = self.body(x)
        return hidden if skip else self.head(hidden)


@EACH_KIND
@pytest.mark.parametrize("side", [lambda layer: layer, inputs])
def test_a_block_may_end_with_its_results_cleared(options, side):
    model = Net()
    with capture(model, side(["body", "head"]), **options) as acts:
        for _ in range(2):
            model(X)
            assert len(acts.names) == 2
            acts.clear()
        acts.clear()
    assert (len(acts), acts.nbytes, acts.names) == (0, 0, [])
    with pytest.raises(ActivationNotFoundError):
        acts["head"]


def test_gradients_may_be_cleared_and_have_to_come_nevertheless():
    model = Net()
    with capture(model, ["head", gradients("head")]) as acts:
        model(X).sum().backward()
        acts.clear()
    with pytest.raises(GradientNotFoundError), capture(model, gradients("head")) as acts:
        model(X)
        acts.clear()


@EACH_KIND
def test_a_layer_that_has_not_run_before_or_since_is_still_an_error(options):
    model = Net()
    with pytest.raises(LayerNotRunError, match="'head'"), capture(model, ["body", "head"], **options) as acts:
        model(X, skip=True)
        acts.clear()
    with pytest.raises(LayerNotRunError, match="'head'"), capture(model, ["body", "head"], **options) as acts:
        acts.clear()
        model(X, skip=True)


def test_a_later_forward_that_skips_the_layer_counts_and_not_what_was_cleared():
    model = Net()
    text = "'head' .run in an earlier forward of the block, not in the last"
    with pytest.raises(LayerNotRunError, match=text), capture(model, ["body", "head"]) as acts:
        model(X)
        acts.clear()
        model(X, skip=True)
    with capture(model, ["body", "head"], calls="all") as acts:
        model(X)
        acts.clear()
        model(X, skip=True)
    assert acts.names == ["body"]


def test_parts_that_are_called_alone_may_be_cleared():
    model = Net()
    with capture(model, "head") as acts:
        model.head(X)
        acts.clear()


def test_a_step_whose_values_were_cleared_has_nothing_to_store_and_says_so():
    model, sink = Net(), MemorySink()
    with capture(model, "head", sink=sink) as acts:
        text = "'head' .its value was let go with acts.clear.. before the step ended"
        with pytest.raises(LayerNotRunError, match=text), acts.step():
            model(X)
            acts.clear()
        with acts.step():
            expected = model(X)
        acts.clear()
        model(X)
        with pytest.raises(LayerNotRunError) as caught, acts.step():
            model.body(X)
        assert "clear" not in str(caught.value)
    assert torch.equal(sink.steps[0].values["head", "full"], expected)
    assert len(sink.steps) == 2
