"""What ``mask=`` may be."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from activation_extractor.errors import ArgumentTypeError
from activation_extractor.reducers._mask_fit import check_form
from activation_extractor.reducers._token_masks import TokenMask


@dataclass(eq=False)
class BatchMask:
    """A mask set anew before each call: `name` is for fingerprints, `now`, ``(batch, seq)``, for the next call.

    One that `is_of_windows` is not shortened with a sequence: how many positions count is known before the call.
    """

    name: str
    now: Tensor | None = None
    is_of_windows: bool = False


def check_mask(mask: Any) -> None:
    """Refuse a ``mask=`` that no model could have.

    Raises:
        ArgumentTypeError: it is of another kind than ``mask=`` takes.
        MaskError: it is a tensor, but no mask ``(batch, seq)`` of zeros and ones.
    """
    if isinstance(mask, Mapping):
        for pattern, source in mask.items():
            if not isinstance(pattern, str) or not (source is None or isinstance(source, str | Tensor | TokenMask)):
                advice = "Write it as {'decoder.**': 'decoder_attention_mask'}."
                condition = "map layer patterns to argument names, tensors or None"
                raise ArgumentTypeError("mask", condition, {pattern: source}, advice)
    elif isinstance(mask, Tensor):
        check_form(mask)
    elif not (mask is None or isinstance(mask, str | BatchMask | TokenMask) or callable(mask)):
        condition = "be an argument's name, a tensor, a dict, a callable (layer, activation, mask) -> mask, or None"
        raise ArgumentTypeError("mask", condition, mask)
