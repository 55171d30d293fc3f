"""Whether padding changes what a model computes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from activation_extractor.cli._estimate import Probe
from activation_extractor.cli._feed import Feed

_ROUNDING = {torch.float64: 1e-3, torch.float32: 1e-3}  # of the largest number; a tenth of it in half precision


def padding_note(feed: Feed, run: Probe) -> str | None:
    """What to say where a short row has other activations beside a long one, which pads it, than alone.

    It is so of models that take no notice of their mask, or pool before it counts. A layer whose reducers cannot be
    compared is left out.
    """
    shortest, longest = feed.extremes()
    if not feed.pads or feed.lengths[0] == feed.lengths[1]:
        return None
    try:
        alone, beside = run(feed.batch_of([shortest])), run(feed.batch_of([shortest, longest]))
    except Exception:  # what is wrong is said where all rows are run
        return None
    pairs = [(alone[key], beside[key]) for key in alone]
    worst = max((_difference(left, right) for left, right in pairs), default=0.0)
    if not worst:
        return None
    how = f"by up to {worst:.2g} of the largest number of a row"
    return (
        f"Padding changes what the model computes, {how}: rows depend on their batch. --batch-size 1 runs each alone."
    )


def _difference(alone: Any, beside: Any) -> float:
    """How far the first row of two pooled columns is apart, beside its largest number; 0 where that is rounding."""
    comparable = isinstance(alone, Tensor) and isinstance(beside, Tensor) and alone.shape[1:] == beside.shape[1:]
    if not comparable or not alone.is_floating_point() or alone.is_nested or not len(alone):
        return 0.0
    size = float(alone[0].abs().max())
    apart = float((alone[0] - beside[0]).abs().max()) / size if size else 0.0
    return apart if apart > _ROUNDING.get(alone.dtype, 0.1) else 0.0
