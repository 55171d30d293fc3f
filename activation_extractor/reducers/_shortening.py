"""Masks for layers behind the place where a model shortens its sequence, as speech models do by strided convolutions.

How many positions a row keeps there follows from one of three things, the surest first: the model's own function of
lengths; the sizes of the convolutions and poolings before the layer; the ratio of lengths, where a module merges
positions and each group that is merged is all real or all padding. Each must lead from the whole length of the mask to
that of the activation, and must not be contradicted by its like.
"""

from __future__ import annotations

import re
import weakref
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from activation_extractor.errors import MaskError
from activation_extractor.layers._modules import ModuleTree
from activation_extractor.reducers._lengths import Way, first_positions, kept, own_ways, ways_of_windows, windows_of
from activation_extractor.reducers._mask_fit import is_additive

_MERGES = re.compile("patch_?merg|patchify|(down|sub)_?sampl|shorten", re.IGNORECASE)  # names of modules and classes


class Shortening:
    """How one model shortens its sequence."""

    def __init__(self, model: nn.Module) -> None:
        self._model = weakref.ref(model)  # what is recorded outlives a block, and must not keep the model
        self._ways: dict[tuple[str, str], list[list[Way]]] = {}

    @cached_property
    def _tree(self) -> ModuleTree:
        model = self._model()
        assert model is not None  # it runs
        return ModuleTree(model)

    @cached_property
    def is_possible(self) -> bool:
        """Whether anything in the model tells of a shorter sequence."""
        modules = self._tree.modules.items()
        return any(_is_merging(*named) or own_ways(named[1]) for named in modules) or any(
            window.stride > 1 for window in windows_of(module for _, module in modules)
        )

    def mask(self, layer: str, mask: Any, around: str, shape: tuple[int, int]) -> Tensor | None:
        """The mask of a layer of `shape`, ``(batch, seq)`` bool on the CPU; None if nothing tells it.

        `mask` is one of the positions that the module `around` is called with.

        Raises:
            MaskError: padding is elsewhere than on the right, where only lengths are known.
        """
        batch, seq = shape
        is_mask = isinstance(mask, Tensor) and mask.dim() == 2 and mask.shape[0] == batch
        if not is_mask or not seq or mask.is_meta or bool(is_additive(mask)):
            return None
        is_real = (mask != 0).cpu()
        lengths, full = is_real.sum(1), is_real.shape[1]
        for ways in self._ways_to(layer, around):
            counts = [count for way in ways if (count := kept(way, lengths, full, seq)) is not None]
            if not counts:
                continue
            if not torch.equal(is_real, first_positions(lengths, full)):
                condition = "have its padding on the right, as the model shortens its sequence before this layer"
                advice = "Pad on the right, or pass mask=None if every position is real."
                raise MaskError(condition, "padding elsewhere", advice, layer)
            return first_positions(counts[0], seq) if all(torch.equal(one, counts[0]) for one in counts) else None
        groups = is_real.view(batch, seq, -1) if full % seq == 0 and full > seq else None
        is_uniform = groups is not None and torch.equal(groups.any(2), groups.all(2))
        return groups.any(2) if groups is not None and is_uniform and self._merges(layer, around) else None

    def _ways_to(self, layer: str, around: str) -> list[list[Way]]:
        """Ways to a layer, the surest first; those of one list are alike."""
        if (key := (layer, around)) not in self._ways:
            segments = layer.split(".")
            names = [".".join(segments[:depth]) for depth in range(len(segments), -1, -1)]
            modules = [found[1] for name in dict.fromkeys(names) if (found := self._tree.find(name)) is not None]
            own = [way for module in modules for way in own_ways(module)]
            *before, (_, last) = self._up_to(layer, around)
            windows = ways_of_windows(windows_of(module for _, module in before), windows_of([last]))
            self._ways[key] = [own, *windows]
        return self._ways[key]

    def _merges(self, layer: str, around: str) -> bool:
        """Whether a module up to a layer is called after merging positions."""
        return any(_is_merging(name, module) for name, module in self._up_to(layer, around))

    def _up_to(self, layer: str, around: str) -> list[tuple[str, nn.Module]]:
        """The modules in another one, in their order, from the first one to those in a layer; the layer is the last."""
        found, is_in_layer = [], False
        for name, module in self._tree.modules.items():
            is_below = name.startswith(f"{layer}.") if layer else bool(name)
            if is_in_layer and not is_below:
                break
            is_in_layer = is_in_layer or name == layer
            if name != layer and (not around or name.startswith(f"{around}.")):
                found.append((name, module))
        return [*found, (layer, self._tree.modules[layer])]


def _is_merging(name: str, module: nn.Module) -> bool:
    """Whether a module is called after merging positions."""
    return bool(_MERGES.search(name.rpartition(".")[2]) or _MERGES.search(type(module).__name__))
