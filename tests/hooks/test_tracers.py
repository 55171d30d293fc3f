"""Models that are traced inside a block: an error that says so, or right values; never a placeholder."""

from __future__ import annotations

import warnings

import pytest
import torch
from models import BlockStack, count_hooks
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from activation_extractor import MemorySink, capture, gradients, inputs, preview
from activation_extractor._private_torch import active_tracer
from activation_extractor.errors import TransformedCallError

MODES = "torch.export, make_fx or a FakeTensorMode"


def under_fake_tensors(model, x):
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        return model(mode.from_tensor(x))


def with_fake_arguments(model, x):
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = mode.from_tensor(x)
    return model(fake)


TRACERS = {
    "export": (lambda model, x: torch.export.export(model, (x,), strict=False), MODES),
    "trace": (torch.jit.trace, "torch.jit.trace"),
    "make_fx": (lambda model, x: make_fx(model)(x), MODES),
    "make_fx fake": (lambda model, x: make_fx(model, tracing_mode="fake", _allow_non_fake_inputs=True)(x), MODES),
    "make_fx symbolic": (lambda m, x: make_fx(m, tracing_mode="symbolic", _allow_non_fake_inputs=True)(x), MODES),
    "fake mode": (under_fake_tensors, MODES),
}


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(2, 5, 8)


@pytest.fixture
def blocks() -> nn.Module:
    return nn.Sequential(*BlockStack().h).eval()


@pytest.mark.parametrize("options", [{}, {"copy": False}, {"reduce": "mean"}, {"calls": "all"}, {"sink": MemorySink()}])
@pytest.mark.parametrize("tracer", TRACERS)
def test_a_traced_model_is_an_error_that_names_the_tracer_and_keeps_what_was_recorded(blocks, x, tracer, options):
    trace, name = TRACERS[tracer]
    with capture(blocks, ["0", inputs("1")], **options) as acts:
        blocks(x)
        before = [torch.stack(it) if isinstance(it, list) else it.clone() for it in acts.values()]
        with pytest.raises(TransformedCallError) as caught, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trace(blocks, x)
    text = f"The model ran inside {name}, which traces it and has no values to record. Trace it outside of the block."
    assert str(caught.value) == text
    after = [torch.stack(it) if isinstance(it, list) else it for it in acts.values()]
    assert all(torch.equal(value, other) for value, other in zip(before, after, strict=True))
    assert count_hooks(blocks) == 0
    assert active_tracer() is None


@pytest.mark.parametrize("options", [{}, {"copy": False}, {"reduce": "mean"}, {"calls": "all"}])
@pytest.mark.parametrize("tracer", TRACERS)
def test_a_layer_that_is_traced_by_itself_is_an_error_too(blocks, x, tracer, options):
    trace, name = TRACERS[tracer]
    with pytest.raises(TransformedCallError, match=name), warnings.catch_warnings(), capture(blocks, "0", **options):
        warnings.simplefilter("ignore")
        trace(blocks[0], x)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # which torch reads of its fake tensors
@pytest.mark.parametrize("selection", ["1", inputs("1"), gradients("1")])
@pytest.mark.parametrize("options", [{}, {"copy": False}, {"reduce": "mean"}, {"calls": "all"}])
def test_a_fake_tensor_is_never_recorded(blocks, x, selection, options):
    with pytest.raises(TransformedCallError, match="Layer '1' ran inside a FakeTensorMode"):
        with capture(blocks, selection, **options):
            with_fake_arguments(blocks, x)


def test_a_block_of_ones_own_layer_that_fx_traces_is_an_error(blocks, x):
    class Wrapper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = blocks

        def forward(self, x):
            return self.inner(x) + 1

    for model, layer in ((blocks, "0"), (Wrapper(), "inner.0")):
        with pytest.raises(TransformedCallError, match=r"torch.fx.symbolic_trace"), capture(model, layer):
            torch.fx.symbolic_trace(Wrapper())(x)


def test_what_was_recorded_before_fx_traced_the_leaves_of_a_model_is_right(x):
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU()).eval()
    with capture(model, "*") as acts:
        model(x)
        traced = torch.fx.symbolic_trace(model)
    assert torch.equal(acts["1"], model(x))
    assert torch.equal(traced(x), model(x))


def test_a_strict_export_says_that_a_block_is_open(blocks, x):
    with (
        pytest.raises(Exception, match="a block of activation_extractor is open|record_copy|Unexpectedly found"),
        capture(blocks, "0"),
    ):
        torch.export.export(blocks, (x,), strict=True)


def test_preview_of_placeholders_is_an_error(blocks, x):
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, pytest.raises(TransformedCallError):
        preview(blocks, "0", mode.from_tensor(x))


def test_outside_of_blocks_models_are_traced_as_ever(blocks, x):
    with capture(blocks, "*") as acts:
        blocks(x)
    exported = torch.export.export(blocks, (x,), strict=False)
    assert torch.equal(exported.module()(x), acts["3"])


def test_modes_that_run_operators_on_values_are_no_tracers(blocks, x):
    from torch.utils._python_dispatch import TorchDispatchMode

    class Counting(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.count += 1
            return function(*args, **(kwargs or {}))

    with Counting() as mode, capture(blocks, "3") as acts:
        blocks(x)
    assert mode.count
    assert torch.equal(acts["3"], blocks(x))
