"""Where finished steps go: memory, or a store that a thread writes while the model goes on."""

from __future__ import annotations

from activation_extractor._format._stored_rows import Ragged
from activation_extractor.sinks._sinks import MemorySink, Sink
from activation_extractor.sinks._step import Step
from activation_extractor.sinks._store_sinks import NpySink, NpzSink, SafetensorsSink, StoreSink

__all__ = ["MemorySink", "NpySink", "NpzSink", "Ragged", "SafetensorsSink", "Sink", "Step", "StoreSink"]
