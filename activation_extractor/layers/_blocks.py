"""Finding the repeated block stacks of a model."""

from __future__ import annotations

from collections import Counter

from torch import nn

from activation_extractor._private_torch import children_of
from activation_extractor.errors import ArgumentError
from activation_extractor.layers._modules import ModuleTree, check_model, unwrap

_MAIN_SHARE = 0.1  # of the parameters of the largest group of stacks


def blocks(model: nn.Module) -> list[str]:
    """The names of the repeated blocks of a model, in its order.

    A stack is a module whose children are mostly of one type and have parts of their own (``encoder.layer``, ``h``,
    ``layers``, a ResNet's ``layer1``). The outermost stacks count, not the ones inside their blocks. Stacks under one
    parent stay together; a parent whose stacks hold less than a tenth of the parameters that another's hold (the
    convolutions in front of an audio encoder) is left out. Without such stacks, children without parts count too.

    Args:
        model: any model, wrapped or not.

    Raises:
        ArgumentTypeError: `model` is not a module.
        ArgumentError: nothing repeats in it.

    Example:
        >>> from torch import nn
        >>> from activation_extractor import blocks
        >>> layer = nn.TransformerEncoderLayer(8, 2, batch_first=True)
        >>> blocks(nn.TransformerEncoder(layer, 3))
        ['layers.0', 'layers.1', 'layers.2']
    """
    tree = ModuleTree(check_model(model))
    stacks = _outermost(tree, composite=True) or _outermost(tree, composite=False)
    if not stacks:
        kind, advice = type(tree.modules[""]).__name__, "Name the layers, or select them by type."
        raise ArgumentError("model", "hold a stack of repeated blocks", kind, advice)
    parents = {stack: stack.rpartition(".")[0] for stack in stacks}
    sizes: Counter[str] = Counter()
    for stack, parent in parents.items():
        sizes[parent] += 1 + sum(parameter.numel() for parameter in tree.modules[stack].parameters())
    smallest = _MAIN_SHARE * max(sizes.values())
    return [
        f"{stack}.{segment}" if stack else segment
        for stack, parent in parents.items()
        if sizes[parent] >= smallest
        for segment, child in children_of(tree.modules[stack]).items()
        if child is not None
    ]


def _outermost(tree: ModuleTree, *, composite: bool) -> list[str]:
    stacks: list[str] = []
    for name, module in tree.modules.items():
        is_inside = any(name.startswith(f"{stack}.") or stack == "" for stack in stacks)
        if not is_inside and _is_stack(module, composite=composite):
            stacks.append(name)
    return stacks


def _is_stack(module: nn.Module, *, composite: bool) -> bool:
    """Whether a module is a list with a type of child twice, or a sequence with each type twice on average.

    With `composite` its children must have children.
    """
    children = [unwrap(child) for child in children_of(module).values() if child is not None]
    if not isinstance(module, nn.ModuleList | nn.ModuleDict | nn.Sequential) or len(children) < 2:
        return False
    if composite and not all(any(True for _ in child.children()) for child in children):
        return False
    types = len({type(child) for child in children})
    return types < len(children) if isinstance(module, nn.ModuleList) else 2 * types <= len(children)
