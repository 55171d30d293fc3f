"""`hooks_on`: the hooks on a model, told by layer and by where their functions are defined."""

from __future__ import annotations

import copy
import functools
import inspect
import os
import warnings
from pathlib import Path
from types import MethodType
from typing import Any

import pytest
import torch
from hook_leaks import HERE, METHODS, OPTIONS, SOURCE, line_of, record, where
from models import BlockStack
from torch import nn
from torch.nn.modules import module as torch_module
from torch.nn.utils import parametrizations, prune, spectral_norm

from activation_extractor import capture, inputs
from activation_extractor._display import examples
from activation_extractor.testing._hook_leaks import LeftHook, hooks_on


class Recorder:
    def __call__(self, *values: Any) -> None: ...

    def record(self, *values: Any) -> None: ...


class QuietRecorder:
    @torch.no_grad()
    def __call__(self, *values: Any) -> None: ...


class Recording(nn.Module):
    def forward(self, *values: Any) -> None: ...


def source_of(hook: Any) -> str:
    module = nn.Linear(2, 2)
    module.register_forward_hook(hook)
    (left,) = hooks_on(module)
    return left.source


@pytest.fixture(autouse=True)
def _in_the_tests_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(HERE)


def test_a_model_without_hooks_has_none() -> None:
    assert hooks_on(BlockStack()) == []


@pytest.mark.parametrize("method", METHODS)
def test_a_hook_of_each_kind_is_told(method: str) -> None:
    model = BlockStack()
    getattr(model.h[2].mlp, method)(record)
    assert hooks_on(model) == [LeftHook("h.2.mlp", "Linear", "BlockStack", METHODS[method], SOURCE)]


@pytest.mark.parametrize(("method", "options"), OPTIONS)
def test_a_hook_registered_with_options_is_told_once(method: str, options: dict[str, Any]) -> None:
    model = BlockStack()
    getattr(model.embed, method)(record, **options)
    assert where(hooks_on(model)) == [("embed", METHODS[method])]


def test_hooks_come_in_the_models_order_and_not_in_that_of_registration() -> None:
    model = BlockStack(2)
    for module in (model.h[1], model.h[0].norm, model.h[0], model):
        module.register_forward_hook(record)
    assert [hook.layer for hook in hooks_on(model)] == ["", "h.0", "h.0.norm", "h.1"]


def test_all_hooks_of_a_module_are_told() -> None:
    model = BlockStack(1)
    for method in ("register_full_backward_hook", "register_forward_hook", "register_forward_pre_hook"):
        getattr(model.embed, method)(record)
    model.embed.register_forward_hook(record)
    kinds = ["forward pre-hook", "forward hook", "forward hook", "backward hook"]
    assert [hook.kind for hook in hooks_on(model)] == kinds


def test_a_tied_module_is_told_once_under_its_first_name() -> None:
    model = nn.ModuleDict({"first": nn.Linear(2, 2)})
    model["second"] = model["first"]
    model["second"].register_forward_hook(record)
    assert [hook.layer for hook in hooks_on(model)] == ["first"]


def test_names_in_a_compiled_model_are_plain() -> None:
    model = BlockStack()
    model.h[0].register_forward_hook(record)
    model.h[1] = torch.compile(model.h[1], backend="eager")
    model.h[1]._orig_mod.mlp.register_forward_hook(record)
    hooks = hooks_on(torch.compile(model, backend="eager"))
    assert [(hook.layer, hook.model_type) for hook in hooks] == [("h.0", "BlockStack"), ("h.1.mlp", "BlockStack")]


def test_names_in_a_wrapped_model_are_plain() -> None:
    model = BlockStack()
    model.h[0].register_forward_hook(record)
    hooks = hooks_on(nn.DataParallel(model))
    assert [(hook.layer, hook.model_type) for hook in hooks] == [("h.0", "BlockStack")]


def test_hooks_on_a_wrapper_and_on_what_it_wraps_are_both_told_once() -> None:
    model = BlockStack()
    model.register_forward_hook(record)
    compiled = torch.compile(model, backend="eager")
    assert [hook.module_type for hook in hooks_on(compiled)] == ["BlockStack"]
    compiled.register_forward_hook(record)
    assert [hook.module_type for hook in hooks_on(compiled)] == ["OptimizedModule", "BlockStack"]


def test_hooks_on_every_module_are_not_the_models() -> None:
    with torch_module.register_module_forward_hook(record):
        assert hooks_on(BlockStack()) == []


def test_a_deepcopy_has_the_hooks_of_its_original() -> None:
    model = BlockStack()
    handle = model.h[0].register_forward_hook(record)
    duplicate = copy.deepcopy(model)
    handle.remove()
    assert hooks_on(model) == []
    assert where(hooks_on(duplicate)) == [("h.0", "forward hook")]


def test_a_capture_is_told_while_it_is_open_and_leaves_nothing() -> None:
    model = BlockStack()
    with capture(model, ["h.0", inputs("h.1")], missing="skip"):
        assert where(hooks_on(model)) == [("h.0", "forward hook"), ("h.1", "forward pre-hook")]
    assert hooks_on(model) == []


def test_a_scripted_module_inside_is_passed() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch 2.13 deprecates it
        scripted = torch.jit.script(nn.Sequential(nn.Linear(2, 2)))
    model = nn.Sequential(scripted, nn.ReLU())
    model[1].register_forward_hook(record)
    assert where(hooks_on(model)) == [("1", "forward hook")]


def test_legacy_weight_norm_is_part_of_the_model() -> None:
    with pytest.warns(FutureWarning, match="weight_norm"):
        model = nn.Sequential(nn.utils.weight_norm(nn.Linear(2, 2)))
    assert model[0]._forward_pre_hooks
    assert hooks_on(model) == []


def test_spectral_norm_is_part_of_the_model() -> None:
    model = spectral_norm(nn.Linear(2, 2))
    assert model._forward_pre_hooks
    assert hooks_on(model) == []


def test_parametrizations_are_part_of_the_model() -> None:
    assert hooks_on(parametrizations.weight_norm(nn.Linear(2, 2))) == []


def test_pruning_is_part_of_the_model() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    prune.l1_unstructured(model[0], "weight", amount=0.5)
    prune.random_unstructured(model[0], "weight", amount=0.5)
    assert model[0]._forward_pre_hooks
    assert hooks_on(model) == []


def test_lazy_modules_are_part_of_the_model() -> None:
    model = nn.Sequential(nn.LazyLinear(2))
    assert model[0]._forward_pre_hooks
    assert hooks_on(model) == []


def test_a_partial_of_a_torch_function_is_left_out_as_documented() -> None:
    model = nn.Linear(2, 2)
    model.register_forward_hook(functools.partial(nn.functional.relu))
    model.register_forward_hook(torch.relu)
    assert hooks_on(model) == []


def test_a_name_that_only_begins_like_torch_is_not_torchs() -> None:
    namespace: dict[str, Any] = {"__name__": "torchvision_like"}
    exec("def record(*values): pass", namespace)
    model = nn.Linear(2, 2)
    model.register_forward_hook(namespace["record"])
    assert len(hooks_on(model)) == 1


def test_a_users_hook_beside_torchs_own_is_told() -> None:
    model = nn.Linear(4, 4)
    prune.l1_unstructured(model, "weight", amount=0.5)
    model.register_forward_pre_hook(record)
    assert [hook.source.split()[0] for hook in hooks_on(model)] == ["'record'"]


def test_a_users_function_decorated_by_torch_is_the_users() -> None:
    assert source_of(torch.no_grad()(record)) == SOURCE


def test_a_function_is_told_by_qualified_name_and_line() -> None:
    def record_here(*values: Any) -> None: ...

    name = "test_a_function_is_told_by_qualified_name_and_line.<locals>.record_here"
    assert source_of(record_here) == f"{name!r} at testing/test_hook_leaks.py:{line_of(record_here)}"


def test_a_lambda_is_told_by_its_line() -> None:
    line = inspect.currentframe().f_lineno + 1
    source = source_of(lambda *values: None)
    assert source.endswith(f".<locals>.<lambda>' at testing/test_hook_leaks.py:{line}")


@pytest.mark.parametrize(
    "hook",
    [
        functools.partial(record, 1),
        functools.partial(functools.partial(record, 1), 2),
        functools.wraps(record)(lambda *values: None),
        functools.partial(functools.wraps(record)(lambda *values: None)),
        functools.lru_cache(record),
        MethodType(functools.partial(record), 1),
    ],
)
def test_what_wraps_a_function_is_told_as_the_function(hook: Any) -> None:
    assert source_of(hook) == SOURCE


@pytest.mark.parametrize("hook", [Recorder().record, functools.partial(Recorder().record, 1)])
def test_a_bound_method_is_told_as_its_function(hook: Any) -> None:
    assert source_of(hook) == f"'Recorder.record' at testing/test_hook_leaks.py:{line_of(Recorder.record)}"


@pytest.mark.parametrize("hook", [Recorder(), Recorder().__call__])
def test_a_callable_object_is_told_as_its_class_call(hook: Any) -> None:
    assert source_of(hook) == f"'Recorder.__call__' at testing/test_hook_leaks.py:{line_of(Recorder.__call__)}"


def test_a_callable_object_whose_call_is_wrapped_is_told_as_its_own() -> None:
    line = line_of(QuietRecorder.__call__)
    assert source_of(QuietRecorder()) == f"'QuietRecorder.__call__' at testing/test_hook_leaks.py:{line}"


def test_a_module_as_a_hook_is_told_as_its_forward() -> None:
    expected = f"'Recording.forward' at testing/test_hook_leaks.py:{line_of(Recording.forward)}"
    assert source_of(Recording()) == expected


def test_what_is_written_in_c_is_told_by_its_name() -> None:
    assert source_of(print) == "'print'"
    assert source_of([].append) == "'list.append'"
    assert source_of(dict) == "'dict'"


def test_an_object_without_a_name_is_told_by_its_repr() -> None:
    assert source_of(functools.cmp_to_key(record)).startswith("<functools.KeyWrapper object at")


def test_a_path_outside_the_current_directory_is_absolute(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    assert source_of(record) == f"'record' at {HERE / 'hook_leaks.py'}:{line_of(record)}"


def test_a_path_inside_the_current_directory_is_relative_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(HERE.parent)
    assert source_of(record) == f"'record' at {Path('tests', 'hook_leaks.py')}:{line_of(record)}"


def test_code_without_a_file_is_told_by_what_it_is_called() -> None:
    namespace: dict[str, Any] = {"__name__": "notebook"}
    exec(compile("\ndef record(*values): pass", "<cell 3>", "exec"), namespace)
    assert source_of(namespace["record"]) == "'record' at <cell 3>:2"


@pytest.mark.skipif(os.name == "nt", reason="Windows keeps the current directory from being removed.")
def test_a_current_directory_that_was_removed_does_no_harm(tmp_path: Path, monkeypatch: Any) -> None:
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    assert source_of(record) == f"'record' at {HERE / 'hook_leaks.py'}:{line_of(record)}"


def test_a_layers_hook_reads_as_documented() -> None:
    hook = LeftHook("h.0", "Linear", "BlockStack", "forward hook", "'record' at tests/test_x.py:12")
    assert str(hook) == "a forward hook on layer 'h.0' (Linear) of BlockStack: 'record' at tests/test_x.py:12"


def test_a_hook_on_a_module_by_itself_names_no_layer() -> None:
    hook = LeftHook("", "Linear", None, "backward pre-hook", "'record' at tests/test_x.py:12")
    assert str(hook) == "a backward pre-hook on a Linear: 'record' at tests/test_x.py:12"


def test_a_layer_without_its_model_is_told_without_it() -> None:
    hook = LeftHook("h.0", "Linear", None, "forward hook", "'print'")
    assert str(hook) == "a forward hook on layer 'h.0' (Linear): 'print'"


def test_a_global_hook_names_no_module() -> None:
    assert str(LeftHook("", "", None, "global forward hook", "'print'")) == "a global forward hook: 'print'"


def test_of_many_hooks_three_are_listed_and_the_rest_counted() -> None:
    hooks = [LeftHook(f"h.{index}", "Linear", "BlockStack", "forward hook", "'print'") for index in range(5)]
    texts = [f"a forward hook on layer 'h.{index}' (Linear) of BlockStack: 'print'" for index in range(3)]
    assert examples(hooks[:1]) == texts[0]
    assert examples(hooks[:3]) == ", ".join(texts)
    assert examples(hooks) == ", ".join(texts) + " and 2 more"
