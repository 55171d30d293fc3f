"""Ctrl-C at any line while hooks are taken off: nothing stays on the model."""

from __future__ import annotations

import itertools
import linecache
import sys
from collections.abc import Callable
from functools import partial
from types import CodeType
from typing import Any

import pytest
from models import BlockStack, count_hooks

from activation_extractor import capture, gradients, inputs
from activation_extractor._hooks._compiled_models import eager_stance
from activation_extractor._hooks._context import open_here
from activation_extractor._hooks._taps import detach_all
from activation_extractor.activations import preview

LAYERS = ["h.0", inputs("h.0"), "h.1", gradients("h.1"), "h.2"]


def is_interrupted(number: int, code: CodeType, function: Callable[[], object]) -> bool:
    """Call a function with a KeyboardInterrupt at one line of `code` or of what it calls; False when there is none."""
    lines, depth = itertools.count(), 0

    def trace(frame: Any, event: str, arg: object) -> Any:
        nonlocal depth
        if depth == 0 and frame.f_code is not code:
            return None
        depth += {"call": 1, "return": -1}.get(event, 0)
        # A `with` line comes again before its lock is released, where Python itself does not look for signals.
        is_with = linecache.getline(frame.f_code.co_filename, frame.f_lineno).lstrip().startswith("with ")
        if event == "line" and not is_with and next(lines) == number:
            raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        function()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(before)
    return False


def assert_nothing_is_left(model: BlockStack) -> None:
    assert count_hooks(model) == 0
    assert open_here() == ()
    assert not eager_stance._users
    assert not any(block._forward_hooks.__dict__ or block._forward_pre_hooks.__dict__ for block in model.h)


@pytest.mark.parametrize("options", [{}, {"calls": "all"}], ids=["fast", "general"])
def test_an_interrupt_at_any_line_of_taking_off_leaves_nothing(stack, tokens, options):
    for number in itertools.count(1):  # line 0 is the `try` itself
        block = capture(stack, LAYERS, **options)
        block.__enter__()
        stack(tokens).sum().backward()
        was_interrupted = is_interrupted(number, detach_all.__code__, partial(block.__exit__, None, None, None))
        assert_nothing_is_left(stack)
        if not was_interrupted:
            break
    assert number > 50


def test_an_interrupt_at_any_line_of_a_preview_ending_leaves_nothing(stack, tokens):
    for number in itertools.count(1):
        was_interrupted = is_interrupted(number, detach_all.__code__, partial(preview, stack, LAYERS, tokens))
        assert_nothing_is_left(stack)
        if not was_interrupted:
            break
    assert number > 50


@pytest.mark.parametrize("error", [KeyboardInterrupt, ZeroDivisionError])
def test_what_cannot_be_taken_off_does_not_keep_the_rest_on(error):
    calls = []

    def fails():
        calls.append("fails")
        if calls.count("fails") == 1:
            raise error

    undo = [lambda: calls.append("first"), fails, lambda: calls.append("last")]
    with pytest.raises(error):
        detach_all(undo)
    assert calls[0] == "last"
    assert calls[-1] == "first"
    assert calls.count("fails") == (2 if error is KeyboardInterrupt else 1)
