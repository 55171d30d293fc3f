"""What is recorded is what the layer's caller got: our hooks are the last ones, whatever was registered when."""

from __future__ import annotations

import dis
import threading
import warnings
from contextvars import copy_context
from functools import partial
from unittest.mock import patch

import pytest
import torch
from tiny import tiny_bert
from torch import nn

from activation_extractor import capture, gradients, inputs, outputs

X = torch.randn(3, 4)
OPTIONS = [
    {},
    {"copy": False},
    {"reduce": "max", "sequence_axis": 1, "mask": None},
    {"reduce": lambda activation, mask: activation.sum(1), "sequence_axis": 1, "mask": None},
    {"calls": "all"},
]
EACH_KIND = pytest.mark.parametrize("options", OPTIONS, ids=["copy", "reference", "ours", "users", "all"])


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))


def double(module, args, output):
    return output * 2


def shift(module, args):
    return (args[0] + 1,)


def same(value, expected: torch.Tensor, options) -> bool:
    if "reduce" in options:
        expected = expected.amax(1) if options["reduce"] == "max" else expected.sum(1)
    return torch.equal(value[-1] if isinstance(value, list) else value, expected)


@EACH_KIND
def test_a_hook_that_is_added_in_the_block_has_its_say(options):
    model = net()
    with torch.no_grad(), capture(model, "1", **options) as acts:
        for factor in (2, 4, 8):
            model[1].register_forward_hook(double)
            model(X)
            assert same(acts["1"], model[1].forward(model[0](X)) * factor, options)


@EACH_KIND
def test_a_hook_that_is_added_while_the_forward_is_under_way_has_its_say(options):
    model = net()
    model.register_forward_pre_hook(lambda module, args: model[1].register_forward_hook(double) and None)
    with torch.no_grad(), capture(model, "*", **options) as acts:
        model(X)
    assert same(acts["1"], model[1].forward(model[0](X)) * 2, options)


def test_outputs_are_the_inputs_of_the_next_layer():
    model = net()
    with capture(model, ["0", inputs("1")]) as acts:
        model[0].register_forward_hook(double)
        model(X)
        assert torch.equal(acts["0"], acts["1:input"])
        model[1].register_forward_pre_hook(shift)
        model(X)
    assert torch.equal(acts["1:input"], acts["0"] + 1)


def test_a_gradient_is_that_of_what_the_caller_got():
    model = net()
    with capture(model, [gradients("1"), outputs("1")]) as acts:
        model[1].register_forward_hook(lambda module, args, output: output.detach().requires_grad_())
        model(X).sum().backward()
    assert acts["1:gradient"].shape == (3, 4)


def test_two_blocks_and_a_third_hook_agree():
    model = net()
    with capture(model, "1") as first, capture(model, "1", reduce="max", sequence_axis=1, mask=None) as second:
        model[1].register_forward_hook(double)
        model(X)
        expected = model[1].forward(model[0](X)) * 2
        assert torch.equal(first["1"], expected)
        assert torch.equal(second["1"], expected.amax(1))


def test_parts_that_are_called_alone_are_put_in_order_as_they_run():
    model = net()
    with capture(model, "*") as acts:
        model[1].register_forward_hook(double)
        for layer in model:
            last = layer(X)
    assert torch.equal(acts["1"], model[1].forward(X) * 2)
    assert torch.equal(acts["2"], last)


@EACH_KIND
def test_a_call_that_it_is_too_late_for_is_said_to_be_so(options):
    model = net()
    with torch.no_grad(), capture(model, "1", **options) as acts:
        model[1].register_forward_hook(double)
        with pytest.warns(UserWarning, match="A hook was added to layer '1' inside of the block, too late"):
            model[1](X)
        expected = model[1](X)
        assert same(acts["1"], expected, options)


def test_a_hook_that_one_layer_adds_to_the_next_is_said_to_be_too_late_once():
    model = net()
    adding = model[1].register_forward_hook(lambda *call: model[2].register_forward_hook(double) and None)
    with capture(model, ["0", "1", "2"]) as acts:
        with pytest.warns(UserWarning, match="A hook was added to layer '2' inside of the block") as caught:
            model(X)
        assert len(caught) == 1
        adding.remove()
        assert len(acts["2"]) == 3
        assert torch.equal(model(X), acts["2"])


def test_input_hooks_that_come_too_late_are_said_to_be_so():
    model = net()
    with capture(model, inputs("1")):
        model[1].register_forward_pre_hook(shift)
        with pytest.warns(UserWarning, match="too late for this call"):
            model[1](X)


def test_hooks_that_change_nothing_are_not_warned_of():
    model, seen = net(), []
    with warnings.catch_warnings(), capture(model, "*") as acts:
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "The model ran")
        with capture(model, "*", reduce="max", sequence_axis=1, mask=None):
            model(X)
        handle = model[2].register_forward_hook(lambda module, args, output: seen.append(output))
        model(X).sum().backward()
        handle.remove()
        model(X)
    assert torch.equal(acts["2"], seen[0])


class Watcher:
    def __init__(self):
        self.seen = []

    def watch(self, module, args, output):
        if output is None:
            return
        self.seen.append(output)


@pytest.mark.parametrize("form", ["function", "method", "partial", "lambda", "callable", "builtin"])
def test_only_hooks_that_may_return_a_value_are_warned_of(form):
    model, watcher = net(), Watcher()

    def watch(kept, module, args, output):
        kept.append(output)

    class Called(Watcher):
        def __call__(self, module, args, output):
            return output

    hooks = {
        "function": lambda: partial(watch, watcher.seen),
        "method": lambda: watcher.watch,
        "partial": lambda: partial(Watcher.watch, watcher),
        "lambda": lambda: lambda module, args, output: watcher.seen.append(output),
        "callable": Called,
        "builtin": lambda: print,
    }
    with warnings.catch_warnings(record=True) as caught, capture(model, "1"):
        warnings.simplefilter("always")
        model[1].register_forward_hook(hooks[form]())
        model[1](X)
    assert bool(caught) is (form in ("lambda", "callable", "builtin"))


def test_what_transformers_registers_in_a_forward_for_hidden_states_is_not_warned_of():
    model = tiny_bert()
    with capture(model, "encoder.layer.*") as acts:
        states = model(torch.tensor([[1, 2, 3]]), output_hidden_states=True).hidden_states
    assert all(map(torch.equal, acts.values(), states[1:]))


def test_other_hooks_keep_their_order_and_are_left_alone():
    model, calls = net(), []
    with capture(model, "1"):
        for name in "abc":
            model[1].register_forward_hook(lambda module, args, output, name=name: calls.append(name))
        model[1].register_forward_hook(lambda module, args, output: calls.append("first"), prepend=True)
        model(X)
    assert calls == ["first", "a", "b", "c"]
    assert len(model[1]._forward_hooks) == 4


@pytest.mark.filterwarnings("ignore:A hook was added to layer '1' inside of the block, too late")
def test_hooks_come_and_go_in_other_threads_meanwhile():
    model, stop, errors = net(), threading.Event(), []

    def add_and_remove():
        while not stop.is_set():
            model[1].register_forward_hook(lambda module, args, output: None).remove()

    def capture_often():
        try:
            for _ in range(300):
                with torch.no_grad(), capture(model, "1") as acts:
                    model(X)
                assert torch.equal(acts["1"], model[1].forward(model[0](X)))
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=add_and_remove), threading.Thread(target=capture_often)]
    for thread in threads:
        thread.start()
    threads[1].join()
    stop.set()
    threads[0].join()
    assert not errors


def test_hooks_of_other_blocks_are_neither_read_nor_overtaken():
    model = net()
    elsewhere, other = copy_context(), capture(model, "*")
    with (
        torch.no_grad(),
        capture(model, "*") as acts,
        patch.object(dis, "get_instructions", side_effect=AssertionError),
    ):
        before = elsewhere.run(other.__enter__)
        hooks = [[*layer._forward_hooks] for layer in model]
        model(X)
        assert [[*layer._forward_hooks] for layer in model] == hooks
        elsewhere.run(model, X + 1)
        assert [[*layer._forward_hooks] for layer in model] == hooks
        elsewhere.run(other.__exit__, None, None, None)
    assert torch.equal(acts["1"], model[1](model[0](X)))
    assert torch.equal(before["1"], model[1](model[0](X + 1)))


@EACH_KIND
def test_a_hook_among_those_of_other_blocks_has_its_say(options):
    model = net()
    others = [(copy_context(), capture(model, "1", missing="skip")) for _ in range(2)]
    with torch.no_grad(), capture(model, "1", **options) as acts:
        others[0][0].run(others[0][1].__enter__)
        model[1].register_forward_hook(double)
        others[1][0].run(others[1][1].__enter__)
        model(X)
        assert same(acts["1"], model[1].forward(model[0](X)) * 2, options)
    for context, block in others:
        context.run(block.__exit__, None, None, None)
