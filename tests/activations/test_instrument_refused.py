"""What an instrumented model refuses, what its copies carry, and what is left when the taps are off."""

from __future__ import annotations

import copy
import io
import pickle
import re

import pytest
import torch
from compiling import Stack, X, assert_same, compiled, eagerly, make, needs_taps, quiet

from activation_extractor import MemorySink, _private_compiler, capture, gradients, inputs, instrument, outputs
from activation_extractor.errors import (
    ArgumentError,
    LayerNotRunError,
    StepError,
    TransformedCallError,
    UnsupportedTorchError,
    UntappedLayerError,
)

pytestmark = [quiet, needs_taps]


def traces(model):
    """What is left of taps on a model: members of modules, hooks, and marks on dictionaries of hooks."""
    for module in model.modules():
        members = [
            name for name in vars(module) if "activation_extractor" in name or name in ("forward", "__reduce_ex__")
        ]
        yield from members
        for name in ("_forward_hooks", "_forward_pre_hooks", "_forward_pre_hooks_with_kwargs"):
            yield from getattr(module, name)
            yield from vars(getattr(module, name))


@pytest.mark.parametrize("option", [{"copy": False}, {"stop_early": True}, {"detach": False}])
def test_options_that_graphs_cannot_keep_are_refused(option):
    model = make()
    instrument(model, "h.*")
    name = next(iter(option))
    with (
        pytest.raises(ArgumentError, match=f"{name} must stay .* for an instrumented model"),
        capture(model, "h.*", **option),
    ):
        pass


def test_gradients_are_refused():
    with pytest.raises(ArgumentError, match="layers must be outputs or inputs, got 'h.0:gradient'"):
        instrument(make(), ["h.1", gradients("h.0")])


@pytest.mark.parametrize(
    "compile_it",
    [
        lambda model: torch.compile(model, backend="eager"),
        lambda model: torch.compile(lambda batch: model(batch), backend="eager"),
        lambda model: model.compile(backend="eager") or model,
    ],
    ids=["wrapped", "called by a compiled function", "in place"],
)
def test_a_layer_of_a_compiled_model_without_a_tap_is_named(compile_it):
    model = make()
    instrument(model, "h.*")
    run = compile_it(model)
    for layers in (["h.0", "head"], ["h.0", inputs("h.0")], outputs("h.0", select=0), gradients("h.0")):
        with (
            torch.no_grad(),
            pytest.raises(UntappedLayerError, match="instrumented, but not for '(head|h.0)"),
            capture(model, layers),
        ):
            run(X)
    with torch.no_grad(), capture(model, "h.0") as acts:
        run(X)
    assert_same(acts, eagerly(model, "h.0", X))


def test_layers_of_parts_that_are_not_compiled_go_by_hooks_in_the_same_block():
    model = make()
    instrument(model, "h.0.*")
    expected = eagerly(model, ["h.0.a", "h.1", "head"], X)
    model.h[0].compile(backend="eager", fullgraph=True)
    with torch.no_grad():
        for _ in range(3):
            with capture(model, ["h.0.a", "h.1", "head"]) as acts:
                model(X)
    assert_same(acts, expected)
    with (
        torch.no_grad(),
        pytest.raises(UntappedLayerError, match="'h.0.relu:input'"),
        capture(model, ["h.0.a", inputs("h.0.relu")]),
    ):
        model(X)


def test_an_instrumented_model_that_is_not_compiled_is_recorded_as_any_other():
    model = make()
    with instrument(model, ["h.*", inputs("h.1")]) as handle, torch.no_grad():
        assert "4 layers" in repr(handle)
        with capture(model, ["h.*", inputs("h.1"), "head"], reduce=["full", "mean"]) as acts:
            model(X)
    assert_same(acts, eagerly(model, ["h.*", inputs("h.1"), "head"], X, reduce=["full", "mean"]))
    assert "removed" in repr(handle)


def test_copies_and_pickles_carry_no_taps_and_compute_with_their_own_weights():
    model = make()
    handle = instrument(model, ["h.*", inputs("h.0")])
    run, _ = compiled(model, "eager")
    run(X)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    replica = model._replicate_for_data_parallel()
    assert "forward" not in vars(replica)
    loaded = torch.load(file, weights_only=False)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), loaded):
        assert not list(traces(twin))
        twin.head.weight.data.zero_()
        twin.head.bias.data.zero_()
        assert bool((twin(X) == 0).all())
        with capture(twin, "h.*") as acts:
            twin(X)
        assert len(acts) == 3
    assert torch.equal(copy.copy(model)(X), model(X))
    handle.remove()
    handle.remove()
    assert not list(traces(model))
    torch.testing.assert_close(run(X), model(X))


def test_taps_that_two_handles_have_put_on_stay_until_both_are_removed():
    model = make()
    first, second = instrument(model, ["h.0", "h.1"]), instrument(model, ["h.0", "head"])
    run, _ = compiled(model, "eager")
    first.remove()
    with torch.no_grad():
        with capture(model, ["h.0", "head"]) as acts:
            run(X)
        with pytest.raises(UntappedLayerError, match="'h.1'"), capture(model, ["h.0", "h.1"]):
            run(X)
    assert_same(acts, eagerly(model, ["h.0", "head"], X))
    second.remove()
    assert not list(traces(model))


def test_a_forward_of_the_instances_own_is_kept():
    model = make()

    def halved(batch):
        return type(model.h[0]).forward(model.h[0], batch) / 2

    model.h[0].forward = halved
    handle = instrument(model, "h.*")
    run, _ = compiled(model, "eager")
    with torch.no_grad(), capture(model, "h.*") as acts:
        run(X)
    torch.testing.assert_close(acts["h.0"], halved(X))
    handle.remove()
    assert vars(model.h[0])["forward"] is halved


def test_a_hook_behind_a_tap_that_may_replace_a_value_is_refused_and_one_that_may_not_is_not():
    model = make()
    handle = instrument(model, "h.*")
    model.h[1].register_forward_hook(lambda *_: None)
    run, _ = compiled(model, "eager")
    with torch.no_grad(), capture(model, "h.*"):
        run(X)
    model.h[0].register_forward_hook(lambda module, args, output: output * 2)
    with pytest.raises(StepError, match="a hook on 'h.0' that was registered behind instrument"), capture(model, "h.*"):
        pass
    handle.remove()
    instrument(model, "h.*")
    run, _ = compiled(model, "eager")
    with torch.no_grad(), capture(model, "h.*") as acts:
        run(X)
    assert_same(acts, eagerly(model, "h.*", X))


def test_export_tracing_and_vmap_work_outside_of_blocks_and_say_what_is_wrong_inside():
    model = make()
    instrument(model, ["h.*", inputs("h.1")])
    for strict in (False, True):
        program = torch.export.export(model, (X,), strict=strict)
        program.run_decompositions()
        assert "activation_extractor" not in str(program.graph)
        torch.testing.assert_close(program.module()(X), model(X))
    torch.testing.assert_close(torch.jit.trace(model, (X,))(X), model(X))
    torch.fx.symbolic_trace(model)
    mapped, _ = compiled(lambda batch: torch.func.vmap(lambda row: model(row))(batch), "eager")
    with torch.no_grad():
        torch.testing.assert_close(mapped(X), model(X))
        with pytest.raises(LayerNotRunError, match="'h.0'"), capture(model, "h.*"):
            mapped(X)
        for traced in (
            lambda: torch.func.vmap(lambda row: model(row))(X),
            lambda: torch.export.export(model, (X,)),
            lambda: torch.jit.trace(model, (X,)),
        ):
            with pytest.raises(TransformedCallError), capture(model, "h.*"):
                traced()


def test_a_model_that_calls_itself_is_refused():
    class Recursive(Stack):
        def forward(self, x, depth=1):
            x = self.h[0](x)
            return self(x, depth - 1) if depth else self.h[1](x)

    model = make(kind=Recursive)
    instrument(model, "h.*")
    with (
        torch.no_grad(),
        pytest.raises(StepError, match="a model that calls itself"),
        capture(model, ["h.0", "h.1"], sink=MemorySink(), missing="skip"),
    ):
        model(X)


def test_nothing_is_left_when_a_block_fails_on_entering():
    model = make()
    instrument(model, "h.*")
    with pytest.raises(ArgumentError), capture(model, "h.*", copy=False):
        pass
    run, counter = compiled(model, "eager")
    with torch.no_grad(), capture(model, "h.*") as acts:
        run(X)
    assert len(acts) == 3
    assert counter.frame_count == 1


def test_a_release_of_torch_that_lacks_what_taps_need_is_named(monkeypatch):
    monkeypatch.setattr(_private_compiler, "HAS_TAPS", False)
    with pytest.raises(UnsupportedTorchError, match=f"^torch {re.escape(torch.__version__)} lacks 'torch.Tag.cuda"):
        instrument(make(), "h.*")
