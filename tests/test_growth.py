"""What costs as much as there are layers does not cost as much as there are pairs of layers."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from growth import is_linear, steps
from torch import nn

from activation_extractor import capture, compare, extract, open_store, preview
from activation_extractor.activations._saved import SavedActivations
from activation_extractor.errors import ArgumentError
from activation_extractor.layers._selections import resolve
from activation_extractor.reducers._layouts import Layouts


def a_model(layers: int) -> nn.Module:
    return nn.Sequential(*(nn.Identity() for _ in range(layers)))


def some_activations(layers: int):
    model = a_model(layers)
    with capture(model, "*") as acts:
        model(torch.ones(1, 2))
    return acts


def a_store(folder, layers: int):
    model = a_model(layers)
    with capture(model, "*", sink=folder / str(len(list(folder.iterdir())))) as acts:
        model(torch.ones(1, 2))
    return open_store(next(path for path in folder.iterdir() if len(open_store(path)) == layers and acts))


def test_a_loop_in_a_loop_is_seen():
    def all_pairs(size):
        return lambda: (
            [None for _ in range(size) for _ in range(size)] or [pair(a, b) for a in range(size) for b in range(size)]
        )

    def pair(a, b):
        return a, b

    assert not is_linear(all_pairs, small=10)
    assert is_linear(lambda size: lambda: [pair(a, a) for a in range(size)])
    assert steps(lambda: None) < 10


@pytest.mark.parametrize(
    "select",
    [lambda model: "*", list, lambda model: [str(number) for number in range(len(model))], lambda model: nn.Identity],
    ids=["pattern", "modules", "names", "type"],
)
def test_selecting_layers(select):
    def make(size):
        model = a_model(size)
        return partial(resolve, model, select(model))

    assert is_linear(make)


@pytest.mark.parametrize("turn", [iter, reversed])
def test_where_the_sequence_is_in_each_of_many_layers(turn):
    def make(size):
        model = a_model(size)
        layouts, targets = Layouts(None, model), list(turn(resolve(model, "*")))
        return lambda: list(map(layouts.of, targets))

    assert is_linear(make)
    assert capture(a_model(3000), "*", reduce="mean")  # no RecursionError


def test_a_preview():
    assert is_linear(lambda size: partial(preview, a_model(size), "*", torch.ones(1, 2)), small=25)


MATCHES = {
    "by name": lambda acts: None,
    "order": lambda acts: "order",
    "dict": lambda acts: {name: name for name in acts},
    "pattern": lambda acts: {"*": "*"},
    "callable": lambda acts: lambda name: name,
}


@pytest.mark.parametrize("match", MATCHES.values(), ids=MATCHES)
def test_a_comparison(match):
    def make(size):
        acts = some_activations(size)
        return partial(compare, acts, acts, match=match(acts))

    assert is_linear(make, small=25)


@pytest.mark.parametrize("argument", ["rtol", "atol"])
def test_a_tolerance_for_each_layer(argument):
    def make(size):
        acts = some_activations(size)
        return partial(compare, acts, acts, **{argument: dict.fromkeys(acts, 1e-3)})

    assert is_linear(make, small=100)


def test_a_mask_and_an_axis_for_each_layer():
    def make(size):
        model = a_model(size)
        names = list(map(str, range(size)))

        def run():
            masks, axes = dict.fromkeys(names), dict.fromkeys(names, 1)
            with capture(model, "*", reduce="mean", mask=masks, sequence_axis=axes):
                model(torch.ones(1, 2, 3))

        return run

    assert is_linear(make)


STORE_READERS = {
    "dict": dict,
    "repr": repr,
    "pairs": lambda store: store.pairs,
    "in": lambda store: [key in store for key in [*store, *store.pairs]],
    "values": lambda store: [column.numpy() for column in store.values()],
    "compared": lambda store: compare(store, store),
}


@pytest.mark.parametrize("read", STORE_READERS.values(), ids=STORE_READERS)
def test_reading_a_store(read, tmp_path):
    assert is_linear(lambda size: partial(read, a_store(tmp_path, size)), small=20)


@pytest.mark.parametrize("suffix", ["npz", "safetensors"])
def test_a_file(suffix, tmp_path):
    def make(size):
        path = tmp_path / f"{size}.{suffix}"
        some_activations(size).save(path)
        return lambda: dict(SavedActivations(path))

    assert is_linear(make, small=25)


def test_a_long_table_of_a_store_builds_the_columns_that_it_shows(tmp_path):
    store = a_store(tmp_path, 200)
    built, column = [], store._column
    store._column = lambda entry: built.append(entry) or column(entry)
    assert "... and 160 more" in repr(store)
    assert len(built) == 40


# -- modules that are shared on every level ---------------------------------------------------------------------------


class Twice(nn.Module):
    """Holds a module under two names."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.a = self.b = inner

    def forward(self, x):
        return self.a(x)


def shared(depth: int) -> nn.Module:
    model: nn.Module = nn.Linear(2, 2)
    for _ in range(depth):
        model = Twice(model)
    return model


def test_modules_shared_on_every_level_cost_as_much_as_there_are_levels():
    for select in ("**", nn.Linear, "a.b.*", shared(0)):
        few, many = (steps(lambda depth=depth, select=select: found(shared(depth), select)) for depth in (10, 40))
        assert many < 8 * few


def found(model, select):
    return resolve(model, model.a.b if isinstance(select, nn.Module) else select)


def test_shared_modules_have_the_names_that_torch_lists_and_each_of_few_names():
    model = shared(30)
    names = {target.name for target in resolve(model, "**")}
    assert names > {name for name, _ in model.named_modules() if name}
    few = shared(6)
    assert {target.name for target in resolve(few, "**")} == {
        name for name, _ in few.named_modules(remove_duplicate=False) if name
    }


def test_a_shared_module_is_found_under_each_of_its_exact_names():
    model = shared(30)
    for name in (".".join("ab" * 15), ".".join("b" * 30), ".".join("b" * 29)):
        with capture(model, name) as acts:
            model(torch.ones(1, 2))
        assert torch.equal(acts[name], model(torch.ones(1, 2)))


def test_a_preview_of_shared_modules_ends():
    assert len(preview(shared(20), "**", torch.ones(1, 2))) < 3000


# -- a child that holds its parent ------------------------------------------------------------------------------------


class Child(nn.Module):
    def __init__(self, parent: nn.Module) -> None:
        super().__init__()
        self.linear, self.parent = nn.Linear(2, 2), parent

    def forward(self, x):
        return self.linear(x)


def parent_and_child() -> nn.Module:
    model = nn.Sequential(nn.Linear(2, 2))
    model.append(Child(model))
    return model


def test_a_child_that_holds_its_parent_is_captured():
    model, x = parent_and_child(), torch.ones(1, 2)
    for layers in ("**", nn.Module, list(model)):
        with capture(model, layers) as acts:
            expected = model(x)
        assert torch.equal(acts["1"], expected)
        assert not [name for name in acts if "parent" in name]
    with capture(model, {"back": "1.parent.1.linear"}) as acts:
        model(x)
    assert torch.equal(acts["back"], expected)


def test_a_preview_of_a_child_that_holds_its_parent_leaves_the_mode_as_it_was():
    model = parent_and_child()
    model[0].training = False
    assert [row.calls for row in preview(model, "**", torch.ones(1, 2))] == [1, 1, 1]
    assert [module.training for module in model.modules()] == [True, False, True, True]


@pytest.mark.parametrize("device", [None, "cpu"])
def test_extract_refuses_a_child_that_holds_its_parent_with_advice_that_works(tmp_path, device):
    model, batches = parent_and_child(), [{"input": torch.ones(2, 2)}]
    options = {"out": tmp_path / "out", "progress": False, "device": device}
    with pytest.raises(ArgumentError) as caught:
        extract(model, batches, "1", **options)
    assert str(caught.value) == (
        "model must hold no module that holds it in turn, got 'Sequential'. "
        "Keep the parent in a list: self.parent = [parent]."
    )
    assert not (tmp_path / "out").exists()
    model[1].parent = [model[1]._modules.pop("parent")]
    assert extract(model, batches, "1", **options)["1"].shape == (2, 2)
