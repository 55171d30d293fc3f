"""The with-block: what is recorded between entering and leaving it, and what it hands out."""

from __future__ import annotations

from activation_extractor.activations._activations import Activations
from activation_extractor.activations._capture import Capture, capture
from activation_extractor.activations._instrument import Instrumented, instrument
from activation_extractor.activations._preview import LayerPreview, Preview, preview

__all__ = ["Activations", "Capture", "Instrumented", "LayerPreview", "Preview", "capture", "instrument", "preview"]
