"""Compiled models: values are right, nothing is recompiled, and the compiler's stance is put back."""

from __future__ import annotations

import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest
import torch
from models import BlockStack, count_hooks
from torch._dynamo.testing import CompileCounter

from activation_extractor import MemorySink, capture

pytestmark = pytest.mark.filterwarnings(  # of torch's own code while it compiles
    "ignore::DeprecationWarning",
    "ignore::FutureWarning",
    "ignore:The .grad attribute of a Tensor",
    "ignore:.* is compiled, and runs eagerly",
)


TESTS = str(Path(__file__).parents[1])


@pytest.fixture
def counter():
    torch._dynamo.reset()
    yield CompileCounter()
    torch._dynamo.reset()


def compiled_root(model, counter):
    return torch.compile(model, backend=counter)


def compiled_in_place(model, counter):
    model.compile(backend=counter)
    return model


def compiled_part(model, counter):
    model.h[1] = torch.compile(model.h[1], backend=counter)
    return model


def compiled_caller(model, counter):
    return torch.compile(lambda ids: model(ids) + 0, backend=counter)


@pytest.mark.parametrize("compiled", [compiled_root, compiled_in_place, compiled_part, compiled_caller])
@pytest.mark.parametrize("has_run", [True, False], ids=["already run", "not yet run"])
def test_a_compiled_model_gives_the_right_values_and_is_not_recompiled(stack, tokens, counter, compiled, has_run):
    with capture(stack, "h.*") as expected:
        stack(tokens)
    model = compiled(stack, counter)
    if has_run:
        model(tokens)
    for _ in range(3):
        with capture(stack, "h.*") as acts:
            returned = model(tokens)
        assert all(torch.equal(acts[name], expected[name]) for name in expected)
        model(tokens)
    assert torch.equal(model(tokens), returned)
    assert counter.frame_count == 1
    assert count_hooks(stack) == (1 if compiled is compiled_in_place else 0)


def test_the_compiled_wrapper_itself_can_be_captured_under_plain_names(stack, tokens, counter):
    model = torch.compile(stack, backend=counter)
    model(tokens)
    sink = MemorySink()
    with capture(model, ["h.0", "_orig_mod.h.1"], sink=sink, stop_early=True) as acts:
        assert model(tokens) is None
    assert list(acts) == ["h.0", "h.1"]
    assert len(sink.steps) == 1
    assert counter.frame_count == 1


def test_the_last_capture_out_restores_what_the_first_found(stack, tokens, counter):
    def stance():
        return torch._dynamo.eval_frame._stance.stance

    with torch.compiler.set_stance("eager_on_recompile"):
        one, two = capture(stack, "h.0"), capture(stack, "h.1")
        one.__enter__()
        assert stance() == "force_eager"
        two.__enter__()
        stack(tokens)
        one.__exit__(None, None, None)
        assert stance() == "force_eager"
        two.__exit__(None, None, None)
        assert stance() == "eager_on_recompile"
    with pytest.raises(ZeroDivisionError), capture(stack, "h.0"):
        raise ZeroDivisionError
    assert stance() == "default"


def test_overlapping_captures_of_many_threads_restore_the_stance(stack, tokens, counter):
    model = compiled_root(stack, counter)
    model(tokens)

    def serve():
        for _ in range(20):
            with capture(stack, "h.3") as acts:
                assert torch.equal(model(tokens), acts["h.3"])

    threads = [threading.Thread(target=serve) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert torch._dynamo.eval_frame._stance.stance == "default"
    model(tokens)
    assert counter.frame_count == 1


FRESH = """
import sys, torch
sys.path.insert(0, {tests!r})
from models import BlockStack
from activation_extractor import capture
model, ids = BlockStack().eval(), torch.zeros(2, 3, dtype=torch.long)
with capture(model, "h.*") as acts:
    assert "torch._dynamo" not in sys.modules, "importing dynamo takes a second"
    {body}
assert torch.equal(acts["h.3"], returned)
assert torch._dynamo.eval_frame._stance.stance == "default"
from torch._dynamo.testing import CompileCounter
counter = CompileCounter()
compiled = torch.compile(model, backend=counter)
compiled(ids), compiled(ids)
assert counter.frame_count == 1
print("right")
"""


@pytest.mark.parametrize(
    "body",
    [
        "returned = torch.compile(model, backend='eager')(ids)",
        "model.h[1] = torch.compile(model.h[1], backend='eager'); returned = model(ids)",
        "returned = torch.compile(lambda ids: model(ids), backend='eager')(ids)",
    ],
)
def test_a_process_that_compiles_for_the_first_time_inside_a_block_gets_the_right_values(body, tmp_path):
    script = textwrap.dedent(FRESH).format(tests=TESTS, body=body)
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert (run.stdout, run.returncode) == ("right\n", 0), run.stderr


def test_a_model_that_was_never_compiled_does_not_import_the_compiler(tmp_path):
    script = f"""
    import sys, torch
    sys.path.insert(0, {TESTS!r})
    from models import BlockStack
    from activation_extractor import capture
    model = BlockStack()
    with capture(model, "h.*"):
        model(torch.zeros(2, 3, dtype=torch.long))
    print("torch._dynamo" in sys.modules)
    """
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert run.stdout == "False\n", run.stderr


def test_a_model_compiled_through_autograd_too_is_right(tokens):
    model = BlockStack(blocks=1).eval()
    compiled = torch.compile(model, backend="aot_eager")
    compiled(tokens)
    with capture(model, "h.0") as acts:
        returned = compiled(tokens)
    assert torch.equal(acts["h.0"], returned)
    torch._dynamo.reset()
