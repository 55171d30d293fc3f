"""Whether modules are still where they were: what is asked before a model is looked through again."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from activation_extractor import capture
from activation_extractor.errors import LayerNotRunError
from activation_extractor.layers._modules import ModuleTree
from activation_extractor.layers._places import Places

LAYERS = ["body.0", "body.1", "head"]


def model() -> nn.Module:
    made = nn.Sequential()
    made.body = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))
    made.head = nn.Sequential(nn.ReLU())
    return made


def put(parent: nn.Module, name: str, child: nn.Module | None) -> None:
    parent._modules[name] = child


CHANGES: dict[str, Callable[[nn.Module], object]] = {
    "a layer": lambda it: setattr(it, "head", nn.ReLU()),
    "an item": lambda it: put(it.body, "1", nn.ReLU()),
    "nothing in its place": lambda it: put(it.body, "1", None),
    "what is around it": lambda it: setattr(it, "body", nn.ModuleList(it.body)),
    "a wrapper of a layer": lambda it: put(it.body[0], "_orig_mod", nn.ReLU()),
    "a wrapper around it": lambda it: put(it.body, "_checkpoint_wrapped_module", nn.ReLU()),
    "a wrapper of all": lambda it: put(it, "_fsdp_wrapped_module", nn.ReLU()),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_takes_the_place_of_a_layer_or_of_what_is_around_it_is_seen(change: str) -> None:
    root = model()
    places = Places(root, LAYERS)
    assert not places.may_have_changed()
    CHANGES[change](root)
    assert places.may_have_changed()


def test_a_slice_of_a_list_and_modules_elsewhere_change_no_place() -> None:
    root = model()
    places = Places(root, [*LAYERS, ""])
    assert len(root.body[:1]) == 1
    root.body[0].more, root.other = nn.ReLU(), nn.ReLU()
    assert not places.may_have_changed()


@pytest.mark.parametrize("layer", ["body.0", "absent", "head.0.absent"])
def test_a_layer_in_a_wrapper_may_be_anywhere(layer: str) -> None:
    root = model()
    put(root.body[0], "_orig_mod", nn.ReLU())
    assert Places(root, [layer]).may_have_changed()


class Slicing(nn.Module):
    """Takes a slice of its layers in each forward, which puts them into a list of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Identity() for _ in range(3))

    def forward(self, value: Tensor) -> Tensor:
        for layer in self.layers[:2]:
            value = layer(value)
        return value


def test_a_model_that_slices_its_layers_is_looked_through_once(monkeypatch: pytest.MonkeyPatch) -> None:
    root, found, find = Slicing(), [], ModuleTree.find
    monkeypatch.setattr(ModuleTree, "find", lambda tree, name: found.append(name) or find(tree, name))
    with capture(root, "layers.0") as acts:
        found.clear()
        for _ in range(5):
            root(torch.ones(2, 4))
            assert len(acts["layers.0"]) == 2
    assert found == ["layers.0"]


def test_a_layer_of_such_a_model_that_is_replaced_later_is_seen() -> None:
    root = Slicing()
    with pytest.raises(LayerNotRunError, match="another module took its place"), capture(root, "layers.0") as acts:
        for _ in range(3):
            root(torch.ones(2, 4))
            assert len(acts["layers.0"]) == 2
        root.layers[0] = nn.Tanh()
        root(torch.ones(2, 4))
