"""Reducers: from a layer's activation to the embedding that is kept.

A reducer is any callable ``(activation, mask) -> tensor``. It is given the activation as ``(batch, seq, *features)`` on
its own device, and the mask as ``(batch, seq)`` bool on the same device, True at real positions, or None when every
position is real. What it returns has ``batch`` rows. It runs where the activation lives, inside the hook.
"""

from __future__ import annotations

from activation_extractor.reducers._reducers import Reducer, first, full, last, max, mean, position

__all__ = ["Reducer", "first", "full", "last", "max", "mean", "position"]
