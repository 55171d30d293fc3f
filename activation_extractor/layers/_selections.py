"""Which layers are wanted: selections, and their resolution to modules and recorded names."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from difflib import get_close_matches
from typing import Any, Literal

from torch import nn

from activation_extractor._display import shown
from activation_extractor._private_torch import has_forward, version_of
from activation_extractor.errors import ArgumentError, ArgumentTypeError, DuplicateLayerError, LayerNotFoundError
from activation_extractor.layers._modules import WRAPPER_SEGMENTS, ModuleTree, check_hookable
from activation_extractor.layers._patterns import glob

Side = Literal["output", "input", "gradient"]

_SINGLE = (str, bytes, nn.Module, type)  # one selection each, also where it can be iterated over


@dataclass(frozen=True)
class Selection:
    """Layers together with the side of the call that is wanted; made by `outputs`, `inputs` and `gradients`."""

    layers: Any
    side: Side
    select: Any = None

    def __post_init__(self) -> None:
        if not (self.select is None or isinstance(self.select, int | str) or callable(self.select)):
            raise ArgumentTypeError("select", "be an index, a key or a callable", self.select)


def outputs(layers: Any, *, select: Any = None) -> Selection:
    """Record what the layers return.

    Args:
        layers: any selection that `capture` takes.
        select: which part of a structured output: an index, a key (or attribute), or a callable that is given the
            output and returns the part, and may not write to its tensors. Without it the first tensor of the structure
            is recorded.

    Example:
        >>> from torch import nn
        >>> from activation_extractor import capture, outputs
        >>> attention = nn.MultiheadAttention(8, 2)
        >>> wrapped = capture(nn.Sequential(attention), outputs("0", select=1))  # the attention weights
    """
    return Selection(layers, "output", select)


def inputs(layers: Any, *, select: Any = None) -> Selection:
    """Record what the layers are called with, taken before the call; recorded as ``name:input``.

    Args:
        layers: any selection that `capture` takes.
        select: which argument: a position, a name of the layer's signature (keyword arguments count too), or a
            callable that is given the arguments by name. Without it the first tensor is recorded.
    """
    return Selection(layers, "input", select)


def gradients(layers: Any, *, select: Any = None) -> Selection:
    """Record the gradient that backward brings to the layers' output; recorded as ``name:gradient``.

    Backward has to run inside the block. The gradient is the one for the value that the layer returned, also when a
    later in-place op changes that value. A second backward over the same call replaces the first one's gradient.

    Args:
        layers: any selection that `capture` takes.
        select: which part of a structured output, as for `outputs`.
    """
    return Selection(layers, "gradient", select)


@dataclass(slots=True)  # frozen would take three times as long to make; a tuple's names are slower to read
class Target:
    """One thing to record.

    Attributes:
        name: the recorded name, ``h.0``, ``h.0:input``, ``h.0:gradient`` or the user's own.
        layer: the layer's plain name.
        module: the module that is hooked.
        side: which side of its call.
        select: which part of a structured value, or None for its first tensor.
    """

    name: str
    layer: str
    module: nn.Module
    side: Side
    select: Any


def resolve(model: nn.Module, layers: Any) -> tuple[Target, ...]:
    """The targets that a selection means on this model, in the selection's order, patterns in the model's order."""
    tree = ModuleTree(model)
    targets: dict[str, Target] = {}
    literal: set[str] = set()
    for target, is_literal in _expand(tree, layers, "output", None):
        known = targets.setdefault(target.name, target)
        is_known = known is not target
        if is_known and (known.module, known.side, known.select) != (target.module, target.side, target.select):
            reason = f"for two things, of layers {known.layer!r} and {target.layer!r}"
            raise DuplicateLayerError(target.name, reason, "Give one of them another name: {'new name': selection}.")
        if is_literal and target.name in literal:
            raise DuplicateLayerError(target.name, "twice", "Leave one of them out.")
        if is_literal:
            literal.add(target.name)
    if not targets:
        raise ArgumentError("layers", "select at least one layer", layers, "Try blocks(model) or '**'.")
    return tuple(targets.values())


def _expand(tree: ModuleTree, layers: Any, side: Side, select: Any) -> Iterator[tuple[Target, bool]]:
    """Yield each target of a selection, and whether it was named one by one rather than by a pattern."""
    if isinstance(layers, Selection):
        yield from _expand(tree, layers.layers, layers.side, layers.select)
    elif isinstance(layers, _SINGLE) or not isinstance(layers, Iterable):
        matches, is_literal = _match(tree, layers)
        for layer, module in matches:
            check_hookable(layer, module)
            name = layer if side == "output" else f"{layer}:{side}"
            yield Target(name, layer, module, side, select), is_literal
    elif isinstance(layers, Mapping):
        for name, selection in layers.items():
            yield _renamed(tree, name, selection, side, select), True
    else:
        for selection in layers:
            yield from _expand(tree, selection, side, select)


def _renamed(tree: ModuleTree, name: Any, selection: Any, side: Side, select: Any) -> Target:
    if not isinstance(name, str):
        raise ArgumentTypeError("a new name in layers", "be a string", name)
    targets = [target for target, _ in _expand(tree, selection, side, select)]
    if len(targets) != 1:
        reason = f"for {len(targets)} layers selected by {shown(selection)}"
        raise DuplicateLayerError(name, reason, "Give each layer a name of its own.")
    suffix = "" if side == "output" else f":{side}"
    return replace(targets[0], name=name + suffix)


def _match(tree: ModuleTree, selection: Any) -> tuple[list[tuple[str, nn.Module]], bool]:
    """The layers that one selection means, and whether it names a layer rather than describing some."""
    if isinstance(selection, str):
        if (layer := tree.find(selection)) is not None:
            return [layer], True
        if not any(character in selection for character in "*?["):
            raise LayerNotFoundError(selection, get_close_matches(selection, filter(None, tree.modules)))
    is_literal = isinstance(selection, nn.Module)
    names = tree.names_of(selection) if is_literal else _described(tree, selection)
    if not names and is_literal:
        raise LayerNotFoundError(type(selection).__name__, advice="This module is not part of the model.")
    if not names:
        close_matches = get_close_matches(_text(selection), filter(None, tree.modules))
        raise LayerNotFoundError(getattr(selection, "__qualname__", selection), close_matches)
    tree.check(names)
    return [(name, tree.modules[name]) for name in names], is_literal


def _described(tree: ModuleTree, selection: Any) -> list[str]:
    """The names of the layers that fit a description; neither the root nor bare containers."""
    names = [name for name in _fitting(selection, tree.modules) if name and has_forward(tree.modules[name])]
    if not names and any(segment in _text(selection) for segment in ("module", *WRAPPER_SEGMENTS)):
        modules = {full_name: tree.modules[name] for full_name, name in tree.full_names.items() if name}
        full_names = [full_name for full_name in _fitting(selection, modules) if has_forward(modules[full_name])]
        names = list(dict.fromkeys(tree.full_names[full_name] for full_name in full_names))
    return names


def _fitting(selection: Any, modules: Mapping[str, nn.Module]) -> Iterable[str]:
    """The names in `modules` that fit a description."""
    if isinstance(selection, str):
        segments = (segment for segment in selection.split(".") if segment not in WRAPPER_SEGMENTS)
        selection = glob(".".join(segments))
    if isinstance(selection, re.Pattern):
        return filter(selection.fullmatch, modules)
    if isinstance(selection, type):
        if not issubclass(selection, nn.Module):
            raise ArgumentTypeError("a type in layers", "be a subclass of torch.nn.Module", selection)
        return [name for name, module in modules.items() if isinstance(module, selection)]
    if callable(selection):
        return _chosen(modules, selection)
    condition = "be a name, pattern, regex, module, module type, predicate, or an iterable or dict of these"
    raise ArgumentTypeError("layers", condition, selection)


def _chosen(modules: Mapping[str, nn.Module], predicate: Callable[[str, nn.Module], Any]) -> list[str]:
    weights = [weight for module in modules.values() for weight in (*module.parameters(False), *module.buffers(False))]
    versions = [version_of(weight) for weight in weights if not weight.is_inference()]
    named = [(name, module) for name, module in modules.items() if name and has_forward(module)]
    names = [name for name, module in named if predicate(name, module)]
    if versions != [version_of(weight) for weight in weights if not weight.is_inference()]:
        raise ArgumentError("a predicate in layers", "leave the model's weights as they are", predicate)
    return names


def _text(selection: Any) -> str:
    """What a user wrote as a pattern or regex; "" for other selections."""
    text = selection.pattern if isinstance(selection, re.Pattern) else selection
    return text if isinstance(text, str) else ""
