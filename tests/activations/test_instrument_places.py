"""Layers that are replaced, in blocks of an instrumented model, and models whose forward registers modules."""

from __future__ import annotations

import pytest
import torch
from compiling import Block, Stack, X, assert_same, both_backends, compiled, eagerly, make, quiet
from torch import nn

from activation_extractor import capture, instrument
from activation_extractor.errors import LayerNotRunError

pytestmark = quiet


class Slicing(Stack):
    """Goes over a slice of its blocks, which is a new list: making it registers each of them, also when traced."""

    def forward(self, x):
        for block in self.h[: len(self.h)]:
            x = block(x)
        return self.head(x)


@both_backends
def test_a_model_that_slices_its_blocks_is_one_graph_whoever_captures(backend):
    model = make(kind=Slicing)
    instrument(model, ["h.*", "h.*.a"])
    run, counter = compiled(model, backend)
    torch._dynamo.utils.counters.clear()
    with torch.no_grad():
        run(X)
        for _ in range(20):
            with capture(model, ["h.*", "h.*.a"]) as acts:
                run(X)
            run(X)
    assert_same(acts, eagerly(model, ["h.*", "h.*.a"], X))
    assert counter.frame_count == 1
    assert not torch._dynamo.utils.counters["graph_break"]


@pytest.mark.parametrize("when", ["before the block", "before the first forward", "between two forwards"])
@pytest.mark.parametrize("place", ["h.1", "h"])
def test_a_layer_that_was_replaced_is_not_recorded(when, place):
    model = make()
    instrument(model, "h.*")
    run, _ = compiled(model, "eager")

    def replace():
        if place == "h":
            model.h = nn.ModuleList([model.h[0], Block(), model.h[2]])
        else:
            model.h[1] = Block()

    block = capture(model, ["h.0", "h.1"], calls="all")
    if when == "before the block":
        replace()
    with torch.no_grad():
        run(X)
        acts = block.__enter__()
        if when == "before the first forward":
            replace()
        run(X)
        if when == "between two forwards":
            replace()
            run(X)
        with pytest.raises(LayerNotRunError, match=r"'h\.1'"):
            block.__exit__(None, None, None)
    if when == "between two forwards":
        return
    assert "h.1" not in acts


def test_a_layer_that_gets_its_place_back_is_recorded_again():
    model = make()
    instrument(model, "h.*")
    run, _ = compiled(model, "eager")
    own, other = model.h[1], Block()
    with torch.no_grad(), capture(model, ["h.0", "h.1"]) as acts:
        model.h[1] = other
        run(X)
        assert list(acts) == ["h.0"]
        assert acts["h.0"] is not None
        model.h[1] = own
        run(X)
    assert_same(acts, eagerly(model, ["h.0", "h.1"], X))


def test_a_layer_that_is_wrapped_where_it_stands_is_recorded():
    model = make()
    model.head = torch.compile(model.head, backend="eager")
    instrument(model, ["h.*", "head"])
    with torch.no_grad():
        for _ in range(2):
            with capture(model, ["h.*", "head"]) as acts:
                model(X)
    expected = make()
    assert_same(acts, eagerly(expected, ["h.*", "head"], X))
