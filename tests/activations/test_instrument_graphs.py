"""Taps and graphs: one graph, whole, whoever captures; a twin that was compiled before; a cache on disk; threads."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest
import torch
from compiling import MASK, Stack, X, assert_same, compiled, eagerly, every_backend, make, needs_taps, quiet
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from activation_extractor import capture, inputs, instrument

pytestmark = [quiet, needs_taps]
TESTS = str(Path(__file__).parents[1])


@pytest.mark.parametrize("blocks", [1, 12, 100])
@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_blocks_that_come_and_go_neither_break_nor_recompile_the_graph(blocks, backend):
    if (blocks, backend) == (100, "inductor"):
        pytest.skip("compiling takes half a minute; benchmarks do it")
    model = make(blocks)
    instrument(model, "h.*")
    run, counter = compiled(model, backend)
    torch._dynamo.utils.counters.clear()
    with torch.no_grad():
        run(X)
        for number in range(50):
            batch = X + number
            with capture(model, "h.*") as acts:
                run(batch)
            run(batch)
            if number % 25 == 0:
                assert_same(acts, eagerly(model, "h.*", batch))
    assert counter.frame_count == 1
    assert not torch._dynamo.utils.counters["graph_break"]


@every_backend
@pytest.mark.parametrize("layers", ["h.*", "h.*.a"])
def test_a_twin_that_was_compiled_before_does_not_lend_its_graph(backend, layers):
    first = make()
    run = torch.compile(first, backend=backend, fullgraph=True)  # a counter of its own would make it another backend
    twin = Stack().eval()
    twin.load_state_dict(first.state_dict())
    with torch.no_grad():
        run(X)
        instrument(twin, layers)
        run = torch.compile(twin, backend=backend, fullgraph=True)
        with capture(twin, layers) as acts:
            run(X)
    assert_same(acts, eagerly(first, layers, X))


@every_backend
def test_a_model_that_has_run_compiled_is_compiled_once_more(backend):
    model = make()
    run, counter = compiled(model, backend)
    with torch.no_grad():
        run(X)
        handle = instrument(model, "h.*")
        for _ in range(2):
            with capture(model, "h.*") as acts:
                run(X)
        assert_same(acts, eagerly(model, "h.*", X))
        assert counter.frame_count == 2
        handle.remove()
        torch.testing.assert_close(run(X), model(X))


@every_backend
@pytest.mark.parametrize("is_wrapped", [True, False], ids=["wrapped", "in place"])
def test_blocks_compiled_one_by_one_share_one_graph(backend, is_wrapped):
    model = make(12)  # more than the compiler's limit of variants
    layers = ["h.*", "h.*.a", inputs("h.*.b")]
    expected = eagerly(model, layers, X)
    counter = CompileCounterWithBackend(backend)
    for number, block in enumerate(model.h):
        if is_wrapped:
            model.h[number] = torch.compile(block, backend=counter, fullgraph=True)
        else:
            block.compile(backend=counter, fullgraph=True)
    instrument(model, layers)
    with torch.no_grad():
        for _ in range(3):
            with capture(model, layers) as acts:
                model(X)
    assert_same(acts, expected)
    assert counter.frame_count == 1


@every_backend
@pytest.mark.parametrize("is_first", [True, False], ids=["instrumented first", "compiled first"])
def test_a_model_compiled_in_place_is_recorded(backend, is_first):
    model, counter = make(), CompileCounterWithBackend(backend)
    if is_first:
        instrument(model, "h.*")
    model.compile(backend=counter, fullgraph=True)
    if not is_first:
        instrument(model, "h.*")
    with torch.no_grad():
        for _ in range(3):
            with capture(model, "h.*", reduce="mean") as acts:
                model(X, attention_mask=MASK)
    assert counter.frame_count == 1
    assert_same(acts, eagerly(model, "h.*", X, attention_mask=MASK, reduce="mean"))


@every_backend
def test_the_model_may_be_called_by_a_compiled_function_that_makes_its_mask(backend):
    model, counter = make(), CompileCounterWithBackend(backend)
    instrument(model, "h.*")

    def call(batch):
        mask = (batch[..., 0] > 0).long() | torch.tensor([1, 0, 0, 0, 0])
        return model(batch, mask) + 1

    run = torch.compile(call, backend=counter, fullgraph=True)
    with torch.no_grad():
        for _ in range(3):
            with capture(model, "h.*", reduce=["mean", "last"]) as acts:
                run(X)
    mask = (X[..., 0] > 0).long() | torch.tensor([1, 0, 0, 0, 0])
    assert_same(acts, eagerly(model, "h.*", X, mask, reduce=["mean", "last"]))
    assert counter.frame_count == 1


@every_backend
def test_a_model_of_torchs_own_class_is_one_graph_with_its_call(backend):
    torch._dynamo.reset()
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(inplace=True), nn.Linear(16, 2)).eval()
    instrument(model, ["0", "1", "2"])
    run, counter = compiled(model, backend)
    with torch.no_grad():
        for _ in range(3):
            with capture(model, ["0", "1", "2"]) as acts:
                run(X)
    assert_same(acts, eagerly(model, ["0", "1", "2"], X))
    assert counter.frame_count == 1


@every_backend
def test_batches_of_other_sizes_come_and_go(backend):
    model = make()
    instrument(model, "h.*")
    run, _ = compiled(model, backend)
    with torch.no_grad():
        for rows, positions in [(2, 5), (3, 7), (2, 5), (8, 9), (1, 4)]:
            batch = torch.randn(rows, positions, 16)
            with capture(model, "h.*") as acts:
                run(batch)
            assert_same(acts, eagerly(model, "h.*", batch))


@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_threads_record_their_own_calls_while_others_go_on_in_the_same_graph(backend):
    model = make()
    instrument(model, "h.*")
    run, counter = compiled(model, backend)
    expected = [eagerly(model, "h.*", X + number) for number in range(6)]
    failures = []

    def serve(number):
        try:
            with torch.no_grad():
                for _ in range(10):
                    with capture(model, "h.*") as acts:
                        run(X + number)
                    assert_same(acts, expected[number])
                    run(X)
        except BaseException as error:
            failures.append(error)

    with torch.no_grad():
        run(X)
    threads = [threading.Thread(target=serve, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert counter.frame_count == 1


def test_a_block_leaves_other_compiled_models_compiled():
    model, other = make(), Stack().eval()
    instrument(model, "h.*")
    run, _ = compiled(model, "eager")
    run_other, counter = compiled(other, "eager")
    with torch.no_grad(), capture(model, "h.*"):
        run(X)
        run_other(X)
        assert torch._dynamo.eval_frame._stance.stance == "default"
    assert counter.frame_count == 1


CACHED = """
import sys, torch
sys.path.insert(0, {tests!r})
from compiling import Stack, X
from activation_extractor import capture, instrument
torch.manual_seed(0)
model = Stack().eval()
instrument(model, "h.*")
run = torch.compile(model, fullgraph=True)
with torch.no_grad(), capture(model, "h.*") as acts:
    run(X)
assert len(acts) == 3
print(torch._dynamo.utils.counters["inductor"]["fxgraph_cache_hit"])
"""


def test_a_second_process_finds_the_graph_in_the_cache_on_disk(tmp_path):
    def process():
        script = textwrap.dedent(CACHED).format(tests=TESTS)
        env = {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path), "TORCHINDUCTOR_FX_GRAPH_CACHE": "1"}
        run = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", script],
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, **env, "TORCHINDUCTOR_AUTOGRAD_CACHE": "0"},
        )
        assert run.returncode == 0, run.stderr
        return int(run.stdout)

    assert process() == 0
    assert process() == 1
