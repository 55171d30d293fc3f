"""What is recorded inside of a compiled graph: what the graph computed, as the table of "What happens when" says."""

from __future__ import annotations

import copy
import warnings
from dataclasses import dataclass
from typing import NamedTuple

import pytest
import torch
from compiling import MASK, Stack, X, assert_same, compiled, eagerly, every_backend, make, needs_taps, quiet
from torch import nn
from torch.utils.checkpoint import checkpoint

from activation_extractor import MemorySink, capture, combined, extract, inputs, instrument, outputs

pytestmark = [quiet, needs_taps]


class Pair(NamedTuple):
    left: torch.Tensor
    right: torch.Tensor


@dataclass
class Both:
    left: torch.Tensor
    right: torch.Tensor


@every_backend
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_an_output_that_nobody_uses_is_recorded_in_every_grad_mode(backend, mode):
    class Unused(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(16, 16), nn.Linear(16, 16)

        def forward(self, x):
            self.b(x)
            return self.a(x)

    model = make(kind=Unused)
    instrument(model, "*")
    run, _ = compiled(model, backend)
    with mode(), capture(model, "*") as acts:
        run(X)
    assert_same(acts, eagerly(model, "*", X))
    assert not any(value.requires_grad or value.is_inference() for value in acts.values())


@every_backend
@pytest.mark.parametrize("is_named", [True, False], ids=["keyword", "positional"])
def test_reducers_use_the_mask_of_the_call(backend, is_named):
    model = make()
    instrument(model, "h.*")
    run, _ = compiled(model, backend)
    reduce = ["mean", "first", "last", "max"]
    with torch.no_grad():
        run(X)
        with capture(model, "h.*", reduce=reduce) as acts:
            run(X, attention_mask=MASK) if is_named else run(X, MASK)
        with capture(model, "h.*", reduce=reduce) as plain:
            run(X)
    assert_same(acts, eagerly(model, "h.*", X, attention_mask=MASK, reduce=reduce))
    assert_same(plain, eagerly(model, "h.*", X, reduce=reduce))


@every_backend
def test_a_later_write_in_place_does_not_show(backend):
    model = make()  # the layer "a" is followed by a ReLU that writes to what it returned
    instrument(model, "h.*.a")
    run, _ = compiled(model, backend)
    with torch.no_grad(), capture(model, "h.*.a") as acts:
        run(X)
    assert all(bool((value < 0).any()) for value in acts.values())
    assert_same(acts, eagerly(model, "h.*.a", X))


class Structures(nn.Module):
    """Returns one structure, which is named when it is made, and takes one."""

    def __init__(self, kind="dict"):
        super().__init__()
        self.part, self.head = Part(kind), nn.Linear(16, 2)

    def forward(self, x):
        value = self.part(x, scale=2)
        left = value["left"] if isinstance(value, dict) else value[0] if isinstance(value, tuple) else value.left
        return self.head(left)


class Part(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.kind, self.linear = kind, nn.Linear(16, 16)

    def forward(self, x, *, scale=1):
        left = self.linear(x) * scale
        right = left + 1
        made = {"dict": {"left": left, "right": [right]}, "tuple": (left, (right,)), "named": Pair(left, right)}
        return made[self.kind] if self.kind in made else Both(left, right)


@every_backend
@pytest.mark.parametrize(
    ("kind", "select"),
    [("dict", "right"), ("dict", 1), ("tuple", 1), ("tuple", -1), ("named", "right"), ("dataclass", "right")],
)
def test_select_takes_a_part_of_what_a_layer_returns(backend, kind, select):
    model = Structures(kind).eval()
    torch._dynamo.reset()
    layers = {"whole": outputs("part"), "part": outputs("part", select=select), "in": inputs("part")}
    instrument(model, layers)
    run, counter = compiled(model, backend)
    with torch.no_grad(), capture(model, layers) as acts:
        run(X)
    assert_same(acts, eagerly(model, layers, X))
    assert counter.frame_count == 1


@every_backend
def test_inputs_are_found_by_position_by_name_and_by_a_callable(backend):
    torch._dynamo.reset()
    model = Structures().eval()
    layers = {
        "first": inputs("part.linear"),
        "named": inputs("part", select="x"),
        "second": inputs("head", select=0),
        "made": inputs("part", select=lambda arguments: arguments["x"] * 3),
    }
    instrument(model, layers)
    run, _ = compiled(model, backend)
    with torch.no_grad(), capture(model, layers) as acts:
        run(X)
    assert_same(acts, eagerly(model, layers, X))


@every_backend
@pytest.mark.parametrize("kind", ["dict", "tuple", "named", "dataclass"])
def test_a_callable_that_writes_to_what_it_is_given_changes_nothing_in_the_model(backend, kind):
    torch._dynamo.reset()
    model = Structures(kind).eval()

    def doubled(value):
        left = value["left"] if isinstance(value, dict) else value[0] if isinstance(value, tuple) else value.left
        return left.mul_(2)

    layers = {"twice": outputs("part", select=doubled)}
    instrument(model, layers)
    run, _ = compiled(model, backend)
    with torch.no_grad(), capture(model, layers) as acts:
        returned = run(X)
    torch.testing.assert_close(returned, model(X), rtol=1e-5, atol=1e-5)
    expected = eagerly(model, {"twice": outputs("part")}, X)
    torch.testing.assert_close(acts["twice"], expected["twice"] * 2, rtol=1e-5, atol=1e-5)


@every_backend
def test_training_is_the_same_and_values_are_detached(backend):
    model = make().train()
    twin = copy.deepcopy(model)
    instrument(model, ["h.*", "h.*.a"])
    run, counter = compiled(model, backend)
    for _ in range(2):
        with capture(model, ["h.*", "h.*.a"]) as acts:
            run(X).pow(2).mean().backward()
        with capture(twin, ["h.*", "h.*.a"]) as expected:
            twin(X).pow(2).mean().backward()
    assert_same(acts, expected)
    assert counter.frame_count == 1
    for parameter, other in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, other.grad, rtol=1e-5, atol=1e-6)


@every_backend
def test_what_a_checkpoint_computes_again_is_not_recorded_twice(backend):
    class Checkpointed(Stack):
        def forward(self, x):
            for block in self.h:
                x = checkpoint(block, x, use_reentrant=False)
            return self.head(x)

    model = make(kind=Checkpointed)
    twin = copy.deepcopy(model)
    instrument(model, ["h.*", "h.*.a"])
    run, _ = compiled(model, backend)
    with capture(model, ["h.*", "h.*.a"], calls="all") as acts:
        run(X).pow(2).mean().backward()
    twin(X).pow(2).mean().backward()
    assert_same(acts, eagerly(twin, ["h.*", "h.*.a"], X, calls="all"))
    for parameter, other in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, other.grad, rtol=1e-5, atol=1e-6)


@every_backend
def test_a_layer_that_runs_several_times_is_recorded_as_calls_says(backend):
    class Again(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(16, 16)

        def forward(self, x):
            return self.a(self.a(self.a(x)))

    model = make(kind=Again)
    instrument(model, "a")
    run, _ = compiled(model, backend)
    with torch.no_grad():
        with capture(model, "a", calls="all") as acts:
            run(X)
        with pytest.warns(UserWarning, match="several times"), capture(model, "a") as last:
            run(X)
    expected = eagerly(model, "a", X, calls="all")
    assert_same(acts, expected)
    torch.testing.assert_close(last["a"], expected["a"][-1])


@every_backend
def test_each_forward_is_a_step_of_a_sink(backend):
    model, sink, expected = make(), MemorySink(), MemorySink()
    twin = copy.deepcopy(model)
    instrument(model, "h.*")
    run, _ = compiled(model, backend)
    with torch.no_grad():
        for called, block in ((run, capture(model, "h.*", sink=sink)), (twin, capture(twin, "h.*", sink=expected))):
            with block as acts:
                called(X, MASK)
                called(X + 1, MASK)
                with acts.step(ids=["a", "b"]):
                    called(X + 2, MASK)
    assert len(sink.steps) == 3
    for step, other in zip(sink.steps, expected.steps, strict=True):
        assert step.ids == other.ids
        for key, value in other.values.items():
            torch.testing.assert_close(step.values[key].values, value.values, rtol=1e-5, atol=1e-5)
            assert torch.equal(step.values[key].lengths, value.lengths)


@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_extract_runs_a_compiled_model_in_its_graph(backend, tmp_path):
    model = make()
    twin = copy.deepcopy(model)
    instrument(model, "h.*")
    run, counter = compiled(model, backend)
    batches = [{"x": X + number, "attention_mask": MASK} for number in range(4)]
    store = extract(run, batches, "h.*", out=tmp_path / "graph", reduce="mean", progress=False)
    expected = extract(twin, batches, "h.*", out=tmp_path / "eager", reduce="mean", progress=False)
    assert counter.frame_count == 1
    for name in ("h.0", "h.1", "h.2"):
        torch.testing.assert_close(store[name].torch(), expected[name].torch(), rtol=1e-5, atol=1e-5)
    again = extract(run, batches, "h.*", out=tmp_path / "graph", reduce="mean", progress=False)
    assert len(again["h.0"]) == 8


@every_backend
def test_a_layer_may_be_recorded_under_several_names_and_as_part_of_a_combination(backend):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(16, 16)
            self.b = self.a

        def forward(self, x):
            return self.a(x)

    model = make(kind=Tied)
    instrument(model, ["a", "b"])
    layers = {"one": "a", "other": "b", "both": combined(["a", "b"], "mean")}
    run, _ = compiled(model, backend)
    with torch.no_grad(), capture(model, layers) as acts:
        run(X)
    assert_same(acts, eagerly(model, layers, X))


@every_backend
def test_blocks_inside_each_other_record_each_their_own(backend):
    model = make()
    instrument(model, "h.*")
    run, counter = compiled(model, backend)
    with torch.no_grad(), capture(model, "h.0", calls="all") as outer:
        run(X)
        with capture(model, ["h.0", "h.2"], reduce="mean") as inner:
            run(X + 1)
    assert_same(inner, eagerly(model, ["h.0", "h.2"], X + 1, reduce="mean"))
    torch.testing.assert_close(outer["h.0"][0], eagerly(model, "h.0", X)["h.0"], rtol=1e-5, atol=1e-5)
    assert len(outer["h.0"]) == 2
    assert counter.frame_count == 1


@every_backend
def test_the_model_itself_can_be_recorded(backend):
    model = make()
    instrument(model, ["", inputs("")])
    run, _ = compiled(model, backend)
    with torch.no_grad(), capture(model, ["", inputs("")]) as acts:
        returned = run(X)
    assert torch.equal(acts[""], returned)
    assert torch.equal(acts[":input"], X)


def test_a_forward_that_fails_is_no_step_and_the_next_one_is():
    class Failing(Stack):
        def forward(self, x):
            for block in self.h:
                x = block(x)
            torch._assert_async((x.abs() < 1e3).all())
            return self.head(x)

    model, sink = make(kind=Failing), MemorySink()
    instrument(model, "h.*")
    run, counter = compiled(model, "eager")
    with torch.no_grad(), capture(model, "h.*", sink=sink):
        run(X)
        with pytest.raises(RuntimeError):
            run(X * 1e6)
        run(X)
    assert len(sink.steps) == 2
    assert counter.frame_count == 1


@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_values_are_those_of_eager_code_while_another_block_holds_the_stance(backend):
    model, other = make(), Stack().eval()
    instrument(model, "h.*")
    run, _ = compiled(model, backend)
    with torch.no_grad(), warnings.catch_warnings():
        run(X)
        with capture(other, "h.0"):
            with capture(model, "h.*") as acts:
                run(X)
            other(X)
    assert_same(acts, eagerly(model, "h.*", X))


@every_backend
def test_a_decorated_function_records_in_the_graph(backend):
    model = make()
    instrument(model, "h.*")
    run, counter = compiled(model, backend)

    @capture(model, "h.*", reduce="mean")
    def embed(batch, acts):
        run(batch)
        return acts["h.1"]

    with torch.no_grad():
        for _ in range(3):
            value = embed(X)
    torch.testing.assert_close(value, eagerly(model, "h.1", X, reduce="mean")["h.1"], rtol=1e-5, atol=1e-5)
    assert counter.frame_count == 1
