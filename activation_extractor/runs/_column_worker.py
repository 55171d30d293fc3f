"""What a worker of an engine holds: a model, built once, and the capture that records it."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from inspect import signature
from typing import Any

from torch import Tensor, nn

from activation_extractor._format._stored_rows import Ragged, RowId
from activation_extractor.activations import capture
from activation_extractor.activations._options import Options
from activation_extractor.errors import ArgumentError
from activation_extractor.layers import blocks
from activation_extractor.layers._modules import evaluating
from activation_extractor.reducers._masks import BatchMask
from activation_extractor.reducers._own_masks import ATTENTION
from activation_extractor.reducers._pooling import take_fields
from activation_extractor.runs._batches import Batch, BatchFields, call_model
from activation_extractor.runs._devices import check_weights, move, without_gradients
from activation_extractor.runs._factories import built, find_object
from activation_extractor.runs._pieces import Pieces
from activation_extractor.sinks import MemorySink
from activation_extractor.sinks._step import Step, join
from activation_extractor.sinks._transfer import Arrival, Transfer

_MOST_MODELS = 2  # that a process holds for `Columns` still to come, beside those that are in use
_MODELS: dict[tuple[str, str], tuple[nn.Module, Any]] = {}
_LOCK = threading.RLock()  # held while a model is built: a factory may use `Columns` itself


@dataclass(frozen=True)
class Recording:
    """What is recorded of a model, and how; it is checked here, without the model.

    Attributes:
        options: those of `capture`: mask, sequence_axis, calls, stop_early.

    Raises:
        ArgumentError: an option has a value that is of no use.
    """

    layers: Any
    reduce: Any
    weights: str | None
    pooling_mask: str | None
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.pooling_mask and self.options["mask"] != ATTENTION:
            raise ArgumentError("mask", "be left out with pooling_mask", self.options["mask"])
        reduce, told = take_fields(self.reduce, self.weights)
        BatchFields(None, (), None, self.pooling_mask, None, told.names)
        others = {name: it.default for name, it in signature(capture).parameters.items() if it.kind is it.KEYWORD_ONLY}
        others = {name: value for name, value in others.items() if name not in ("reduce", "sink", *self.options)}
        Options(reduce=reduce, has_sink=True, **self.options, **others)


class ColumnWorker:
    """Runs batches of an engine through a model. Calls may come from several threads: they take turns.

    A model of our own (`is_ours`), which a factory has built, goes into ``eval()`` for good; any other one is as it was
    after each batch.

    Attributes:
        prepare: what the factory returned beside the model, or None.
    """

    def __init__(self, model: nn.Module, prepare: Any, recording: Recording, device: Any, *, is_ours: bool) -> None:
        check_weights(model)
        self._mode = partial(nullcontext, model.eval()) if is_ours else partial(evaluating, model)
        self.prepare, self._model, self._lock = prepare, model, threading.Lock()
        self._where, self._transfer, self._pieces = move(model, device), Transfer(), Pieces()
        self._without_gradients = without_gradients(model)
        reduce, self._told = take_fields(recording.reduce, recording.weights)
        self._fields = BatchFields(None, (), None, recording.pooling_mask, None, self._told.names)
        self._mask, self._sink = BatchMask(recording.pooling_mask or ""), MemorySink()
        options = {**recording.options, **({"mask": self._mask} if recording.pooling_mask else {})}
        layers = blocks(model) if recording.layers is None else recording.layers
        self._recorded = capture(model, layers, reduce=reduce, sink=self._sink, **options)
        self._has_one_reducer = len(self._recorded._options.reducers) == 1

    def run(self, arguments: Any, ids: list[RowId]) -> dict[str, Tensor | Ragged]:
        """What the layers compute of rows, on the CPU, by the names of columns."""
        batch = replace(self._fields.split(arguments), ids=ids)
        with self._lock:
            try:
                with self._mode(), self._without_gradients, self._recorded as acts:
                    self._pieces.run(batch, lambda piece: self._forward(acts, piece))
                step = join(self._sink.steps)
            finally:
                self._sink.steps.clear()
            return self._columns(step)

    def _forward(self, acts: Any, batch: Batch) -> None:
        self._mask.now = batch.pooling_mask
        self._told.begin(batch.pooling)
        with acts.step(ids=batch.ids):
            call_model(self._model, batch.arguments, self._where)

    def _columns(self, step: Step) -> dict[str, Tensor | Ragged]:
        names = {key: key[0] if self._has_one_reducer else ":".join(key) for key in step.values}
        values = {names[key]: value for key, value in step.values.items()}
        arrival = Arrival()
        tensors = {name: value.values if isinstance(value, Ragged) else value for name, value in values.items()}
        hosts = self._transfer.to_host(tensors, arrival)
        arrival.wait()
        ragged = {
            name: Ragged(hosts[name], value.lengths) for name, value in values.items() if isinstance(value, Ragged)
        }
        return {**hosts, **ragged}


def model_of(model: Any, device: Any) -> tuple[nn.Module, Any]:
    """The model that a factory builds, and what prepares its batches; a process builds it once for each name.

    Raises:
        ArgumentError: it cannot be built.
    """
    if isinstance(model, nn.Module):
        return model, None
    if not isinstance(model, str):
        return built(model, getattr(model, "__qualname__", repr(model)))
    key = model, str(device)
    with _LOCK:
        if key not in _MODELS:
            found = built(find_object("model", model), model)
            while len(_MODELS) >= _MOST_MODELS:
                _MODELS.pop(next(iter(_MODELS)))
            _MODELS[key] = found
        return _MODELS[key]
