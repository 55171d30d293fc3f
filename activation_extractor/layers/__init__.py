"""Which layers: names and patterns, the side of a call, a model's repeated blocks."""

from __future__ import annotations

from activation_extractor.layers._blocks import blocks
from activation_extractor.layers._selections import combined, gradients, inputs, outputs

__all__ = ["blocks", "combined", "gradients", "inputs", "outputs"]
