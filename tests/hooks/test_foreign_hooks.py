"""What is known of hooks of others: whether they may replace a value, and whether they register themselves anew."""

from __future__ import annotations

import warnings
from functools import partial

import pytest
import torch
from torch import nn

from activation_extractor import capture, gradients, inputs

X = torch.randn(3, 4)


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))


def by_closure(module):
    handles = []

    def double(called, args, output):
        handles.pop().remove()
        handles.append(called.register_forward_hook(double))
        return output * 2

    handles.append(module.register_forward_hook(double))


class Steering:
    """Registers its hook anew in each call, by a method."""

    def __init__(self, module) -> None:
        self.module, self.handle = module, None
        self.register()

    def register(self):
        if self.handle is not None:
            self.handle.remove()
        self.handle = self.module.register_forward_hook(self.double)

    def double(self, called, args, output):
        self.register()
        return output * 2


def by_lambdas(module):
    def register(kept):
        kept[:] = [
            module.register_forward_hook(lambda called, args, output: (kept[0].remove(), register(kept), output * 2)[2])
        ]

    register([])


def by_partial(module):
    def double(kept, called, args, output):
        kept.pop().remove()
        kept.append(called.register_forward_hook(partial(double, kept)))
        return output * 2

    kept = []
    kept.append(module.register_forward_hook(partial(double, kept)))


def by_counting(module):
    def double(called, args, output):
        if not vars(called).setdefault("is_doubled", False):
            called.is_doubled = True
            called.register_forward_hook(double)
        return output * 2

    module.register_forward_hook(double)


WAYS = [by_closure, Steering, by_lambdas, by_partial]


@pytest.mark.parametrize("register", WAYS)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"copy": False},
        {"reduce": "max", "sequence_axis": 1, "mask": None},
        {"to": "cpu"},
        {"calls": "all"},
    ],
)
def test_a_hook_that_registers_itself_anew_in_each_call_is_not_too_late(register, options):
    model = net()
    register(model[1])
    with torch.no_grad(), warnings.catch_warnings(), capture(model, ["0", "1", "2"], **options) as acts:
        warnings.simplefilter("error")
        for _ in range(3):
            model(X)
            value = acts["1"][-1] if options.get("calls") else acts["1"]
            expected = model[1].forward(model[0].forward(X)) * 2
            assert torch.equal(value, expected.amax(1) if "reduce" in options else expected)


@pytest.mark.parametrize("register", WAYS)
def test_also_in_the_first_layer_and_beside_gradients(register):
    model = net()
    for layer in (model[0], model[1]):
        register(layer)
    with warnings.catch_warnings(), capture(model, ["0", gradients("1"), inputs("2")]) as acts:
        warnings.simplefilter("error")
        for _ in range(3):
            model(X).sum().backward()
            assert torch.equal(acts["0"], model[0].forward(X) * 2)
            assert len(acts.names) == 3


def test_a_hook_on_arguments_that_registers_itself_anew_is_not_too_late():
    model, handles = net(), []

    def shift(called, args):
        handles.pop().remove()
        handles.append(called.register_forward_pre_hook(shift))
        return (args[0] + 1,)

    handles.append(model[1].register_forward_pre_hook(shift))
    with warnings.catch_warnings(), capture(model, ["0", inputs("1")]) as acts:
        warnings.simplefilter("error")
        for _ in range(3):
            model(X)
            assert torch.equal(acts["1:input"], acts["0"] + 1)


def test_one_that_is_registered_in_the_block_is_none_of_these_at_first():
    model = net()
    adding = model[1].register_forward_hook(lambda *call: by_closure(model[2]))
    with torch.no_grad(), capture(model, ["0", "2"]) as acts:
        with pytest.warns(UserWarning, match="A hook was added to layer '2' inside of the block, too late"):
            model(X)
        adding.remove()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for _ in range(2):
                assert len(acts["2"])
                expected = model(X)
    assert torch.equal(acts["2"], expected)


def test_a_hook_that_something_else_registers_anew_is_too_late():
    model, handles = net(), []

    def double(called, args, output):
        return output * 2

    def renew(*call):
        handles.pop().remove()
        handles.append(model[2].register_forward_hook(double))

    handles.append(model[2].register_forward_hook(double))
    model[1].register_forward_hook(renew)
    with torch.no_grad(), capture(model, ["0", "2"]) as acts:
        with pytest.warns(UserWarning, match="A hook was added to layer '2' inside of the block, too late"):
            expected = model(X)
    assert not torch.equal(acts["2"], expected)


def test_one_that_has_registered_itself_twice_has_its_say_from_the_next_call_on():
    model = net()
    by_counting(model[1])
    with torch.no_grad(), warnings.catch_warnings(), capture(model, ["0", "1"]) as acts:
        warnings.simplefilter("error")
        for factor in (2, 4):
            model(X)
            assert torch.equal(acts["1"], model[1].forward(acts["0"]) * factor)
