"""`HookWatch`: hooks on every module, pauses, and torch's methods before, meanwhile and afterwards."""

from __future__ import annotations

import functools
import inspect
import pickle
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from left_hooks import GLOBAL, HERE, METHODS, ORIGINALS, SOURCE, are_original, are_watched, record, watching, where
from models import BlockStack
from torch import nn
from torch.nn.modules import module as torch_module

from activation_extractor.testing import _hook_leaks
from activation_extractor.testing._hook_leaks import HookWatch, LeftHook


@pytest.fixture(autouse=True)
def _in_the_tests_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(HERE)


@pytest.fixture
def watch() -> Iterator[HookWatch]:
    with watching() as watch:
        yield watch


@pytest.mark.parametrize("register", GLOBAL)
def test_a_hook_on_every_module_is_left(watch: HookWatch, register: Callable[..., Any]) -> None:
    handle = register(record)
    assert watch.left() == [LeftHook("", "", None, GLOBAL[register], SOURCE)]
    handle.remove()
    assert watch.left() == []


def test_one_from_before_is_not_told() -> None:
    watch = HookWatch()
    with torch_module.register_module_forward_hook(record):
        watch.start()
        assert watch.left() == []
        watch.stop()


def test_one_from_a_pause_is_not_told(watch: HookWatch) -> None:
    with torch_module.register_module_forward_hook(record):
        with watch.pause():
            handle = torch_module.register_module_forward_pre_hook(record)
        with handle:
            assert where(watch.left()) == [("", "global forward hook")]


def test_one_is_told_as_it_was_at_the_end(watch: HookWatch) -> None:
    with torch_module.register_module_forward_hook(record):
        watch.stop()
    assert where(watch.left()) == [("", "global forward hook")]


def test_a_hook_from_a_pause_is_not_noted(watch: HookWatch) -> None:
    model = BlockStack()
    with watch.pause():
        model.h[0].register_forward_hook(record)
    model.h[1].register_forward_hook(record)
    assert where(watch.left()) == [("h.1", "forward hook")]


def test_pauses_may_be_nested(watch: HookWatch) -> None:
    model = BlockStack()
    with watch.pause():
        with watch.pause():
            model.h[0].register_forward_hook(record)
        model.h[1].register_forward_hook(record)
        handle = torch_module.register_module_forward_hook(record)
    with handle:
        assert watch.left() == []
    model.h[2].register_forward_hook(record)
    assert where(watch.left()) == [("h.2", "forward hook")]


def test_a_pause_that_fails_ends(watch: HookWatch) -> None:
    model = BlockStack()
    with pytest.raises(KeyError):
        with watch.pause():
            raise KeyError
    model.h[0].register_forward_hook(record)
    assert where(watch.left()) == [("h.0", "forward hook")]


def test_a_hook_from_before_a_pause_that_is_removed_in_it_is_not_left(watch: HookWatch) -> None:
    module = nn.Linear(2, 2)
    handle = module.register_forward_hook(record)
    with watch.pause():
        handle.remove()
    assert watch.left() == []


def test_a_pause_is_of_one_watch_alone(watch: HookWatch) -> None:
    other, model = HookWatch(), BlockStack()
    other.start()
    with watch.pause():
        model.h[0].register_forward_hook(record)
    assert watch.left() == []
    assert where(other.left()) == [("h.0", "forward hook")]
    other.stop()


def test_a_watch_may_start_and_stop_in_a_pause() -> None:
    watch, model = HookWatch(), BlockStack()
    with watch.pause():
        watch.start()
        model.h[0].register_forward_hook(record)
    model.h[1].register_forward_hook(record)
    with watch.pause():
        watch.stop()
    assert where(watch.left()) == [("h.1", "forward hook")]


def test_the_methods_are_torchs_own_afterwards() -> None:
    watch = HookWatch()
    watch.start()
    assert are_watched()
    watch.stop()
    assert are_original()


@pytest.mark.parametrize("name", METHODS)
def test_the_methods_look_as_ever_meanwhile(watch: HookWatch, name: str) -> None:
    method, original = vars(nn.Module)[name], ORIGINALS[name]
    assert inspect.signature(method) == inspect.signature(original)
    assert (method.__qualname__, method.__doc__) == (original.__qualname__, original.__doc__)
    assert pickle.loads(pickle.dumps(method)) is method


def test_starting_twice_changes_nothing(watch: HookWatch) -> None:
    model = BlockStack()
    model.h[0].register_forward_hook(record)
    methods = dict(vars(nn.Module))
    watch.start()
    assert dict(vars(nn.Module)) == methods
    assert where(watch.left()) == [("h.0", "forward hook")]


def test_stopping_twice_changes_nothing(watch: HookWatch) -> None:
    module = nn.Linear(2, 2)
    module.register_forward_hook(record)
    watch.stop()
    watch.stop()
    assert len(watch.left()) == 1


def test_stopping_what_never_started_does_no_harm() -> None:
    watch = HookWatch()
    watch.stop()
    assert watch.left() == []


def test_a_second_start_begins_anew(watch: HookWatch) -> None:
    module = nn.Linear(2, 2)
    module.register_forward_hook(record)
    watch.stop()
    watch.start()
    assert watch.left() == []
    watch.stop()
    assert watch.left() == []


@pytest.mark.parametrize("is_first_ended", [True, False])
def test_watches_may_overlap_and_end_in_any_order(is_first_ended: bool) -> None:
    outer, inner, model = HookWatch(), HookWatch(), BlockStack()
    outer.start()
    model.h[0].register_forward_hook(record)
    inner.start()
    model.h[1].register_forward_hook(record)
    first, second = (outer, inner) if is_first_ended else (inner, outer)
    first.stop()
    assert are_watched()
    model.h[2].register_forward_hook(record)
    second.stop()
    model.h[3].register_forward_hook(record)
    layers = {watch: [hook.layer for hook in watch.left()] for watch in (outer, inner)}
    assert layers[outer] == (["h.0", "h.1"] if is_first_ended else ["h.0", "h.1", "h.2"])
    assert layers[inner] == (["h.1", "h.2"] if is_first_ended else ["h.1"])


def test_a_start_that_fails_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    noting, calls = _hook_leaks._noting, []

    def fail_at_the_third(*args: Any) -> Any:
        calls.append(args)
        if len(calls) == 3:
            raise MemoryError
        return noting(*args)

    watch = HookWatch()
    with monkeypatch.context() as patched:
        patched.setattr(_hook_leaks, "_noting", fail_at_the_third)
        with pytest.raises(MemoryError):
            watch.start()
    assert are_original()
    watch.start()
    module = nn.Linear(2, 2)
    module.register_forward_hook(record)
    assert len(watch.left()) == 1
    watch.stop()


def test_a_stop_that_fails_has_restored_the_methods(watch: HookWatch, monkeypatch: Any) -> None:
    module = nn.Linear(2, 2)
    module.register_forward_hook(record)
    with monkeypatch.context() as patched:
        patched.setattr(_hook_leaks, "_parents", lambda: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            watch.stop()
    assert are_original()


def test_a_patch_on_top_stays_and_the_method_below_comes_back_later() -> None:
    watch, module = HookWatch(), nn.Linear(2, 2)
    with pytest.MonkeyPatch.context() as patched:
        watch.start()
        ours = nn.Module.register_forward_hook
        patched.setattr(nn.Module, "register_forward_hook", functools.wraps(ours)(lambda *args: ours(*args)))
        patch = nn.Module.register_forward_hook
        watch.stop()
        assert nn.Module.register_forward_hook is patch
        module.register_forward_hook(record)
        assert watch.left() == []
    assert nn.Module.register_forward_hook is ours
    watch.start()
    assert nn.Module.register_forward_hook is ours
    module.register_forward_hook(record)
    assert len(watch.left()) == 1
    watch.stop()
    assert nn.Module.register_forward_hook is ORIGINALS["register_forward_hook"]


def test_a_registration_through_a_patch_is_noted_once(watch: HookWatch, monkeypatch: Any) -> None:
    ours = nn.Module.register_forward_hook
    monkeypatch.setattr(nn.Module, "register_forward_hook", lambda *args, **kwargs: ours(*args, **kwargs))
    watch.stop()
    watch.start()
    module = nn.Linear(2, 2)
    module.register_forward_hook(record)
    assert len(watch.left()) == 1
    watch.stop()
    monkeypatch.undo()
    watch.start()


def test_a_registration_by_another_thread_is_noted(watch: HookWatch) -> None:
    model = BlockStack()
    thread = threading.Thread(target=lambda: model.h[1].register_forward_hook(record))
    thread.start()
    thread.join()
    assert where(watch.left()) == [("h.1", "forward hook")]


def test_many_threads_lose_nothing(watch: HookWatch) -> None:
    models = [BlockStack(2) for _ in range(8)]

    def register(model: BlockStack) -> None:
        for _ in range(50):
            model.h[1].register_forward_hook(record)
            model.h[0].register_forward_hook(record).remove()

    threads = [threading.Thread(target=register, args=(model,)) for model in models]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    attached = sum(len(model.h[1]._forward_hooks) for model in models)
    assert where(watch.left()) == [("h.1", "forward hook")] * attached


def test_a_registration_that_fails_is_not_noted_and_fails_as_ever(watch: HookWatch) -> None:
    module = nn.Linear(2, 2)
    handle = module.register_full_backward_hook(record)
    with pytest.raises(RuntimeError, match="Cannot use both regular backward hooks and full backward hooks"):
        module.register_backward_hook(record)
    with pytest.raises(TypeError, match="register_forward_hook"):
        module.register_forward_hook()
    handle.remove()
    assert watch.left() == []


def test_what_returns_no_handle_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(nn.Module, "register_forward_hook", lambda self, hook: "no handle")
        watch = HookWatch()
        watch.start()
        assert nn.Linear(2, 2).register_forward_hook(record) == "no handle"
        assert watch.left() == []
        watch.stop()
