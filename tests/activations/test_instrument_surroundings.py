"""What may be around an instrumented model: overlapping blocks, tasks, several compiled variants, wrappers, hooks."""

from __future__ import annotations

import asyncio
import copy

import pytest
import torch
from compiling import X, assert_same, compiled, eagerly, make, quiet

from activation_extractor import capture, inputs, instrument

pytestmark = quiet


def test_blocks_of_one_thread_may_end_in_the_order_in_which_they_began():
    model = make()
    instrument(model, ["h.*", inputs("h.0")])
    run, counter = compiled(model, "eager")
    first, second = capture(model, "h.0", calls="all"), capture(model, ["h.1", inputs("h.0")], calls="all")
    with torch.no_grad():
        of_first = first.__enter__()
        run(X)
        of_second = second.__enter__()
        run(X + 1)
        first.__exit__(None, None, None)
        run(X + 2)
        second.__exit__(None, None, None)
        run(X + 3)
    assert len(of_first["h.0"]) == len(of_second["h.1"]) == 2
    torch.testing.assert_close(of_second["h.1"][1], eagerly(model, "h.1", X + 2)["h.1"])
    torch.testing.assert_close(of_second["h.0:input"], [X + 1, X + 2])
    assert counter.frame_count == 1


def test_tasks_record_their_own_calls():
    model = make()
    instrument(model, "h.*")
    run, counter = compiled(model, "eager")
    expected = [eagerly(model, "h.*", X + number) for number in range(5)]

    async def serve(number):
        with torch.no_grad(), capture(model, "h.*") as acts:
            await asyncio.sleep(0.01)
            run(X + number)
            await asyncio.sleep(0.01 * (5 - number))
        assert_same(acts, expected[number])

    async def serve_all():
        await asyncio.gather(*[serve(number) for number in range(5)])

    asyncio.run(serve_all())
    assert counter.frame_count == 1


def test_several_compiled_variants_record_while_sizes_come_and_go():
    model = make()
    instrument(model, "h.*")
    runs = [compiled(model, "eager", dynamic=True)[0], compiled(model, "aot_eager", dynamic=False)[0]]
    with torch.no_grad():
        for rows in (2, 3, 2):
            for run in runs:
                batch = torch.randn(rows, 5, 16)
                with capture(model, "h.*") as acts:
                    run(batch)
                assert_same(acts, eagerly(model, "h.*", batch))


def test_layers_of_lora_are_recorded():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["a", "b"], r=2, init_lora_weights=False)
    model = peft.get_peft_model(make(), config).eval()
    layers = [f"base_model.model.h.*{inner}" for inner in ("", ".a", ".a.lora_A.default")]
    expected = eagerly(model, layers, X)
    instrument(model, layers)
    run = torch.compile(model, backend="aot_eager")
    with torch.no_grad():
        for _ in range(2):
            with capture(model, layers) as acts:
                run(X)
    assert_same(acts, expected)


def test_parameters_that_are_given_to_the_call_are_those_of_the_values():
    model = make()
    instrument(model, "h.*")
    parameters = {name: value * 2 for name, value in model.named_parameters()}

    def call(parameters, batch):
        return torch.func.functional_call(model, parameters, (batch,))

    run = torch.compile(call, backend="aot_eager", fullgraph=True)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        with capture(model, "h.*") as acts:
            run(parameters, X)
        with capture(twin, "h.*") as expected:
            torch.func.functional_call(twin, parameters, (X,))
    assert_same(acts, expected)
