"""What tests of one's own models and sinks need."""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from activation_extractor._display import examples
from activation_extractor.comparison import compare
from activation_extractor.comparison._compare import Source
from activation_extractor.comparison._match import Match
from activation_extractor.comparison._tolerances import GivenTolerance
from activation_extractor.errors import ArgumentTypeError
from activation_extractor.layers._modules import unwrap
from activation_extractor.testing._hook_leaks import hooks_on


def assert_activations_close(
    left: Source,
    right: Source,
    *,
    match: Match = None,
    rtol: GivenTolerance = None,
    atol: GivenTolerance = None,
    check_dtype: bool | None = None,
) -> None:
    """Fail when two runs differ, with a table of the layers and the first that differs marked.

    The arguments are those of `activation_extractor.compare`.

    Args:
        left: the reference: `Activations`, a `Store`, or a mapping of names to tensors.
        right: `Activations`, a `Store`, or a mapping that is compared with it.
        match: which layers belong together; by default those of one name.
        rtol: the relative tolerance, or one for each layer by pattern.
        atol: the absolute tolerance, or one for each layer by pattern.
        check_dtype: whether another dtype is a difference.

    Raises:
        AssertionError: a layer differs, or one side lacks it.
        MatchError, ArgumentError, OverwrittenError: see `compare`.

    Example:
        >>> import torch
        >>> assert_activations_close({"h.0": torch.ones(2)}, {"h.0": torch.ones(2)})
        >>> assert_activations_close({"h.0": torch.ones(2)}, {"h.0": torch.zeros(2)})
        Traceback (most recent call last):
        AssertionError: The activations differ, first in layer 'h.0'.
        Comparison of 1 layer: 1 differs, first 'h.0' (values)
             layer  max abs  max rel  cosine  dtype    shape  differs in
          >  h.0    1        1        -       float32  (2,)   values
    """
    __tracebackhide__ = True
    comparison = compare(left, right, match=match, rtol=rtol, atol=atol, check_dtype=check_dtype)
    if not comparison:
        text = f"The activations differ, first in layer {comparison.first_difference!r}."
        raise AssertionError(f"{text}\n{comparison!r}")


def assert_no_hooks(model: nn.Module) -> None:
    """Fail when a module of `model` has a hook on its call.

    Hooks that torch itself attached, such as those of weight norm and of pruning, are part of the model and are not
    counted; nor are hooks on every module.

    Args:
        model: the model, in wrappers or not.

    Raises:
        AssertionError: a hook is attached; the text names the layers and where the functions are defined.
        ArgumentTypeError: `model` is no module.

    Example:
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
        >>> handle = model[0].register_forward_hook(print)
        >>> assert_no_hooks(model)
        Traceback (most recent call last):
        AssertionError: Sequential must have no hooks, got 1: a forward hook on layer '0' (Linear): 'print'. Remove ...
        >>> handle.remove()
        >>> assert_no_hooks(model)
    """
    __tracebackhide__ = True
    if not isinstance(model, nn.Module):
        raise ArgumentTypeError("model", "be a torch.nn.Module", model)
    hooks = [replace(hook, model_type=None) for hook in hooks_on(model)]
    if hooks:
        name = type(unwrap(model)).__name__
        advice = "Remove them with the handle that register_... returned."
        raise AssertionError(f"{name} must have no hooks, got {len(hooks)}: {examples(hooks)}. {advice}")
