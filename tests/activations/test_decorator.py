"""`capture` as a decorator."""

from __future__ import annotations

import asyncio
import inspect

import pytest
import torch
from models import count_hooks

from activation_extractor import MemorySink, capture
from activation_extractor.errors import ArgumentError, ArgumentTypeError, LayerNotRunError


def test_a_function_that_asks_for_acts_is_handed_them(stack, tokens):
    @capture(stack, "h.*", reduce="mean")
    def predict(batch, *, acts):
        """Predict."""
        stack(batch)
        return acts["h.3"]

    assert predict(tokens).shape == (2, 8)
    assert (predict.__name__, predict.__doc__) == ("predict", "Predict.")
    assert str(inspect.signature(predict)) == "(batch)"
    assert count_hooks(stack) == 0


def test_each_call_has_activations_of_its_own(stack, tokens):
    @capture(stack, "h.0")
    def predict(batch, acts):
        stack(batch)
        return acts

    first, second = predict(tokens), predict(tokens[:1])
    assert (first["h.0"].shape[0], second["h.0"].shape[0]) == (2, 1)


def test_a_function_without_acts_fills_the_sink_over_all_calls(stack, tokens):
    sink = MemorySink()

    @capture(stack, "h.0", sink=sink)
    def predict(batch):
        return stack(batch)

    predict(tokens)
    predict(tokens[:1])
    assert len(sink["h.0", "full"]) == 3


def test_a_decorated_store_goes_on_with_every_call(stack, tokens, tmp_path):
    from activation_extractor import open_store

    @capture(stack, "h.0", reduce="mean", sink=tmp_path / "out")
    def predict(batch):
        return stack(batch)

    predict(tokens)
    predict(tokens[:1])
    assert open_store(tmp_path / "out")["h.0"].shape == (3, 8)


def test_a_function_that_can_use_nothing_is_refused(stack):
    with pytest.raises(ArgumentError, match="what is decorated must have a parameter named 'acts', or the capture a"):

        @capture(stack, "h.0")
        def predict(batch):
            return stack(batch)


def test_generator_functions_are_refused(stack):
    with pytest.raises(ArgumentTypeError, match=r"must not be a generator function.*Use the with-block inside of it\."):

        @capture(stack, "h.0")
        def predict(batches, acts):
            yield from batches

    with pytest.raises(ArgumentTypeError, match="generator"):

        @capture(stack, "h.0")
        async def predict_async(batches, acts):
            for batch in batches:
                yield batch


@pytest.mark.parametrize("thing", [3, dict, torch.nn.Linear(1, 1)])
def test_only_functions_can_be_decorated(stack, thing):
    with pytest.raises(ArgumentTypeError, match="what is decorated must be a function"):
        capture(stack, "h.0")(thing)


def test_a_coroutine_function_stays_one(stack, tokens):
    @capture(stack, "h.0")
    async def predict(batch, *, acts):
        await asyncio.sleep(0)
        stack(batch)
        await asyncio.sleep(0)
        return acts

    async def both():
        return await asyncio.gather(predict(tokens), predict(tokens[:1]))

    assert inspect.iscoroutinefunction(predict)
    first, second = asyncio.run(both())
    assert (first["h.0"].shape[0], second["h.0"].shape[0]) == (2, 1)
    assert count_hooks(stack) == 0


def test_a_method_takes_its_model_from_its_object(stack, tokens):
    class Service:
        def __init__(self, model):
            self.model = model

        @capture(lambda self: self.model, "h.1")
        def predict(self, batch, *, acts):
            self.model(batch)
            return acts["h.1"]

    assert Service(stack).predict(tokens).shape == (2, 5, 8)
    assert count_hooks(stack) == 0


def test_a_model_can_be_given_by_a_function_without_arguments(stack, tokens):
    @capture(lambda: stack, "h.1")
    def predict(batch, *, acts):
        stack(batch)
        return acts["h.1"]

    assert predict(tokens).shape == (2, 5, 8)


def test_a_model_that_comes_later_cannot_be_entered_as_a_block(stack):
    with pytest.raises(ArgumentTypeError, match="model must be a module in a with-block"), capture(lambda: stack, "h"):
        pass


def test_what_comes_later_has_to_be_a_model(tokens):
    @capture(lambda: None, "h.1")
    def predict(batch, *, acts):
        return acts

    with pytest.raises(ArgumentTypeError, match="model must be a torch.nn.Module"):
        predict(tokens)


def test_an_error_in_the_function_passes_and_no_hook_stays(stack):
    @capture(stack, "h.0")
    def predict(*, acts):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        predict()
    assert count_hooks(stack) == 0


def test_a_function_in_which_the_layer_never_runs_is_an_error(stack):
    @capture(stack, "h.0")
    def predict(*, acts):
        return None

    with pytest.raises(LayerNotRunError):
        predict()
