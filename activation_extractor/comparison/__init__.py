"""Two runs side by side, layer by layer, and the first layer that differs."""

from __future__ import annotations

from activation_extractor.comparison._compare import compare
from activation_extractor.comparison._comparison import Comparison, LayerComparison

__all__ = ["Comparison", "LayerComparison", "compare"]
