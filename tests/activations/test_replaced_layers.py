"""A layer whose place in the model another module takes inside the block, such as one that wraps it."""

from __future__ import annotations

import threading
import warnings

import pytest
import torch
from torch import nn
from torch.nn.modules import module as torch_modules

from activation_extractor import MemorySink, capture, gradients, inputs
from activation_extractor.errors import LayerNotRunError

X, Y = torch.randn(5, 4), torch.randn(2, 4)
TEXT = "another module took its place since the block began"
EACH_KIND = pytest.mark.parametrize(
    "options",
    [
        {},
        {"copy": False},
        {"reduce": "max", "sequence_axis": 1, "mask": None},
        {"reduce": lambda activation, mask: activation.sum(1), "sequence_axis": 1, "mask": None},
        {"to": "cpu"},
        {"calls": "all"},
        {"calls": "join", "sequence_axis": 0},
        {"sink": MemorySink()},
    ],
    ids=["copy", "reference", "ours", "users", "to", "all", "join", "sink"],
)


class Wrap(nn.Module):
    """Calls what it wraps and changes what that returns."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *args, **kwargs):
        return self.inner(*args, **kwargs) * 2


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(4, 4), nn.Linear(4, 3)
        self.layers = nn.ModuleList([nn.Linear(4, 4) for _ in range(3)])
        self.named = nn.ModuleDict({"a": nn.Linear(4, 4)})

    def forward(self, x):
        x = self.named["a"](self.body(x))
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def put(model: nn.Module, name: str, module: nn.Module) -> None:
    model._modules[name] = module


WAYS = {
    "attribute": ("head", lambda m: setattr(m, "head", Wrap(m.head))),
    "add_module": ("head", lambda m: m.add_module("head", Wrap(m.head))),
    "register_module": ("head", lambda m: m.register_module("head", Wrap(m.head))),
    "set_submodule": ("layers.1", lambda m: m.set_submodule("layers.1", Wrap(m.layers[1]))),
    "item of a list": ("layers.1", lambda m: m.layers.__setitem__(1, Wrap(m.layers[1]))),
    "last item of a list": ("layers.2", lambda m: m.layers.__setitem__(-1, Wrap(m.layers[-1]))),
    "item of a dict": ("named.a", lambda m: m.named.__setitem__("a", Wrap(m.named["a"]))),
    "update of a dict": ("named.a", lambda m: m.named.update({"a": Wrap(m.named["a"])})),
    "another list": ("layers.1", lambda m: setattr(m, "layers", nn.ModuleList(map(Wrap, m.layers)))),
    "the dictionary": ("head", lambda m: put(m, "head", Wrap(m.head))),
    "a sequence around it": ("head", lambda m: setattr(m, "head", nn.Sequential(m.head, nn.ReLU()))),
}


@pytest.mark.parametrize("way", WAYS)
def test_a_layer_that_is_wrapped_in_place_is_not_taken_for_what_wraps_it(way):
    layer, wrap = WAYS[way]
    model = Net()
    with pytest.raises(LayerNotRunError, match=f"'{layer}' .{TEXT}"), capture(model, ["body", layer]) as acts:
        wrap(model)
        model(X)
        assert acts.names == ["body"]


@EACH_KIND
@pytest.mark.parametrize("side", [lambda layer: layer, inputs, gradients])
def test_each_kind_of_value_of_a_wrapped_layer_is_refused(options, side):
    if side is gradients and "reduce" in options:
        options = {}
    model = Net()
    with pytest.raises(LayerNotRunError, match=f"'head' .{TEXT}"), capture(model, side("head"), **options) as acts:
        model.head = Wrap(model.head)
        with acts.step() if "sink" in options else torch.enable_grad():
            model(X).sum().backward()


@EACH_KIND
def test_a_layer_that_is_wrapped_between_two_forwards_is_refused(options):
    model = Net()
    with pytest.raises(LayerNotRunError, match=f"'head' .{TEXT}"), capture(model, "head", **options) as acts:
        model(X)
        if "sink" not in options:
            assert len(acts["head"])
        model.head = Wrap(model.head)
        model(Y)


@EACH_KIND
def test_a_layer_that_is_wrapped_behind_the_last_forward_keeps_its_value(options):
    model = Net()
    with capture(model, ["head", inputs("head")], **{**options, "sink": None}) as acts:
        model(X)
        kept = [*acts["head"]]
        model.head = Wrap(model.head)
        assert all(map(torch.equal, acts["head"], kept))
    assert all(map(torch.equal, acts["head"], kept))


@EACH_KIND
def test_a_wrap_that_is_undone_before_the_forward_changes_nothing(options):
    model = Net()
    with capture(model, ["head", inputs("head")], **options) as acts:
        inner, model.head = model.head, Wrap(model.head)
        model.head = inner
        model(X)
        assert acts.names == ["head:input", "head"]


@pytest.mark.parametrize("side", [lambda layer: layer, inputs, gradients])
def test_a_wrap_that_is_undone_between_two_forwards_leaves_the_last_one_right(side):
    model = Net()
    with warnings.catch_warnings(), capture(model, side("head")) as acts:
        warnings.simplefilter("ignore")
        inner, model.head = model.head, Wrap(model.head)
        model(X).sum().backward()
        assert not acts.names
        model.head = inner
        model(Y).sum().backward()
        assert len(next(iter(acts.values()))) == 2
    if side("head") == "head":
        assert torch.equal(acts["head"], model(Y))


@pytest.mark.parametrize("calls", ["all", "join"])
def test_a_list_of_calls_that_lacks_one_of_a_wrapped_layer_is_refused(calls):
    model = Net()
    with pytest.raises(LayerNotRunError, match=f"'head' .{TEXT}"):
        with capture(model, "head", calls=calls, sequence_axis=0):
            model(X)
            inner, model.head = model.head, Wrap(model.head)
            model(X)
            model.head = inner
            model(X)


def test_a_step_that_lacks_a_call_of_a_wrapped_layer_is_refused_and_the_next_one_is_not():
    model, sink = Net(), MemorySink()
    with capture(model, "head", sink=sink) as acts:
        inner = model.head
        with pytest.raises(LayerNotRunError, match=TEXT), acts.step():
            model(X)
            model.head = Wrap(inner)
            model(X)
        model.head = inner
        with acts.step():
            expected = model(X)
    assert torch.equal(sink["head", "full"], expected)


def test_a_layer_deep_in_a_parent_that_is_wrapped_is_the_same_layer():
    model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.ReLU()))
    with capture(model, ["1.0", "0"]) as acts:
        model[1] = Wrap(model[1])
        model(X)
    assert torch.equal(acts["1.0"], model[1].inner[0](acts["0"]))


def test_a_layer_deep_in_a_parent_that_is_replaced_did_not_run():
    model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.ReLU()))
    with pytest.raises(LayerNotRunError, match=f"'1.0' .{TEXT}"), capture(model, "1.0"):
        model[1] = nn.Sequential(Wrap(model[1][0]), nn.ReLU())
        model(X)


def test_a_part_that_is_called_alone_is_refused_when_it_was_wrapped():
    model = Net()
    with pytest.raises(LayerNotRunError, match=f"'head' .{TEXT}"), capture(model, "head") as acts:
        model.head = Wrap(model.head)
        model.head(X)
        assert not acts.names
        model.head(X)


@pytest.mark.filterwarnings("ignore:.* is compiled, and runs eagerly")
def test_wrappers_whose_names_are_left_out_take_no_place():
    model = Net()
    with capture(model, ["head", "layers.1"]) as acts:
        model.head = torch.compile(model.head, backend="eager")
        model.layers[1] = nn.parallel.DataParallel(model.layers[1])
        expected = model(X)
    assert torch.equal(acts["head"], expected)


def test_a_layer_with_two_names_may_lose_one():
    model = Net()
    model.layers[1] = model.layers[0]
    with capture(model, ["layers.0", "layers.1"], missing="skip") as acts, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.layers[1] = Wrap(model.layers[1])
        model(X)
    assert acts.names == ["layers.0"]


def test_a_capture_that_is_entered_again_sees_what_was_wrapped_meanwhile():
    model = Net()
    reused = capture(model, "head")
    with reused as acts:
        model(X)
    inner, model.head = model.head, Wrap(model.head)
    with pytest.raises(LayerNotRunError, match=TEXT), reused:
        model(X)
    model.head = inner
    with reused as acts:
        assert torch.equal(model(X), acts["head"])


def test_models_that_other_threads_build_meanwhile_change_nothing():
    model, ended = Net(), threading.Event()

    def build():
        while not ended.is_set():
            nn.Sequential(nn.Linear(2, 2), Wrap(nn.ReLU()))

    threads = [threading.Thread(target=build) for _ in range(2)]
    [thread.start() for thread in threads]
    try:
        with capture(model, "**", calls="all") as acts:
            for _ in range(50):
                model(X)
        assert {len(calls) for calls in acts.values()} == {50}
        with pytest.raises(LayerNotRunError, match=f"'head' .{TEXT}"), capture(model, "head"):
            model.head = Wrap(model.head)
            model(X)
    finally:
        ended.set()
        [thread.join() for thread in threads]


def test_registrations_are_counted_while_blocks_are_open_and_no_longer():
    model, hooks = Net(), torch_modules._global_module_registration_hooks
    first, second = capture(model, "head", missing="skip"), capture(model, "body", missing="skip")
    with first:
        assert len(hooks) == 1
        with second:
            assert len(hooks) == 1
        assert len(hooks) == 1
    assert not hooks


def test_the_places_of_layers_are_looked_at_only_after_a_registration(monkeypatch):
    from activation_extractor.layers._modules import ModuleTree

    looks, find = [], ModuleTree.find
    monkeypatch.setattr(ModuleTree, "find", lambda tree, name: looks.append(name) or find(tree, name))
    model = Net()
    with capture(model, ["head", "body"]) as acts:
        looks.clear()
        for _ in range(3):
            model(X)
            acts["head"]
        assert not looks
        nn.Sequential(nn.ReLU())
        for _ in range(3):
            model(X)
            acts["head"]
        assert looks == ["head", "body"]
