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
How = Literal["mean", "concat"]

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


@dataclass(frozen=True)
class Combined:
    """Layers whose values are combined as one column; made by `combined`."""

    layers: Any
    how: How


def combined(layers: Any, how: How) -> Combined:
    """Record one value for several layers: their mean, or their features side by side.

    It needs a name: ``{"last_four": combined("encoder.layer.[8-11]", "mean")}``. What is kept, by each reducer, is the
    reduction of the combined activation; only that is handed out and stored. Where a reducer and the combination may
    change places, as the mean over positions with both, each layer is reduced when it runs; for others, as ``full`` or
    a reducer of one's own, each layer's activation is held until all of them have run. In a step that lacks one of the
    layers there is no value.

    Args:
        layers: any selection that `capture` takes, `inputs` and `gradients` too. ``"concat"`` goes in its order, that
            of the model for a pattern.
        how: ``"mean"`` of activations of one shape, accumulated in at least float32, in their dtype; or ``"concat"``
            along the last axis of the features, for activations that differ in nothing else.

    Raises:
        ArgumentError: another `how`.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from activation_extractor import capture, combined
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> with capture(model, {"both": combined(["0", "2"], "concat")}) as acts:
        ...     _ = model(torch.randn(2, 4))
        >>> acts["both"].shape
        torch.Size([2, 11])
    """
    if how not in ("mean", "concat"):
        raise ArgumentError("how of combined", "be 'mean' or 'concat'", how)
    return Combined(layers, how)


@dataclass(frozen=True, eq=False)
class Combination:
    """A column of several layers: its recorded name, and how their values are combined."""

    name: str
    how: How


@dataclass(slots=True)  # frozen would take three times as long to make; a tuple's names are slower to read
class Target:
    """One thing to record.

    Attributes:
        name: the recorded name, ``h.0``, ``h.0:input``, ``h.0:gradient`` or the user's own.
        layer: the layer's plain name.
        module: the module that is hooked.
        side: which side of its call.
        select: which part of a structured value, or None for its first tensor.
        part_of: the column that its values are combined to, if they are.
    """

    name: str
    layer: str
    module: nn.Module
    side: Side
    select: Any
    part_of: Combination | None = None


def resolve(model: nn.Module, layers: Any) -> tuple[Target, ...]:
    """The targets that a selection means on this model, in the selection's order, patterns in the model's order."""
    targets = _united(_expand(ModuleTree(model), layers, "output", None))
    if not targets:
        raise ArgumentError("layers", "select at least one layer", layers, "Try blocks(model) or '**'.")
    columns: dict[str, Any] = {}
    for target in targets.values():
        name, column = (target.name, target) if target.part_of is None else (target.part_of.name, target.part_of)
        if columns.setdefault(name, column) is not column:
            raise DuplicateLayerError(name, "for two things, of which one is combined", "Give one another name.")
    return tuple(targets.values())


def _united(expanded: Iterable[tuple[Target, bool]]) -> dict[str, Target]:
    """Targets by name, where patterns that overlap unite; each comes with whether it was named one by one."""
    targets: dict[str, Target] = {}
    literal: set[str] = set()
    for target, is_literal in expanded:
        known = targets.setdefault(target.name, target)
        is_known = known is not target
        if is_known and (known.module, known.side, known.select) != (target.module, target.side, target.select):
            reason = f"for two things, of layers {known.layer!r} and {target.layer!r}"
            raise DuplicateLayerError(target.name, reason, "Give one of them another name: {'new name': selection}.")
        if is_literal and target.name in literal:
            raise DuplicateLayerError(target.name, "twice", "Leave one of them out.")
        if is_literal:
            literal.add(target.name)
    return targets


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
            if not isinstance(name, str):
                raise ArgumentTypeError("a new name in layers", "be a string", name)
            yield from ((target, True) for target in _named(tree, name, selection, side, select))
    else:
        for selection in layers:
            yield from _expand(tree, selection, side, select)


def _named(tree: ModuleTree, name: str, selection: Any, side: Side, select: Any) -> list[Target]:
    """The target that has a new name, or those that are combined under it, each under one of its own."""
    if not isinstance(selection, Combined):
        return [_renamed(tree, name, selection, side, select)]
    targets = [*_united(_expand(tree, selection.layers, side, select)).values()]
    if not targets:
        raise ArgumentError(f"the layers combined as {name!r}", "be at least one", selection.layers)
    sides = {target.side for target in targets}
    suffix = "" if len(sides) > 1 or "output" in sides else f":{sides.pop()}"
    column = Combination(name + suffix, selection.how)
    return [replace(target, name=f"{column.name}[{target.name}]", part_of=column) for target in targets]


def _renamed(tree: ModuleTree, name: str, selection: Any, side: Side, select: Any) -> Target:
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
    if isinstance(selection, Combined):
        advice = "Write it as {'name': combined(...)}, which may stand in a list, but not in another combined(...)."
        raise ArgumentTypeError("what is combined", "have a name of its own", selection.layers, advice)
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
