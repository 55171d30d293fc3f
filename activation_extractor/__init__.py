"""Activations of any PyTorch model: captured faithfully, reduced where they live, stored safely.

The names below are imported when they are first used, so that importing the package imports no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from activation_extractor.activations import Activations, Capture, Preview, capture, preview
    from activation_extractor.comparison import Comparison, compare
    from activation_extractor.errors import ActivationError
    from activation_extractor.extractors.intermediateExtractor import IntermediateExtractor
    from activation_extractor.extractors.intermediateExtractorBase import IntermediateExtractorBase
    from activation_extractor.layers import blocks, gradients, inputs, outputs
    from activation_extractor.reducers import position
    from activation_extractor.runs import extract, length_batches
    from activation_extractor.sinks import MemorySink, NpySink, NpzSink, SafetensorsSink, Sink
    from activation_extractor.store import Column, Statistics, Store, open_store, statistics

__version__ = "0.1.0"

_HOMES = {
    "ActivationError": "errors",
    "Activations": "activations",
    "Capture": "activations",
    "Column": "store",
    "Comparison": "comparison",
    "IntermediateExtractor": "extractors.intermediateExtractor",
    "IntermediateExtractorBase": "extractors.intermediateExtractorBase",
    "MemorySink": "sinks",
    "NpySink": "sinks",
    "NpzSink": "sinks",
    "SafetensorsSink": "sinks",
    "Sink": "sinks",
    "Preview": "activations",
    "Statistics": "store",
    "Store": "store",
    "blocks": "layers",
    "capture": "activations",
    "compare": "comparison",
    "extract": "runs",
    "gradients": "layers",
    "inputs": "layers",
    "length_batches": "runs",
    "open_store": "store",
    "outputs": "layers",
    "position": "reducers",
    "preview": "activations",
    "statistics": "store",
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
