"""`HookWatch`: hooks on every module, pauses, and torch's methods before, meanwhile and afterwards."""

from __future__ import annotations

import functools
import inspect
import pickle
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hook_leaks import GLOBAL, HERE, METHODS, ORIGINALS, SOURCE, are_original, are_watched, record, watching, where
from models import BlockStack
from torch import nn
from torch.nn.modules import module as torch_module

from activation_extractor.testing import _hook_leaks
from activation_extractor.testing._hook_leaks import HookWatch, LeftHook


class Recorder:
    def __call__(self, *values: Any) -> None: ...


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
    with torch_module.register_module_forward_hook(record):
        watch = HookWatch()
        assert watch.stop() == []


def test_one_from_a_pause_is_not_told(watch: HookWatch) -> None:
    with torch_module.register_module_forward_hook(record):
        with watch.pause():
            handle = torch_module.register_module_forward_pre_hook(record)
        with handle:
            assert where(watch.left()) == [("", "global forward hook")]


def test_one_is_told_as_it_was_at_the_end(watch: HookWatch) -> None:
    with torch_module.register_module_forward_hook(record):
        left = watch.stop()
    assert where(left) == [("", "global forward hook")]


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
    with watch.pause():
        model.h[0].register_forward_hook(record)
    assert watch.left() == []
    assert where(other.stop()) == [("h.0", "forward hook")]


def test_a_watch_may_stop_in_a_pause() -> None:
    watch, model = HookWatch(), BlockStack()
    model.h[1].register_forward_hook(record)
    with watch.pause():
        model.h[0].register_forward_hook(record)
        left = watch.stop()
    assert where(left) == [("h.1", "forward hook")]
    assert watch.left() == []


def test_the_methods_are_torchs_own_afterwards() -> None:
    watch = HookWatch()
    assert are_watched()
    watch.stop()
    assert are_original()


@pytest.mark.parametrize("name", METHODS)
def test_the_methods_look_as_ever_meanwhile(watch: HookWatch, name: str) -> None:
    method, original = vars(nn.Module)[name], ORIGINALS[name]
    assert inspect.signature(method) == inspect.signature(original)
    assert (method.__qualname__, method.__doc__) == (original.__qualname__, original.__doc__)
    assert pickle.loads(pickle.dumps(method)) is method


def test_stopping_twice_changes_nothing(watch: HookWatch) -> None:
    module = nn.Linear(2, 2)
    module.register_forward_hook(record)
    assert len(watch.stop()) == 1
    with torch_module.register_module_forward_hook(record):
        assert watch.stop() == []
    assert are_original()


def test_a_watch_may_stand_inside_another(watch: HookWatch) -> None:
    model = BlockStack()
    model.h[0].register_forward_hook(record)
    inner = HookWatch()
    model.h[1].register_forward_hook(record)
    assert where(inner.stop()) == [("h.1", "forward hook")]
    assert are_watched()
    model.h[2].register_forward_hook(record)
    assert [hook.layer for hook in watch.stop()] == ["h.0", "h.1", "h.2"]


def test_two_watches_that_stop_in_the_wrong_order_find_what_is_theirs_and_fall_silent() -> None:
    model, outer = BlockStack(), HookWatch()
    model.h[0].register_forward_hook(record)
    inner = HookWatch()
    model.h[1].register_forward_hook(record)
    left = outer.stop()
    model.h[2].register_forward_hook(record)
    assert [hook.layer for hook in left] == ["h.0", "h.1"]
    assert [hook.layer for hook in inner.stop()] == ["h.1", "h.2"]
    model.h[3].register_forward_hook(record)
    assert outer.left() == inner.left() == []
    for name, method in ORIGINALS.items():
        assert vars(nn.Module)[name].__wrapped__ is method
        setattr(nn.Module, name, method)


def test_a_start_that_fails_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    watched, calls = HookWatch._watched, []

    def fail_at_the_third(*args: Any) -> Any:
        calls.append(args)
        if len(calls) == 3:
            raise MemoryError
        return watched(*args)

    monkeypatch.setattr(HookWatch, "_watched", fail_at_the_third)
    with pytest.raises(MemoryError):
        HookWatch()
    assert are_original()


def test_a_stop_that_fails_has_restored_the_methods(watch: HookWatch, monkeypatch: Any) -> None:
    module = nn.Linear(2, 2)
    module.register_forward_hook(record)
    with monkeypatch.context() as patched:
        patched.setattr(_hook_leaks, "_parents", lambda: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            watch.stop()
    assert are_original()


def test_a_patch_on_top_stays_and_the_method_below_comes_back_later() -> None:
    module = nn.Linear(2, 2)
    with pytest.MonkeyPatch.context() as patched:
        watch = HookWatch()
        ours = nn.Module.register_forward_hook
        patched.setattr(nn.Module, "register_forward_hook", functools.wraps(ours)(lambda *args: ours(*args)))
        patch = nn.Module.register_forward_hook
        watch.stop()
        assert nn.Module.register_forward_hook is patch
        hook = Recorder()
        module.register_forward_hook(hook)
        hook_is_alive = weakref.ref(hook)
        assert watch.left() == []
        del module, hook
        assert not hook_is_alive()
    assert nn.Module.register_forward_hook is ours
    watch = HookWatch()
    nn.Linear(2, 2).register_forward_hook(record)
    assert len(watch.stop()) == 1
    assert nn.Module.register_forward_hook is ours
    nn.Module.register_forward_hook = ORIGINALS["register_forward_hook"]


def test_a_registration_through_a_patch_is_noted_once(watch: HookWatch, monkeypatch: Any) -> None:
    ours = nn.Module.register_forward_hook
    with monkeypatch.context() as patched:
        patched.setattr(nn.Module, "register_forward_hook", lambda *args, **kwargs: ours(*args, **kwargs))
        module = nn.Linear(2, 2)
        module.register_forward_hook(record)
        assert len(watch.left()) == 1
        inner = HookWatch()
        module.register_forward_hook(record)
        assert len(inner.stop()) == 1
    assert len(watch.left()) == 2


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
        assert nn.Linear(2, 2).register_forward_hook(record) == "no handle"
        assert watch.stop() == []
