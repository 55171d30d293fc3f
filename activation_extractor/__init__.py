"""Activations of any PyTorch model: captured faithfully, reduced where they live, stored safely.

The names below are imported when they are first used, so that importing the package imports no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from activation_extractor.activations import (
        Activations,
        Capture,
        Instrumented,
        Preview,
        capture,
        instrument,
        preview,
    )
    from activation_extractor.comparison import Comparison, compare
    from activation_extractor.errors import ActivationError
    from activation_extractor.extractors.intermediateExtractor import IntermediateExtractor
    from activation_extractor.extractors.intermediateExtractorBase import IntermediateExtractorBase
    from activation_extractor.layers import blocks, combined, gradients, inputs, outputs
    from activation_extractor.reducers import position, positions, span, weighted_mean, without_tokens
    from activation_extractor.runs import Columns, extract, length_batches, plan_units, windows, write_unit
    from activation_extractor.sinks import MemorySink, NpySink, NpzSink, SafetensorsSink, Sink
    from activation_extractor.store import Column, Statistics, Store, export, import_store, open_store, statistics

__version__ = "0.1.0"

_ROOMS = {
    "activations": "Activations Capture Instrumented Preview capture instrument preview",
    "comparison": "Comparison compare",
    "errors": "ActivationError",
    "extractors.intermediateExtractor": "IntermediateExtractor",
    "extractors.intermediateExtractorBase": "IntermediateExtractorBase",
    "layers": "blocks combined gradients inputs outputs",
    "reducers": "position positions span weighted_mean without_tokens",
    "runs": "Columns extract length_batches plan_units windows write_unit",
    "sinks": "MemorySink NpySink NpzSink SafetensorsSink Sink",
    "store": "Column Statistics Store export import_store open_store statistics",
}
_HOMES = {name: room for room, names in _ROOMS.items() for name in names.split()}
__all__ = [
    "ActivationError", "Activations", "Capture", "Column", "Columns", "Comparison", "Instrumented",
    "IntermediateExtractor", "IntermediateExtractorBase", "MemorySink", "NpySink", "NpzSink", "Preview",
    "SafetensorsSink", "Sink", "Statistics", "Store", "blocks", "capture", "combined", "compare", "export", "extract",
    "gradients", "import_store", "inputs", "instrument", "length_batches", "open_store", "outputs", "plan_units",
    "position", "positions", "preview", "span", "statistics", "weighted_mean", "windows", "without_tokens",
    "write_unit",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
