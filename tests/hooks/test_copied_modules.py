"""Copies and pickles of a model inside a block."""

from __future__ import annotations

import copy
import functools
import io
import pickle

import pytest
import torch
from models import BlockStack, count_hooks

from activation_extractor import capture, gradients, inputs
from activation_extractor._hooks._copied_modules import is_ours, ours


def through_torch_save(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def foreign_hook(module, args, output):
    return output * 2


COPIES = [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model)), through_torch_save]


@pytest.mark.parametrize("copied", COPIES, ids=["deepcopy", "pickle", "torch.save"])
def test_a_copy_carries_none_of_our_hooks_and_all_foreign_ones(stack, tokens, copied):
    stack.h[0].register_forward_hook(foreign_hook)
    with capture(stack, ["h.*", inputs("h.*"), gradients("h.*")], missing="skip") as acts:
        twin = copied(stack)
        assert count_hooks(twin) == 1
        returned = twin(tokens)
        assert len(acts) == 0
    assert torch.equal(returned, stack(tokens))
    assert count_hooks(stack) == 1


def test_a_copy_computes_with_its_own_weights(stack, tokens):
    with capture(stack, "h.*", stop_early=True, missing="skip"):
        twin = copy.deepcopy(stack)
        with torch.no_grad():
            twin.embed.weight.zero_()
            for block in twin.h:
                block.mlp.weight.zero_()
                block.mlp.bias.zero_()
        assert torch.equal(twin(tokens), torch.zeros(2, 5, 8))


def test_a_shallow_copy_of_a_layer_records_nothing(stack, tokens):
    x = stack.embed(tokens)
    with capture(stack, ["h.0", inputs("h.0")], missing="skip") as acts:
        copy.copy(stack.h[0])(x)
    assert len(acts) == 0


def test_a_flag_of_ours_does_not_reach_a_copy_where_a_later_hook_could_take_its_number(stack):
    with capture(stack, inputs("h.0"), missing="skip"):
        twin = copy.deepcopy(stack)
    assert len(twin.h[0]._forward_pre_hooks_with_kwargs) == 0
    assert len(stack.h[0]._forward_pre_hooks_with_kwargs) == 0


def test_nothing_of_ours_stays_on_the_hook_dictionaries_after_the_last_capture(stack):
    outer, inner = capture(stack, inputs("h.0"), missing="skip"), capture(stack, inputs("h.0"), missing="skip")
    hooks = stack.h[0]._forward_pre_hooks
    with outer:
        with inner:
            pass
        assert "__reduce_ex__" in hooks.__dict__
        assert count_hooks(copy.deepcopy(stack)) == 0
    assert hooks.__dict__ == {}
    assert stack.h[0]._forward_pre_hooks_with_kwargs.__dict__ == {}


def test_a_capture_works_on_a_copy_made_inside_another_block():
    model = BlockStack()
    with capture(model, "h.0", missing="skip"):
        twin = copy.deepcopy(model)
    with capture(twin, "h.0") as acts:
        twin(torch.zeros(1, 2, dtype=torch.long))
    assert acts["h.0"].shape == (1, 2, 8)


def test_a_foreign_hook_that_was_made_from_one_of_ours_is_foreign():
    @ours
    def hook(module, args, output):
        return None

    @functools.wraps(hook)
    def wrapping(*args):
        return None

    assert is_ours(hook)
    assert is_ours(hook.__get__(object()))
    assert not is_ours(wrapping)
    assert not is_ours(functools.partial(hook))
