"""When a module's calls begin and end."""

from __future__ import annotations

import copy

import pytest
import torch
from models import BlockStack, count_hooks
from torch import nn

from activation_extractor import capture
from activation_extractor._hooks import _context
from activation_extractor._hooks._context import Owner
from activation_extractor._hooks._watched_calls import watch_calls


class Failing(nn.Module):
    def forward(self, x, *, fails=False):
        if fails:
            raise ZeroDivisionError
        return x


def test_a_call_begins_with_its_arguments_and_ends_also_when_it_fails():
    module, owner, seen = Failing(), Owner(), []
    undo = watch_calls(module, owner, lambda args, kwargs: seen.append((args, kwargs)), lambda: seen.append("end"))
    module(1)
    assert seen == []  # the block is not open here
    _context.enter(owner)
    module(1, fails=False)
    with pytest.raises(ZeroDivisionError):
        module(2, fails=True)
    assert seen == [((1,), {"fails": False}), "end", ((2,), {"fails": True}), "end"]
    assert count_hooks(copy.deepcopy(module)) == 0
    undo()
    _context.leave(owner)
    assert count_hooks(module) == 0


def test_a_module_around_a_layer_is_watched_only_where_a_mask_is_asked_for():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.stack = BlockStack()

        def forward(self, tokens):
            return self.stack(tokens, attention_mask=(tokens != 0).long())

    model, tokens = Model(), torch.tensor([[1, 2, 3], [4, 5, 0]])
    with capture(model, "stack.h.1"):
        assert count_hooks(model.stack) == 1  # that of the layer
        model(tokens)
    with capture(model, "stack.h.1", reduce=["full", "mean"]) as acts:
        assert count_hooks(model.stack) == 1 + 4  # two hooks, each with a flag
        model(tokens)
    assert count_hooks(model) == 0
    torch.testing.assert_close(acts["stack.h.1", "mean"][1], acts["stack.h.1", "full"][1, :2].mean(0))
