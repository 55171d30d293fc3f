"""What a mask may hold, and making it fit an activation."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from activation_extractor._tensors import sequence_shape
from activation_extractor.errors import MaskError

# Where a call goes on from a cache of unknown length: the last columns of a longer mask are its own.
LAST = -1


class Check(Protocol):
    """A check whose verdict is computed on a device, and is read when that need not wait for it."""

    verdict: Tensor  # int64

    def settle(self, verdict: Tensor) -> None:
        """Raise the error that a verdict stands for; `verdict` may be a copy on the CPU."""


class MaskCheck:
    """A check of a mask's values, computed on its device: to read them at once makes an accelerator wait.

    Attributes:
        verdict: ``(3,)`` int64 on the mask's device: whether the mask is additive, whether every row has a real
            position, and the first row that has none, if there is one.
    """

    def __init__(self, layer: str, mask: Tensor, is_real: Tensor) -> None:
        has_real = is_real.any(1)
        self._layer = layer
        self.verdict = torch.stack([is_additive(mask), has_real.all(), has_real.int().argmin()])

    def settle(self, verdict: Tensor) -> None:
        """Raise the error that a verdict stands for; `verdict` may be a copy on the CPU.

        Raises:
            MaskError: the mask is additive, or has a row without a real position.
        """
        was_additive, is_whole, row = verdict.tolist()
        if was_additive:
            _refuse_additive(self._layer)
        if not is_whole:
            advice = "Leave empty rows out of the batch, or pass mask=None."
            raise MaskError("have a real position in every row", f"none in row {row}", advice, self._layer)


def check_form(mask: Any) -> None:
    """Refuse a value that is a mask for no activation at all.

    Raises:
        MaskError: it is no tensor ``(batch, seq)``, or additive.
    """
    _check_shape(mask, None)
    if bool(is_additive(mask)):
        _refuse_additive(None)


def fit(
    layer: str, mask: Any, activation: Tensor, *, begins_at: int | None = None, checks: list[MaskCheck] | None = None
) -> Tensor:
    """A mask as ``(batch, seq)`` bool on the device of the activation ``(batch, seq, *features)``.

    The activation may have fewer positions than the mask, those from column `begins_at` on (see
    `CallArguments.begins_at`); a nested one has the first in each row. What is still to be checked of a mask on an
    accelerator is added to `checks`; None checks it at once.

    Raises:
        MaskError: it does not fit; or, unless that is left to `checks`, is additive or has a row without a real
            position.
    """
    _check_shape(mask, layer)
    batch, seq = sequence_shape(activation)
    fitted = mask[:, :seq] if activation.is_nested else own_columns(mask, seq, begins_at)
    if tuple(fitted.shape) != (batch, seq):
        advice = (
            "Pass mask=None if every position is real, or mask=callable(layer, activation, mask) that makes it fit."
        )
        raise MaskError(f"have shape {(batch, seq)}", f"shape {tuple(fitted.shape)}", advice, layer)
    is_real: Tensor = fitted != 0
    if batch and not mask.is_meta:
        check = MaskCheck(layer, mask, is_real)
        if checks is None or mask.device.type == "cpu":
            check.settle(check.verdict)
        else:
            checks.append(check)
    return is_real.to(activation.device)


def own_columns(mask: Tensor, seq: int, begins_at: int | None) -> Tensor:
    """The columns of a longer mask that are a call's own, which begin where `CallArguments.begins_at` says."""
    if begins_at is None or mask.shape[1] <= seq:
        return mask
    return mask[:, begins_at : begins_at + seq] if 0 <= begins_at <= mask.shape[1] - seq else mask[:, -seq:]


def fits(mask: Any, activation: Tensor, *, begins_at: int | None = None) -> bool:
    """Whether a mask has the shape for an activation ``(batch, seq, *features)``."""
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        return False
    batch, seq = sequence_shape(activation)
    may_be_longer = begins_at is not None or activation.is_nested
    return mask.shape[0] == batch and (mask.shape[1] == seq or (may_be_longer and mask.shape[1] > seq))


def is_additive(mask: Tensor) -> Tensor:
    """Whether a mask holds other values than yes and no: a bool tensor on its device."""
    if mask.dtype.is_floating_point:
        return ((mask != 0) & (mask != 1)).any()
    return (mask < 0).any() if mask.dtype.is_signed else mask.new_zeros((), dtype=torch.bool)


def _check_shape(mask: Any, layer: str | None) -> None:
    if not isinstance(mask, Tensor):
        raise MaskError("be a tensor", type(mask).__name__, "Convert it, or pass mask=None.", layer)
    if mask.dim() != 2:
        advice = (
            "Pass mask=None if every position is real, or the two-dimensional mask that the tokenizer made as mask=."
        )
        raise MaskError("have shape (batch, seq)", f"shape {tuple(mask.shape)}", advice, layer)


def _refuse_additive(layer: str | None) -> None:
    advice = "Pass mask=None if every position is real, or the mask of zeros and ones that it was made from as mask=."
    raise MaskError("hold zeros and ones", "an additive mask", advice, layer)
