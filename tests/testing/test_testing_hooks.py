"""`assert_no_hooks`."""

from __future__ import annotations

import inspect

import pytest
import torch
from models import BlockStack
from torch import nn
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.utils import prune

from activation_extractor import capture, testing
from activation_extractor.errors import ArgumentTypeError
from activation_extractor.testing import assert_no_hooks


def record(*values: object) -> None:
    """A hook of any kind."""


def text_of(model: nn.Module) -> str:
    with pytest.raises(AssertionError) as caught:
        assert_no_hooks(model)
    return str(caught.value)


def test_a_model_without_hooks_passes() -> None:
    assert_no_hooks(BlockStack())


def test_a_model_with_hooks_fails_with_their_layers_and_sources() -> None:
    model = BlockStack()
    model.h[0].mlp.register_forward_hook(record)
    model.embed.register_full_backward_pre_hook(print)
    text = text_of(model)
    path = f"{__file__.rsplit('/', 2)[1]}/test_testing_hooks.py"
    assert text.startswith(
        "BlockStack must have no hooks, got 2: a backward pre-hook on layer 'embed' (Embedding): 'print', "
        "a forward hook on layer 'h.0.mlp' (Linear): 'record' at "
    )
    line = inspect.getsourcelines(record)[1]
    assert text.endswith(f"{path}:{line}. Remove them with the handle that register_... returned.")


def test_a_hook_on_the_model_itself_is_told_by_its_class() -> None:
    model = BlockStack()
    model.register_forward_pre_hook(print)
    assert "got 1: a forward pre-hook on a BlockStack: 'print'. " in text_of(model)


def test_three_hooks_are_listed_whole() -> None:
    model = BlockStack(3)
    for block in model.h:
        block.register_forward_hook(print)
    text = text_of(model)
    assert text.count("'print'") == 3
    assert "more" not in text


def test_of_many_hooks_three_are_listed_and_the_rest_counted() -> None:
    model = BlockStack(5)
    for block in model.h:
        block.register_forward_hook(print)
    text = text_of(model)
    assert "got 5:" in text
    assert "'h.2' (Block): 'print' and 2 more. Remove" in text
    assert "'h.3'" not in text


def test_the_advice_helps() -> None:
    model = BlockStack()
    handle = model.h[0].register_forward_hook(record)
    assert "Remove them with the handle" in text_of(model)
    handle.remove()
    assert_no_hooks(model)


def test_a_wrapped_model_is_told_by_its_own_name() -> None:
    model = BlockStack()
    model.h[0].register_forward_hook(print)
    text = text_of(torch.compile(model, backend="eager"))
    assert text.startswith("BlockStack must have no hooks, got 1: a forward hook on layer 'h.0' (Block): 'print'.")


def test_a_capture_is_seen_while_it_is_open_and_leaves_nothing() -> None:
    model = BlockStack()
    with capture(model, "h.*", missing="skip"):
        assert "got 4:" in text_of(model)
    assert_no_hooks(model)


def test_torchs_own_hooks_and_hooks_on_every_module_pass() -> None:
    model = nn.Linear(4, 4)
    prune.l1_unstructured(model, "weight", amount=0.5)
    with register_module_forward_hook(record):
        assert_no_hooks(model)


@pytest.mark.parametrize("value", [None, BlockStack, "model", torch.nn.functional.relu])
def test_what_is_no_module_is_refused(value: object) -> None:
    with pytest.raises(ArgumentTypeError, match=r"^model must be a torch\.nn\.Module, got "):
        assert_no_hooks(value)


def test_its_own_frame_is_left_out_of_tracebacks() -> None:
    model = BlockStack()
    model.register_forward_hook(print)
    with pytest.raises(AssertionError) as caught:
        assert_no_hooks(model)
    assert [entry.name for entry in caught.traceback.filter(caught)] == ["test_its_own_frame_is_left_out_of_tracebacks"]


def test_the_public_names_are_there() -> None:
    assert set(testing.__all__) >= {"SinkTests", "Written", "assert_no_hooks"}
    assert all(hasattr(testing, name) for name in testing.__all__)
