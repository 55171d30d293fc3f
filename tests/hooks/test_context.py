"""Threads, tasks and generators that use one model at a time."""

from __future__ import annotations

import asyncio
import contextvars
import copy
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
import torch
from models import BlockStack, count_hooks

from activation_extractor import MemorySink, capture, gradients, inputs
from activation_extractor.errors import LayerNotRunError, StepError


@contextmanager
def switching_every(seconds):
    """Threads take turns this often."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(seconds)
    try:
        yield
    finally:
        sys.setswitchinterval(interval)


def in_thread(function):
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function).result()


def test_another_threads_calls_are_not_recorded(stack, tokens):
    with capture(stack, "h.0") as acts:
        stack(tokens)
        in_thread(lambda: stack(tokens[:1]))
    assert acts["h.0"].shape == (2, 5, 8)


@pytest.mark.parametrize("selection", ["h.0", inputs("h.0"), gradients("h.0")])
@pytest.mark.parametrize("options", [{}, {"copy": False}, {"reduce": "mean"}, {"calls": "all"}, {"sink": MemorySink()}])
def test_a_forward_in_another_thread_alone_is_an_error_that_says_so(stack, tokens, selection, options):
    with pytest.raises(LayerNotRunError) as caught, capture(stack, selection, **options):
        in_thread(lambda: stack(tokens))
    reason = "called in another thread or task than the one that entered the block, which is to be entered there"
    assert f"did not run in the step: 'h.0' ({reason}). Leave out" in str(caught.value)
    assert caught.value.reasons == {"h.0": reason}


def test_a_block_that_another_task_entered_is_an_error_that_says_so(stack, tokens):
    async def serve(entered, done):
        await entered.wait()
        stack(tokens)
        done.set()

    async def run():
        entered, done = asyncio.Event(), asyncio.Event()
        task = asyncio.create_task(serve(entered, done))  # a copy of the context as it is before the block
        with capture(stack, "h.*"):
            entered.set()
            await done.wait()
        await task

    with pytest.raises(LayerNotRunError, match=r"'h.0', 'h.1', 'h.2' and 1 more \(called in another thread or task"):
        asyncio.run(run())


def test_the_reasons_of_layers_stand_side_by_side(stack, tokens):
    with pytest.raises(LayerNotRunError, match=r"\(called in another thread .*; a branch that was not taken, .*\)\."):
        with capture(stack, ["h.0", "h.1"]):
            in_thread(lambda: stack.h[0](stack.embed(tokens)))


def test_what_another_thread_did_in_an_earlier_step_is_no_reason(stack, tokens):
    with pytest.raises(LayerNotRunError) as caught, capture(stack, "h.0", sink=MemorySink()) as acts:
        with acts.step():
            stack(tokens)
            in_thread(lambda: stack(tokens))
        with acts.step():
            pass
    assert caught.value.reasons == {}


def test_with_missing_skip_a_block_may_see_only_calls_of_another_thread(stack, tokens):
    with capture(stack, "h.0", sink=MemorySink(), missing="skip"):
        in_thread(lambda: stack(tokens))


def test_threads_with_a_capture_each_get_their_own(stack):
    recorded = capture(stack, "h.*")

    def serve(number):
        ids = torch.full((1, 3), number)
        for _ in range(20):
            with recorded as acts:
                expected = stack(ids)
            assert torch.equal(acts["h.3"], expected)
        return True

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(serve, range(32)))
    assert count_hooks(stack) == 0


def test_sixteen_threads_at_once_lose_and_mix_nothing(stack):
    meet = threading.Barrier(16)

    def serve(number):
        sink, ids = MemorySink(), [torch.full((2, 3), (number + 3 * step) % 50) for step in range(20)]
        meet.wait()
        with torch.inference_mode(), capture(stack, "h.*", reduce=["full", "last"][number % 2], sink=sink):
            expected = [stack(one) for one in ids]
        assert len(sink.steps) == len(ids)
        for step, output in zip(sink.steps, expected, strict=True):
            if number % 2:
                assert torch.equal(step.values["h.3", "last"], output[:, -1])
            else:
                assert torch.equal(step.values["h.3", "full"].values, output.flatten(0, 1))
        return True

    with switching_every(1e-5), ThreadPoolExecutor(16) as pool:
        assert all(pool.map(serve, range(16)))
    assert count_hooks(stack) == 0


def test_threads_that_enter_and_leave_at_once_do_not_disturb_each_other(stack):
    recorded = capture(stack, ["h.*", inputs("h.*")], missing="skip")

    def serve(number):
        for _ in range(100):
            with recorded:
                copy.deepcopy(stack.h[0])
        return True

    with switching_every(1e-6), ThreadPoolExecutor(8) as pool:
        assert all(pool.map(serve, range(16)))
    assert count_hooks(stack) == 0
    assert all(not block._forward_hooks.__dict__ for block in stack.h)


def test_gradients_of_two_threads_are_not_mixed(stack):
    def train(number):
        ids = torch.full((1, 3), number)
        for _ in range(10):
            with capture(stack, gradients("h.3")) as acts:
                (stack(ids) * number).sum().backward()
            assert torch.equal(acts["h.3:gradient"], torch.full((1, 3, 8), float(number)))
        return True

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(train, range(1, 9)))


def test_a_gradient_is_recorded_when_backward_runs_in_another_thread(stack, tokens):
    with capture(stack, gradients("h.0")) as acts:
        loss = stack(tokens).sum()
        in_thread(loss.backward)
    assert acts["h.0:gradient"].shape == (2, 5, 8)


def test_tasks_with_a_capture_each_get_their_own(stack):
    async def serve(number):
        with capture(stack, "h.*") as acts:
            await asyncio.sleep(0)
            expected = stack(torch.full((1, 3), number))
            await asyncio.sleep(0)
        return torch.equal(acts["h.3"], expected)

    async def serve_all():
        return await asyncio.gather(*(serve(number) for number in range(20)))

    assert all(asyncio.run(serve_all()))
    assert count_hooks(stack) == 0


def test_a_child_task_and_to_thread_inherit_the_block(stack, tokens):
    async def serve():
        with capture(stack, "h.0") as acts:
            await asyncio.to_thread(stack, tokens)
            assert acts["h.0"].shape == (2, 5, 8)
            await asyncio.create_task(run(tokens[:1]))
            assert acts["h.0"].shape == (1, 5, 8)

    async def run(ids):
        stack(ids)

    asyncio.run(serve())


def test_two_forwards_at_once_in_one_block_are_an_error():
    class Meeting(BlockStack):
        barrier = threading.Barrier(2, timeout=20)

        def forward(self, input_ids, attention_mask=None):
            self.barrier.wait()
            self.barrier.wait()
            return super().forward(input_ids)

    model, ids = Meeting(), torch.zeros(1, 2, dtype=torch.long)

    async def serve():
        with capture(model, "h.0", sink=MemorySink()):
            one = asyncio.create_task(asyncio.to_thread(model, ids))
            await asyncio.to_thread(model.barrier.wait)  # now the first forward is under way
            try:
                await asyncio.to_thread(model, ids)
            finally:
                model.barrier.wait()
                await one

    with pytest.raises(StepError, match="see one forward at a time, got two in different threads of one context"):
        asyncio.run(serve())


def test_interleaved_generators_keep_their_own(stack):
    def serve(number):
        with capture(stack, "h.0") as acts:
            stack(torch.full((number, 3), number))
            yield acts

    one, two = serve(1), serve(2)
    first, second = next(one), next(two)
    one.close()
    two.close()
    assert len(second["h.0"]) == 2
    assert len(first["h.0"]) == 2  # one context: a generator has none of its own, so the open outer block records too
    assert count_hooks(stack) == 0


def test_a_block_that_ended_in_another_context_is_forgotten_by_the_next_entry(stack):
    from activation_extractor._hooks._context import open_here

    first, second = capture(stack, "h.0", missing="skip"), capture(stack, "h.1", missing="skip")
    context = contextvars.copy_context()
    context.run(first.__enter__)
    first.__exit__(None, None, None)
    context.run(second.__enter__)
    assert len(context.run(open_here)) == 1
    context.run(second.__exit__, None, None, None)


def test_entering_and_leaving_thousands_of_blocks_leaves_nothing_in_the_context(stack):
    from activation_extractor._hooks._context import open_here

    recorded = capture(stack, "h.0", missing="skip")
    for _ in range(2000):
        with recorded:
            pass
    assert open_here() == ()
