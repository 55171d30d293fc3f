"""A block, or a decorated function, inside of a function that is compiled: right values, or an error; no hooks left."""

from __future__ import annotations

import pytest
import torch
from compiling import X, assert_same, eagerly, make, needs_taps, quiet
from models import count_hooks
from torch import nn

from activation_extractor import capture, inputs, instrument

pytestmark = quiet


def with_block(model, layers):
    def run(batch):
        with capture(model, layers) as acts:
            model(batch)
        return acts

    return run


def with_block_made_before(model, layers):
    block = capture(model, layers)

    def run(batch):
        with block as acts:
            model(batch)
        return acts

    return run


def decorated(model, layers):
    @capture(model, layers)
    def run(batch, acts):
        model(batch)
        return acts

    return run


class Outer(nn.Module):
    def __init__(self, model, layers):
        super().__init__()
        self.model, self.layers = model, layers

    def forward(self, batch):
        with capture(self.model, self.layers) as acts:
            self.model(batch)
        return acts


@pytest.mark.filterwarnings("ignore:.* is compiled, and runs eagerly")
@pytest.mark.parametrize("backend", ["eager"])
@pytest.mark.parametrize(
    "is_instrumented", [pytest.param(True, marks=needs_taps, id="taps"), pytest.param(False, id="hooks")]
)
@pytest.mark.parametrize("fullgraph", [True, False], ids=["whole graph", "with breaks"])
@pytest.mark.parametrize("make_run", [with_block, with_block_made_before, decorated, Outer])
def test_a_block_in_a_compiled_function_is_right_or_refused_and_leaves_nothing(
    make_run, fullgraph, is_instrumented, backend
):
    model = make()
    layers = ["h.*", inputs("h.1")]
    hooks = 0
    if is_instrumented:
        instrument(model, layers)
        hooks = count_hooks(model)
    run = torch.compile(make_run(model, layers), backend=backend, fullgraph=fullgraph)
    with torch.no_grad():
        for number in range(2):
            try:
                acts = run(X + number)
            except torch._dynamo.exc.Unsupported:
                assert fullgraph
            else:
                assert_same(acts, eagerly(model, layers, X + number))
            assert count_hooks(model) == hooks
            assert torch._dynamo.eval_frame._stance.stance == "default"
        with capture(model, layers) as acts:
            model(X)
        assert_same(acts, eagerly(model, layers, X))
