"""Loading a model by a factory of the user's own: every mistake in it is a sentence that keeps its cause."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from activation_extractor.cli._models import load_model
from activation_extractor.errors import ArgumentError, ArgumentTypeError, MissingExtraError

KINDS = "model must be a folder with a config.json, the id of a transformers model, or 'package.module:factory'"


@pytest.fixture
def factories(tmp_path, monkeypatch):
    """Write a module of factories into the current directory; returns its name."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    names = []

    def write(source: str) -> str:
        names.append(f"factories_{len(names)}_{tmp_path.name.replace('-', '_')}")
        Path(f"{names[-1]}.py").write_text(source)
        return names[-1]

    yield write
    for name in names:
        sys.modules.pop(name, None)


def test_a_factory_in_the_current_directory_gives_a_model_with_or_without_prepare(factories):
    source = "from torch import nn\ndef build(): return nn.Linear(2, 3).train()\ndef both(): return build(), list\n"
    name = factories(source)
    alone, both = load_model(f"{name}:build"), load_model(f"{name}:both")
    assert isinstance(alone.model, nn.Linear)
    assert not alone.model.training
    assert (alone.prepare, both.prepare) == (None, list)
    assert alone.name == f"{name}:build"


@pytest.mark.parametrize("name", [":", "a:", ":b", "a:b c", "a-b:c", "http://x"])
def test_what_cannot_be_a_factory_is_refused(name):
    with pytest.raises(ArgumentError) as caught:
        load_model(name)
    assert str(caught.value) == f"{KINDS}, got {name!r}."


def test_a_module_that_cannot_be_imported_is_an_error_that_says_which_import_failed(factories):
    name = factories("import no_such_package.inner\n")
    with pytest.raises(ArgumentError) as caught:
        load_model(f"{name}:build")
    assert str(caught.value) == (
        f"model must name a module that can be imported, got '{name}:build'. "
        "ModuleNotFoundError: No module named 'no_such_package'."
    )
    assert isinstance(caught.value.__cause__, ModuleNotFoundError)
    with pytest.raises(ArgumentError, match="SyntaxError: "):
        load_model(f"{factories('def build(:')}:build")


def test_an_attribute_error_of_the_module_itself_is_no_mistyped_factory(factories):
    with pytest.raises(ArgumentError, match="must name a module that can be imported.* AttributeError: 'int' object"):
        load_model(f"{factories('(3).build')}:build")


def test_a_factory_may_be_a_method_of_a_class(factories):
    source = "from torch import nn\nclass Models:\n    @staticmethod\n    def small(): return nn.ReLU()\n"
    assert isinstance(load_model(f"{factories(source)}:Models.small").model, nn.ReLU)


def test_a_mistyped_factory_is_an_error_with_close_matches(factories):
    name = factories("def build(): pass\n")
    with pytest.raises(ArgumentError) as caught:
        load_model(f"{name}:biuld")
    assert str(caught.value) == (
        f"model must name something that {name!r} holds, got '{name}:biuld'. Close matches: 'build'."
    )


def test_a_factory_that_raises_is_an_error_that_keeps_the_cause(factories):
    name = factories("def build(): raise KeyError('weights')\ndef needs(path): pass\n")
    with pytest.raises(ArgumentError) as caught:
        load_model(f"{name}:build")
    assert str(caught.value) == (
        f"model must name a factory that runs, got '{name}:build'. It raised KeyError: 'weights'."
    )
    assert isinstance(caught.value.__cause__, KeyError)
    with pytest.raises(ArgumentError, match="It raised TypeError: needs.. missing 1 required positional argument"):
        load_model(f"{name}:needs")


def test_an_error_of_ours_in_a_factory_comes_through_as_it_is(factories):
    source = "from activation_extractor.errors import MissingExtraError\n"
    name = factories(source + "def build(): raise MissingExtraError('It', 'demo', 'wheel')\n")
    with pytest.raises(MissingExtraError, match="^It needs "):
        load_model(f"{name}:build")


def test_a_factory_must_be_called_and_return_a_model(factories):
    name = factories(
        "from torch import nn\nmodel = nn.Linear(2, 2)\ndef build(): return 3\ndef both(): return model, 3\n"
    )
    with pytest.raises(ArgumentError, match=r"must name a function that returns the model, got .*\. It is a Linear\.$"):
        load_model(f"{name}:model")
    with pytest.raises(ArgumentTypeError, match=r"^what '.*:build' returns must be a torch.nn.Module, or .*, got 3\.$"):
        load_model(f"{name}:build")
    with pytest.raises(ArgumentTypeError, match=r"^what '.*:both' returns must be a torch.nn.Module"):
        load_model(f"{name}:both")


@pytest.mark.parametrize("dtype", [None, "auto", "float32", "bfloat16", "float16"])
def test_the_dtype_is_the_one_that_was_asked_for(factories, dtype):
    name = factories("from torch import nn\nbuild = lambda: nn.Linear(2, 2)\n")
    expected = torch.float32 if dtype in (None, "auto") else getattr(torch, dtype)
    assert load_model(f"{name}:build", dtype=dtype).model.weight.dtype == expected


def test_a_wrong_dtype_or_device_is_an_error_that_names_the_options():
    with pytest.raises(ArgumentError, match=r"^dtype must be one of 'auto', 'float32', .*, 'float16', got 'int8'\.$"):
        load_model("torch.nn:ReLU", dtype="int8")
    for device in ("kuda", "meta", "cpu:x", 3.5):
        with pytest.raises(ArgumentError, match=r"^device must be one of 'cpu'.*, got "):
            load_model("torch.nn:ReLU", device=device)
    assert isinstance(load_model("torch.nn:ReLU", device="cpu").model, nn.ReLU)
