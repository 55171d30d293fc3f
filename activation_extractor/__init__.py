"""Activations of any PyTorch model: captured faithfully, reduced where they live, stored safely.

The names below are imported when they are first used, so that importing the package imports no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # `as` tells a type checker that these names are exported
    from activation_extractor.activations import (
        Activations as Activations,
    )
    from activation_extractor.activations import (
        Capture as Capture,
    )
    from activation_extractor.activations import (
        Preview as Preview,
    )
    from activation_extractor.activations import (
        capture as capture,
    )
    from activation_extractor.activations import (
        preview as preview,
    )
    from activation_extractor.comparison import Comparison as Comparison
    from activation_extractor.comparison import compare as compare
    from activation_extractor.errors import ActivationError as ActivationError
    from activation_extractor.extractors.intermediateExtractor import IntermediateExtractor as IntermediateExtractor
    from activation_extractor.extractors.intermediateExtractorBase import (
        IntermediateExtractorBase as IntermediateExtractorBase,
    )
    from activation_extractor.layers import (
        blocks as blocks,
    )
    from activation_extractor.layers import (
        gradients as gradients,
    )
    from activation_extractor.layers import (
        inputs as inputs,
    )
    from activation_extractor.layers import (
        outputs as outputs,
    )
    from activation_extractor.reducers import position as position
    from activation_extractor.runs import extract as extract
    from activation_extractor.runs import length_batches as length_batches
    from activation_extractor.sinks import (
        MemorySink as MemorySink,
    )
    from activation_extractor.sinks import (
        NpySink as NpySink,
    )
    from activation_extractor.sinks import (
        NpzSink as NpzSink,
    )
    from activation_extractor.sinks import (
        SafetensorsSink as SafetensorsSink,
    )
    from activation_extractor.sinks import (
        Sink as Sink,
    )
    from activation_extractor.store import (
        Column as Column,
    )
    from activation_extractor.store import (
        Statistics as Statistics,
    )
    from activation_extractor.store import (
        Store as Store,
    )
    from activation_extractor.store import (
        open_store as open_store,
    )
    from activation_extractor.store import (
        statistics as statistics,
    )

__version__ = "0.1.0"

_ROOMS = {
    "activations": "Activations Capture Preview capture preview",
    "comparison": "Comparison compare",
    "errors": "ActivationError",
    "extractors.intermediateExtractor": "IntermediateExtractor",
    "extractors.intermediateExtractorBase": "IntermediateExtractorBase",
    "layers": "blocks gradients inputs outputs",
    "reducers": "position",
    "runs": "extract length_batches",
    "sinks": "MemorySink NpySink NpzSink SafetensorsSink Sink",
    "store": "Column Statistics Store open_store statistics",
}
_HOMES = {name: room for room, names in _ROOMS.items() for name in names.split()}
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
