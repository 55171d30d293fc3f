"""What is private of torch: each name does what we take it for, and one that is gone is an error that says so."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
import textwrap
import warnings
from pathlib import Path

import pytest
import torch
from models import BlockStack, count_hooks
from torch import nn
from torch.nn.modules import module as torch_module
from torch.utils.checkpoint import checkpoint

from activation_extractor import _private_compiler as compiler
from activation_extractor import _private_torch as private
from activation_extractor import capture
from activation_extractor.errors import UnsupportedTorchError

PACKAGE = Path(private.__file__).parent
LAYER = nn.Linear(2, 2)


def loaded_anew():
    """The module as a torch of other names would have it."""
    spec = importlib.util.spec_from_file_location("private_torch_of_another_release", private.__file__)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_recomputation_is_told_from_a_forward():
    tasks = []

    def forward(x):
        tasks.append(private.backward_task())
        return x.sin()

    checkpoint(forward, torch.ones(2, requires_grad=True), use_reentrant=False).sum().backward()
    assert tasks[0] == -1
    assert tasks[1] != -1


def test_a_transform_and_its_values_are_known():
    known = []
    torch.func.vmap(lambda x: known.append((private.is_transformed(), private.is_wrapped(x))) or x)(torch.ones(2, 3))
    assert known == [(True, True)]
    assert not private.is_transformed()
    assert not private.is_wrapped(torch.ones(2))


def test_the_guard_leaves_inference_mode():
    with torch.inference_mode():
        with private.inference_guard(False):
            assert not torch.ones(1).is_inference()
        assert torch.ones(1).is_inference()


def test_a_version_counts_writes_and_an_inference_tensor_has_none():
    tensor = torch.ones(2)
    before = private.version_of(tensor)
    tensor.add_(1)
    assert private.version_of(tensor) == before + 1
    with torch.inference_mode(), pytest.raises(RuntimeError):
        private.version_of(torch.ones(2))


def test_a_modules_call_can_be_replaced_and_copies_leave_that_out(stack, tokens):
    expected = stack(tokens)
    stack.__dict__[private.CALL] = lambda *args: "replaced"
    assert stack(tokens) == "replaced"
    assert torch.equal(private.own_call(stack)(tokens), expected)
    assert private.CALL not in stack.__getstate__()


def test_a_call_that_is_no_microbatch_is_known():
    assert private.microbatch() is False


def test_the_dictionaries_are_those_that_torch_goes_by():
    layer, ran = nn.Linear(2, 2), []
    handle = layer.register_forward_hook(lambda *_: ran.append("after"))
    before = layer.register_forward_pre_hook(lambda *_: ran.append("before"), with_kwargs=True)
    hooks, flags = private.forward_pre_hooks(layer)
    assert (list(private.forward_hooks(layer)), list(hooks), list(flags)) == ([handle.id], [before.id], [before.id])
    private.forward_hooks(layer).pop(handle.id)
    layer(torch.ones(1, 2))
    assert ran == ["before"]
    layer.register_forward_hook(lambda *_: ran.append("after"), always_call=True, with_kwargs=True)
    private.clear_forward_hooks(layer)
    left = (layer._forward_hooks, layer._forward_hooks_with_kwargs, layer._forward_hooks_always_called)
    assert not any(left)


def test_hooks_of_ours_have_numbers_of_their_own_among_those_that_torch_registers():
    layer, ran = nn.Linear(2, 2), []
    first = layer.register_forward_hook(lambda *_: ran.append("first"))
    with capture(nn.Sequential(layer), "0") as acts:
        (ours,) = set(private.forward_hooks(layer)) - {first.id}
        later = nn.Linear(2, 2).register_forward_hook(lambda *_: None)
        assert first.id < ours < later.id
        nn.Sequential(layer)(torch.ones(1, 2))
        acts.clear()
    assert (list(private.forward_hooks(layer)), ran) == ([first.id], ["first"])


def test_a_class_that_registers_hooks_in_a_way_of_its_own_is_asked_to():
    class Counting(nn.Linear):
        registered = 0

        def register_forward_hook(self, *args, **kwargs):
            self.registered += 1
            return super().register_forward_hook(*args, **kwargs)

    layer = Counting(2, 2)
    model = nn.Sequential(layer)
    with capture(model, "0") as acts:
        model(torch.ones(1, 2))
    assert (layer.registered, len(private.forward_hooks(layer)), acts["0"].shape) == (1, 0, (1, 2))


def test_a_tied_child_has_each_of_its_names_and_a_scripted_module_has_children():
    layer = nn.Linear(2, 2)
    assert private.children_of(nn.Sequential(layer, layer)) == {"0": layer, "1": layer}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scripted = torch.jit.script(nn.Sequential(layer))
    assert list(private.children_of(scripted)) == ["0"]


def test_hooks_on_one_module_and_on_every_module_are_found():
    layer = nn.Linear(2, 2)
    for name, kind in private.HOOK_KINDS.items():
        register = kind.replace("backward", "full backward").replace("-", "_").replace(" ", "_")
        with getattr(layer, f"register_{register}")(print) as handle:
            assert list(private.hooks_in(layer, name)) == [handle.id]
        with getattr(torch_module, f"register_module_{register}")(print) as handle:
            assert list(private.hooks_in(None, name)) == [handle.id]
        assert not private.hooks_in(None, name)


def test_children_are_read_from_any_object_of_a_module_class_without_asking_it():
    class Odd(nn.Sequential):
        def __getattribute__(self, name):
            if name == "_modules":
                raise AssertionError("asked")
            return super().__getattribute__(name)

    odd = Odd.__new__(Odd)
    assert private.children_in(odd) == {}
    vars(odd)["_modules"] = {"0": LAYER}
    assert private.children_in(odd) == {"0": LAYER}


def test_a_module_without_a_forward_is_known():
    assert not private.has_forward(nn.ModuleList())
    assert private.has_forward(nn.Linear(1, 1))


def test_the_compiler_is_known_to_be_loaded(monkeypatch):
    assert compiler.is_compiler_loaded() == ("torch._dynamo" in sys.modules)
    monkeypatch.delitem(sys.modules, "torch._dynamo", raising=False)
    assert not compiler.is_compiler_loaded()


@pytest.mark.parametrize(
    ("owner", "name", "entry"),
    [
        (torch._C, "_current_graph_task_id", "backward_task"),
        (torch._C, "_are_functorch_transforms_active", "is_transformed"),
        (torch._C._functorch, "is_functorch_wrapped_tensor", "is_wrapped"),
    ],
)
def test_a_name_that_is_gone_is_an_error_when_it_is_used(monkeypatch, owner, name, entry):
    monkeypatch.delattr(owner, name)
    use = getattr(loaded_anew(), entry)
    with pytest.raises(UnsupportedTorchError) as caught:
        use(*[torch.ones(1)] * (entry == "is_wrapped"))
    assert caught.value.name.endswith(name)
    assert caught.value.version == torch.__version__
    assert f"torch {torch.__version__} lacks" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "use"),
    [
        ("_forward_hooks", lambda module: module.forward_hooks(LAYER)),
        ("_forward_pre_hooks_with_kwargs", lambda module: module.forward_pre_hooks(LAYER)),
        ("_forward_hooks_always_called", lambda module: module.clear_forward_hooks(LAYER)),
        ("_call_impl", lambda module: module.own_call(LAYER)),
        ("_modules", lambda module: module.children_of(LAYER)),
        ("_backward_hooks", lambda module: module.hooks_in(LAYER, "_backward_hooks")),
        ("_backward_hooks", lambda module: module.hooks_in(None, "_backward_hooks")),
    ],
)
def test_what_modules_lack_is_an_error_when_it_is_used(monkeypatch, name, use):
    class Module:  # of another release
        pass

    for attribute in {*vars(LAYER), "_call_impl", private.CALL} - {name}:
        setattr(Module, attribute, None)
    with monkeypatch.context() as patch:
        patch.setattr(nn, "Module", Module)
        module = loaded_anew()
    with pytest.raises(UnsupportedTorchError, match=rf"^torch .* lacks 'torch\.nn\.Module\.{name}'"):
        use(module)


def test_without_its_mark_for_modules_that_have_no_forward_asking_for_one_is_an_error(monkeypatch):
    monkeypatch.delattr("torch.nn.modules.module._forward_unimplemented")
    with pytest.raises(UnsupportedTorchError, match="_forward_unimplemented"):
        loaded_anew().has_forward(LAYER)


def test_without_versions_of_tensors_asking_for_one_is_an_error(monkeypatch):
    class Tensor:  # of another release
        pass

    with monkeypatch.context() as patch:
        patch.setattr(torch, "Tensor", Tensor)
        module = loaded_anew()
    with pytest.raises(UnsupportedTorchError, match=r"torch\.Tensor\._version"):
        module.version_of(torch.ones(1))


def test_without_its_private_guard_torchs_own_inference_mode_takes_its_place(monkeypatch):
    monkeypatch.delattr(torch._C, "_InferenceMode")
    assert loaded_anew().inference_guard is torch.inference_mode


def test_a_torch_whose_modules_cannot_be_stood_in_for_is_an_error_on_entering_and_leaves_no_hook(monkeypatch):
    model = BlockStack()
    monkeypatch.delattr(nn.Module, private.CALL)
    monkeypatch.setattr("activation_extractor._hooks._forwards.own_call", loaded_anew().own_call)
    with pytest.raises(UnsupportedTorchError, match=r"torch\.nn\.Module\._compiled_call_impl"), capture(model, "h.*"):
        pass
    assert count_hooks(model) == 0


def test_without_a_private_name_the_package_imports_and_capturing_says_what_lacks():
    code = """
        import torch
        from torch import nn
        del torch._C._are_functorch_transforms_active
        from activation_extractor import capture, errors
        model = nn.Sequential(nn.Linear(2, 2))
        try:
            with capture(model, "0", reduce="mean"):
                model(torch.ones(1, 2, 2))
        except errors.UnsupportedTorchError as error:
            assert not model[0]._forward_hooks
            print(error)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True)
    assert "torch " + torch.__version__ in done.stdout, done.stderr


def test_no_other_file_names_what_is_private():
    names = r"torch\._C|_compiled_call_impl|_call_impl|\._version\b|\._forward_(pre_)?hooks|_forward_unimplemented"
    names = re.compile(rf"{names}|\"_(modules|global|forward|backward)|(?<!layers)(?<!self)\._modules\b")
    others = [file for file in PACKAGE.rglob("*.py") if not file.name.startswith("_private_")]
    found = {(file.name, match[0]) for file in others for match in names.finditer(file.read_text(encoding="utf-8"))}
    assert len(others) > 80
    assert found == set()
