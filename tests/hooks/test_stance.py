"""The compiler's stance is right on every way out, whatever others set meanwhile; and who captures is told, once."""

from __future__ import annotations

import warnings

import pytest
import torch
from compiling import X, make, quiet

from activation_extractor import capture
from activation_extractor.errors import LayerNotRunError

pytestmark = quiet
STANCES = ["default", "eager_on_recompile", "fail_on_recompile", "force_eager"]


def stance():
    return torch._dynamo.eval_frame._stance.stance


def wrapped(model):
    return torch.compile(model, backend="eager")


def in_place(model):
    model.compile(backend="eager")
    return model


def in_part(model):
    model.head = torch.compile(model.head, backend="eager")
    return model


def called_by_a_compiled_function(model):
    return torch.compile(lambda batch: model(batch), backend="eager")


def leave(block):
    """Leave a block; what it says where compiled code ran in it, which calls no hooks."""
    try:
        block.__exit__(None, None, None)
    except LayerNotRunError as error:
        return str(error)
    return ""


@pytest.fixture(autouse=True)
def default_stance():
    torch.compiler.set_stance("default")
    yield
    torch.compiler.set_stance("default")


@pytest.mark.filterwarnings("ignore:.* is compiled, and runs eagerly")
@pytest.mark.parametrize("name", STANCES)
@pytest.mark.parametrize("compile_it", [wrapped, in_place, in_part])
def test_a_stance_that_is_set_in_a_block_and_ends_behind_it_leaves_what_was_there_before(compile_it, name):
    model = make()
    run = compile_it(model)
    run(X)
    with torch.compiler.set_stance("eager_on_recompile"):
        block = capture(model, ["h.0", "head"], calls="all")
        acts = block.__enter__()
        theirs = torch.compiler.set_stance(name)
        returned = run(X)
        text = leave(block)
        assert text or torch.equal(acts["head"][-1], returned)
        assert not text or "the compiler's stance was set inside of the block" in text
        assert stance() == name
        theirs.__exit__(None, None, None)
        assert stance() == "eager_on_recompile"
    assert stance() == "default"


@pytest.mark.filterwarnings("ignore:.* is compiled, and runs eagerly")
@pytest.mark.parametrize("name", STANCES)
def test_a_stance_that_was_set_before_a_block_and_ends_in_it_is_not_put_back(name):
    model = make()
    run = wrapped(model)
    run(X)
    theirs = torch.compiler.set_stance(name)
    block = capture(model, "h.0")
    acts = block.__enter__()
    theirs.__exit__(None, None, None)
    assert stance() == "default"
    run(X)
    block.__exit__(None, None, None)
    assert len(acts) == 1
    assert stance() == "default"


@pytest.mark.parametrize("compile_it", [wrapped, in_place, in_part, called_by_a_compiled_function])
def test_who_captures_a_compiled_model_is_told_once_what_to_do(compile_it):
    model = make()
    run = compile_it(model)
    with (
        pytest.warns(UserWarning, match=r"Stack is compiled, and runs eagerly .* instrument\(model, layers\)"),
        capture(model, "head"),
    ):
        run(X)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with capture(model, "head"):
            run(X)


def test_who_captures_a_model_that_is_not_compiled_is_told_nothing():
    twin, model = make(), make()
    wrapped(twin)(X)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with capture(model, "head", calls="all"):
            model(X)
            torch.compiler.disable(model)(X)
