"""`HookWatch`: which hooks it tells, and of which model."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hook_leaks import HERE, METHODS, OPTIONS, SOURCE, record, watching, where
from models import BlockStack
from torch import nn
from torch.nn.modules import module as torch_module
from torch.nn.utils import prune, spectral_norm

from activation_extractor import capture, inputs
from activation_extractor.testing._hook_leaks import HookWatch, LeftHook, hooks_on


class CountingRegistrations(nn.Linear):
    def register_forward_hook(self, *args: Any, **kwargs: Any) -> Any:
        self.registrations = getattr(self, "registrations", 0) + 1
        return super().register_forward_hook(*args, **kwargs)


class Delegating(nn.Module):
    """A wrapper without a state of its own."""

    def __init__(self, inner: nn.Module) -> None:
        object.__setattr__(self, "inner", inner)

    def __getattr__(self, name: str) -> Any:
        return getattr(vars(self)["inner"], name)


@pytest.fixture(autouse=True)
def _in_the_tests_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(HERE)


@pytest.fixture
def watch() -> Iterator[HookWatch]:
    with watching() as watch:
        yield watch


@pytest.mark.parametrize("method", METHODS)
def test_a_hook_of_each_kind_that_stays_is_left(watch: HookWatch, method: str) -> None:
    model = BlockStack()
    getattr(model.h[2].mlp, method)(record)
    assert watch.left() == [LeftHook("h.2.mlp", "Linear", "BlockStack", METHODS[method], SOURCE)]


@pytest.mark.parametrize(("method", "options"), OPTIONS)
def test_options_of_a_registration_are_handed_on(watch: HookWatch, method: str, options: dict[str, Any]) -> None:
    module, other = nn.Linear(2, 2), nn.Linear(2, 2)
    getattr(module, method)(print)
    handle = getattr(module, method)(record, **options)
    assert len(watch.stop()) == 2
    getattr(other, method)(print)
    getattr(other, method)(record, **options)
    for name, hooks in vars(other).items():
        if "hook" in name and isinstance(hooks, dict):
            assert list(vars(module)[name].values()) == list(hooks.values()), name
    assert handle.hooks_dict_ref()[handle.id] is record


@pytest.mark.parametrize("method", METHODS)
def test_a_hook_that_was_removed_is_not_left(watch: HookWatch, method: str) -> None:
    module = nn.Linear(2, 2)
    getattr(module, method)(record).remove()
    assert watch.left() == []


def test_a_hook_that_its_handles_block_removed_is_not_left(watch: HookWatch) -> None:
    module = nn.Linear(2, 2)
    with module.register_forward_hook(record):
        assert len(watch.left()) == 1
    assert watch.left() == []


def test_a_hook_that_was_taken_from_the_dictionary_is_not_left(watch: HookWatch) -> None:
    module = nn.Linear(2, 2)
    handle = module.register_forward_hook(record)
    del module._forward_hooks[handle.id]
    other = nn.Linear(2, 2)
    other.register_forward_hook(record)
    other._forward_hooks = type(other._forward_hooks)()
    assert watch.left() == []


def test_a_capture_leaves_nothing(watch: HookWatch) -> None:
    model, x = BlockStack(), torch.ones(1, 3, dtype=torch.long)
    with capture(model, ["h.*", inputs("h.0.mlp")]) as acts:
        model(x)
        assert len(watch.left()) == 5
    assert acts["h.0"].shape == (1, 3, 8)
    assert watch.left() == []


def test_one_of_several_hooks_is_left(watch: HookWatch) -> None:
    model = BlockStack()
    handles = [block.register_forward_hook(record) for block in model.h]
    for index in (0, 1, 3):
        handles[index].remove()
    assert where(watch.left()) == [("h.2", "forward hook")]


def test_hooks_are_told_in_the_order_of_their_registration(watch: HookWatch) -> None:
    model = BlockStack()
    model.h[3].register_forward_hook(record)
    with torch_module.register_module_forward_hook(record):
        model.h[0].register_full_backward_hook(record)
        model.h[1].register_forward_hook(record, prepend=True)
        model.h[3].register_forward_hook(record, prepend=True)
        layers = [("h.3", "forward hook"), ("", "global forward hook"), ("h.0", "backward hook")]
        assert where(watch.left()) == [*layers, ("h.1", "forward hook"), ("h.3", "forward hook")]


def test_a_hook_from_before_is_not_told() -> None:
    module = nn.Linear(2, 2)
    module.register_forward_hook(record)
    with watching() as watch:
        assert watch.left() == []
        assert watch.stop() == []


def test_a_hook_from_afterwards_is_not_told(watch: HookWatch) -> None:
    watch.stop()
    module = nn.Linear(2, 2)
    module.register_forward_hook(record)
    assert watch.left() == []


def test_torchs_own_hooks_are_left_out(watch: HookWatch) -> None:
    module = nn.Linear(4, 4)
    prune.l1_unstructured(module, "weight", amount=0.5)
    spectral_norm(nn.Linear(2, 2))
    with torch_module.register_module_forward_hook(nn.functional.relu):
        assert watch.left() == []


def test_a_hook_on_a_model_that_is_gone_is_left(watch: HookWatch) -> None:
    nn.Linear(2, 2).register_forward_hook(record)
    gc.collect()
    assert [str(hook) for hook in watch.left()] == [f"a forward hook on a Linear: {SOURCE}"]


def test_modules_are_not_held_and_hooks_are_until_it_stops(watch: HookWatch) -> None:
    class Hook:
        def __call__(self, *values: Any) -> None: ...

    module, hook = nn.Linear(2, 2), Hook()
    module.register_forward_hook(hook)
    module_is_alive, hook_is_alive = weakref.ref(module), weakref.ref(hook)
    del module, hook
    assert not module_is_alive()
    assert hook_is_alive()
    assert len(watch.stop()) == 1
    assert not hook_is_alive()


def test_a_copys_hooks_are_not_its_concern(watch: HookWatch) -> None:
    model = BlockStack()
    handle = model.h[0].register_forward_hook(record)
    duplicate = copy.deepcopy(model)
    assert where(watch.left()) == [("h.0", "forward hook")]
    handle.remove()
    assert len(hooks_on(duplicate)) == 1
    assert watch.left() == []


def test_a_class_that_registers_through_super_is_noted_once(watch: HookWatch) -> None:
    module = CountingRegistrations(2, 2)
    module.register_forward_hook(record)
    assert module.registrations == 1
    assert len(watch.left()) == 1


def test_the_largest_model_that_holds_the_module_is_named(watch: HookWatch) -> None:
    model = BlockStack()
    part = nn.Sequential(model.h[1])
    pair = nn.ModuleDict({"text": model, "head": nn.Linear(2, 2)})
    model.h[1].mlp.register_forward_hook(record)
    assert [(hook.layer, hook.model_type) for hook in watch.left()] == [("text.h.1.mlp", "ModuleDict")]
    del pair
    gc.collect()
    assert [(hook.layer, hook.model_type) for hook in watch.left()] == [("h.1.mlp", "BlockStack")]
    del model
    gc.collect()
    assert [(hook.layer, hook.model_type) for hook in watch.left()] == [("0.mlp", "Sequential")]
    assert part is not None


def test_a_hook_on_the_model_itself_names_no_layer(watch: HookWatch) -> None:
    model = BlockStack()
    model.register_forward_hook(record)
    (left,) = watch.left()
    assert (left.layer, left.module_type, left.model_type) == ("", "BlockStack", None)


def test_names_in_a_compiled_model_are_plain(watch: HookWatch) -> None:
    compiled = torch.compile(BlockStack(), backend="eager")
    compiled._orig_mod.h[0].register_forward_hook(record)
    compiled.register_forward_hook(record)
    hooks = [(hook.layer, hook.module_type, hook.model_type) for hook in watch.left()]
    assert hooks == [("h.0", "Block", "BlockStack"), ("", "OptimizedModule", None)]


def test_a_tied_module_is_told_once_under_its_first_name(watch: HookWatch) -> None:
    model = nn.ModuleDict({"first": nn.Linear(2, 2)})
    model["second"] = model["first"]
    model["second"].register_forward_hook(record)
    assert [hook.layer for hook in watch.left()] == ["first"]


def test_odd_objects_are_not_asked_what_they_are(watch: HookWatch) -> None:
    class Odd:
        @property
        def __class__() -> type:
            raise OSError("of no class")

    model = BlockStack()
    odd = [Odd(), nn.Module.__new__(nn.Linear)]
    model.h[0].register_forward_hook(record)
    assert where(watch.left()) == [("h.0", "forward hook")]
    assert len(odd) == 2


def test_the_heap_is_looked_through_only_when_there_is_something_to_tell(
    watch: HookWatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = nn.Linear(2, 2)
    module.register_forward_hook(record).remove()
    with monkeypatch.context() as patched:
        patched.setattr(gc, "get_objects", lambda: pytest.fail("looked"))
        assert watch.left() == []


def test_a_hook_that_a_wrapper_hands_to_what_it_wraps_is_left(watch: HookWatch) -> None:
    wrapper = Delegating(nn.Linear(2, 2))
    handle = wrapper.register_forward_hook(record)
    assert where(watch.left()) == [("", "forward hook")]
    handle.remove()
    assert watch.left() == []


@pytest.mark.parametrize("is_inside", [False, True])
def test_a_model_that_holds_itself_does_no_harm(watch: HookWatch, is_inside: bool) -> None:
    module = nn.Linear(2, 2)
    module.holder = nn.Sequential(module)
    model = nn.Sequential(module) if is_inside else module
    module.register_forward_hook(record)
    place = ("0", "Linear", "Sequential") if is_inside else ("", "Linear", None)
    assert watch.left() == [LeftHook(*place, "forward hook", SOURCE)]
    del module.holder
    assert model is not None
