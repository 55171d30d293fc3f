"""Ways from how many positions a row has to how many it keeps where a model shortens its sequence."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

# From the real positions of each row, ``(batch,)`` on the CPU, the length of the mask and that of the layer.
Way = Callable[[Tensor, int, int], Any]

# What models of transformers call their own functions of lengths, and of masks.
_OF_LENGTHS = (
    "_get_feat_extract_output_lengths",
    "_get_subsampling_output_length",
    "_get_output_lengths",
    "_get_output_length",
)
_OF_MASKS = ("_compute_sub_sample_lengths_from_attention_mask",)
_OF_MASKS_AND_LENGTH = ("_get_feature_vector_attention_mask",)


def first_positions(lengths: Tensor, seq: int) -> Tensor:
    """A mask ``(batch, seq)`` in which so many positions of each row are real, from the left."""
    return torch.arange(seq) < lengths[:, None]


def kept(way: Way, lengths: Tensor, full: int, seq: int) -> Tensor | None:
    """How many positions each row keeps; None where the way does not lead from the length `full` to `seq`."""
    with suppress(Exception):  # a model's own function may be about something else
        whole, *rows = way(torch.cat([torch.tensor([full]), lengths]), full, seq).to(torch.int64).tolist()
        if whole == seq and len(rows) == len(lengths):
            return torch.tensor(rows)
    return None


# -- what a model says ------------------------------------------------------------------------------------------------


def own_ways(module: nn.Module) -> list[Way]:
    """What the functions of a model say of lengths, with each of their options and results."""
    ways: list[Way] = []
    for name in _OF_LENGTHS:
        if callable(function := getattr(module, name, None)):
            ways += [
                partial(_of_lengths, function, options, index) for options in _options(function) for index in (0, 1)
            ]
    if not ways:
        ways += [partial(_of_mask, function) for name in _OF_MASKS if callable(function := getattr(module, name, None))]
        for name in _OF_MASKS_AND_LENGTH:
            if callable(function := getattr(module, name, None)):
                ways.append(partial(_of_mask_and_length, function))
    squeeze = getattr(getattr(module, "config", None), "squeeze_factor", None)
    if isinstance(squeeze, int) and squeeze > 1:  # SEW: pooled before its blocks, and stretched behind them
        ways += [partial(_squeezed, way, squeeze, factor) for way in ways for factor in (1, squeeze)]
    return ways


def _options(function: Any) -> list[dict[str, bool]]:
    """Without and with the adapter that some speech models have behind their encoder."""
    has_adapter = "add_adapter" in inspect.signature(function).parameters
    return [{"add_adapter": False}, {"add_adapter": True}] if has_adapter else [{}]


def _of_lengths(function: Any, options: dict[str, bool], index: int, lengths: Tensor, full: int, seq: int) -> Any:
    made = function(lengths, **options)
    return made[index] if isinstance(made, tuple) else made if index == 0 else None


def _of_mask(function: Any, lengths: Tensor, full: int, seq: int) -> Any:
    return function(first_positions(lengths, full).long())


def _of_mask_and_length(function: Any, lengths: Tensor, full: int, seq: int) -> Any:
    return function(seq, first_positions(lengths, full).long()).sum(1)


def _squeezed(way: Way, squeeze: int, factor: int, lengths: Tensor, full: int, seq: int) -> Any:
    return way(lengths, full, seq) // squeeze * factor


# -- what convolutions and poolings say -------------------------------------------------------------------------------


class Window(NamedTuple):
    """A convolution or pooling over time: a window of so many positions, its stride, positions added on both sides."""

    size: int
    stride: int
    added: int

    @property
    def keeps(self) -> bool:
        """Whether it is padded so that it keeps lengths, or adds one position, which is cut off again."""
        return self.stride == 1 and self.added > 0 and self.added - self.size in (-1, 0)


def windows_of(modules: Iterable[nn.Module]) -> list[Window]:
    """The windows over time of these modules, in their order."""
    return [window for module in modules if (window := _window(module)) is not None]


def ways_of_windows(before: list[Window], own: list[Window]) -> Iterator[list[Way]]:
    """Through the windows before a layer and its own: with those that keep lengths, then as all of them are."""
    padded = [window for window in before if not window.keeps] + own
    strided = [window for window in before if window.stride > 1] + own  # where others are padded by hand
    if any(window.stride > 1 for window in padded):
        yield [partial(_through, padded), partial(_through, strided)]
        yield [partial(_through, before + own)]


def _through(windows: list[Window], lengths: Tensor, full: int, seq: int) -> Tensor:
    for window in windows:
        lengths = (lengths + window.added - window.size).div(window.stride, rounding_mode="floor") + 1
    return lengths.clamp(min=0)


def _window(module: nn.Module) -> Window | None:
    if not isinstance(module, nn.Conv1d | nn.MaxPool1d | nn.AvgPool1d) or getattr(module, "ceil_mode", False):
        return None
    size, stride, padding, dilation = (
        int(value[0] if isinstance(value, tuple) else value)
        for value in (
            module.kernel_size,
            module.stride,
            0 if isinstance(module.padding, str) else module.padding,
            getattr(module, "dilation", 1),
        )
    )
    reach = dilation * (size - 1) + 1
    return Window(reach, stride, reach - 1 if module.padding == "same" else 2 * padding)
