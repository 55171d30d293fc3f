"""Activations of any PyTorch model: captured faithfully, reduced where they live, stored safely.

The names below are imported when they are first used, so that importing the package imports no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from activation_extractor._batching import length_batches
    from activation_extractor._blocks import blocks
    from activation_extractor._capture import Capture, capture
    from activation_extractor._compare import compare
    from activation_extractor._comparison import Comparison
    from activation_extractor._extract import extract
    from activation_extractor._layers import gradients, inputs, outputs
    from activation_extractor._preview import Preview, preview
    from activation_extractor._statistics import Statistics, statistics
    from activation_extractor.activations import Activations
    from activation_extractor.errors import ActivationError
    from activation_extractor.extractors.intermediateExtractor import IntermediateExtractor
    from activation_extractor.extractors.intermediateExtractorBase import IntermediateExtractorBase
    from activation_extractor.reducers import position
    from activation_extractor.sinks import MemorySink, NpySink, NpzSink, SafetensorsSink, Sink
    from activation_extractor.store import Column, Store, open_store

__version__ = "0.1.0"

_HOMES = {
    "ActivationError": "errors",
    "Activations": "activations",
    "Capture": "_capture",
    "Column": "store",
    "Comparison": "_comparison",
    "IntermediateExtractor": "extractors.intermediateExtractor",
    "IntermediateExtractorBase": "extractors.intermediateExtractorBase",
    "MemorySink": "sinks",
    "NpySink": "sinks",
    "NpzSink": "sinks",
    "SafetensorsSink": "sinks",
    "Sink": "sinks",
    "Preview": "_preview",
    "Statistics": "_statistics",
    "Store": "store",
    "blocks": "_blocks",
    "capture": "_capture",
    "compare": "_compare",
    "extract": "_extract",
    "gradients": "_layers",
    "inputs": "_layers",
    "length_batches": "_batching",
    "open_store": "store",
    "outputs": "_layers",
    "position": "reducers",
    "preview": "_preview",
    "statistics": "_statistics",
}

__all__ = [
    "ActivationError",
    "Activations",
    "Capture",
    "Column",
    "Comparison",
    "IntermediateExtractor",
    "IntermediateExtractorBase",
    "MemorySink",
    "NpySink",
    "NpzSink",
    "Preview",
    "SafetensorsSink",
    "Sink",
    "Statistics",
    "Store",
    "blocks",
    "capture",
    "compare",
    "extract",
    "gradients",
    "inputs",
    "length_batches",
    "open_store",
    "outputs",
    "position",
    "preview",
    "statistics",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
