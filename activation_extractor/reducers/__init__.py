"""Reducers: from a layer's activation to the embedding that is kept.

A reducer is any callable ``(activation, mask) -> tensor``. The activation is ``(batch, seq, *features)``. The mask is
``(batch, seq)`` bool on the same device, True at real positions, or None when every position is real. The tensor that a
reducer returns has ``batch`` rows. It runs inside the hook, on the device of the activation.
"""

from __future__ import annotations

from activation_extractor.reducers._pooling import positions, span, weighted_mean
from activation_extractor.reducers._reducers import Reducer, first, full, last, max, mean, position
from activation_extractor.reducers._token_masks import without_tokens

__all__ = [
    "Reducer",
    "first",
    "full",
    "last",
    "max",
    "mean",
    "position",
    "positions",
    "span",
    "weighted_mean",
    "without_tokens",
]
