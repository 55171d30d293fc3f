"""`extract`: a whole data set through a model, into a store."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from activation_extractor._capture import capture
from activation_extractor._kept import Calls
from activation_extractor._options import Missing
from activation_extractor._progress import Progress
from activation_extractor.errors import ArgumentError, ArgumentTypeError
from activation_extractor.sinks import SafetensorsSink
from activation_extractor.store import Store, open_store


def extract(
    model: nn.Module,
    batches: Iterable[Any],
    layers: Any,
    *,
    out: str | os.PathLike[str],
    reduce: Any = None,
    ids: str | None = None,
    keep: Iterable[str] = (),
    device: Any = None,
    progress: bool | None = None,
    rows_per_unit: int | None = None,
    mask: Any = "attention_mask",
    sequence_axis: int | tuple[int, ...] | None = None,
    calls: Calls = "last",
    stop_early: bool = False,
    missing: Missing = "error",
) -> Store:
    """Run a model over a data set and store what its layers compute.

    The model runs in ``eval()`` and under ``inference_mode``; its training flags are restored. Steps are gathered
    into units of whole batches, and each unit appears on disk complete or not at all. When the run fails, the units
    that are complete stay and the one under way is dropped.

    Args:
        model: the model.
        batches: an iterable of batches, a DataLoader for example. A batch is a mapping (keyword arguments), a tuple
            or list (positional arguments) or a tensor. Tensors are moved to the model's device.
        layers: any selection that `capture` takes.
        out: a new or empty folder.
        reduce: what to keep of an activation, as for `capture`.
        ids: the entry of the batches that holds the row ids; it is taken out before the call. Without it rows are
            numbered.
        keep: entries to take out of the batches and store beside the activations (labels, say).
        device: move the model there first; without it the model stays where it is.
        progress: a progress bar, which needs tqdm; by default one is shown if tqdm is installed.
        rows_per_unit: rows a unit at least has, rounded up to whole batches; by default units have about 64 MiB.
        mask: as for `capture`.
        sequence_axis: as for `capture`.
        calls: as for `capture`.
        stop_early: as for `capture`.
        missing: as for `capture`.

    Returns:
        The store, opened.

    Raises:
        ArgumentError: a batch lacks the ids or a kept entry, or is none of the above; or see `capture`.
        StoreError: the folder holds something, an id comes twice, or the disk refuses.

    Example:
        >>> import tempfile, torch
        >>> from torch import nn
        >>> from activation_extractor import extract
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU())
        >>> batches = [{"input": torch.randn(2, 4), "id": ["a", "b"]}]
        >>> store = extract(model, batches, "*", out=tempfile.mkdtemp(), ids="id", progress=False)
        >>> store["1"].shape
        (2, 8)
    """
    taken = _check_entries(ids, keep)
    if not isinstance(batches, Iterable):
        raise ArgumentTypeError("batches", "be an iterable of batches", batches)
    sink = SafetensorsSink(out, about={"model": type(model).__name__}, rows_per_unit=rows_per_unit)
    recorded = capture(
        model,
        layers,
        reduce=reduce,
        sink=sink,
        mask=mask,
        sequence_axis=sequence_axis,
        calls=calls,
        stop_early=stop_early,
        missing=missing,
    )
    bar = Progress(batches, progress)
    if device is not None:
        model.to(device)
    start = time.monotonic()
    with _evaluating(model), torch.inference_mode(), recorded as acts, _whole_units(sink):
        for batch in bar:
            arguments, entries = _split(batch, taken)
            row_ids = entries.pop(ids) if ids is not None else None
            with acts.step(ids=row_ids, keep=entries):
                _call(model, arguments)
            bar.show(sink.rows, sink.nbytes, time.monotonic() - start)
    if sink.rows == 0:
        raise ArgumentError("batches", "hold at least one row", batches)
    return open_store(out)


def _check_entries(ids: Any, keep: Any) -> list[str]:
    if ids is not None and not isinstance(ids, str):
        raise ArgumentTypeError("ids", "name an entry of the batches", ids)
    names = [keep] if isinstance(keep, str) else list(keep) if isinstance(keep, Iterable) else [keep]
    if not all(isinstance(name, str) for name in names):
        raise ArgumentTypeError("keep", "name entries of the batches", keep)
    return [*([ids] if ids is not None else []), *names]


def _split(batch: Any, taken: list[str]) -> tuple[Any, dict[str, Any]]:
    """The arguments of a batch, and the entries that are taken out of it."""
    if not isinstance(batch, Mapping):
        if taken:
            raise ArgumentTypeError("a batch with ids or keep", "be a mapping", type(batch).__name__)
        return batch, {}
    absent = [name for name in taken if name not in batch]
    if absent:
        raise ArgumentError("a batch", f"hold the entry {absent[0]!r}", list(batch), "Check ids= and keep=.")
    arguments = {name: value for name, value in batch.items() if name not in taken}
    return arguments, {name: batch[name] for name in taken}


def _call(model: nn.Module, batch: Any) -> None:
    place = next((tensor.device for tensor in (*model.parameters(), *model.buffers())), None)

    def moved(value: Any) -> Any:
        return value.to(place) if isinstance(value, Tensor) and place is not None else value

    if isinstance(batch, Mapping):
        model(**{name: moved(value) for name, value in batch.items()})
    elif isinstance(batch, tuple | list):
        model(*map(moved, batch))
    elif isinstance(batch, Tensor):
        model(moved(batch))
    else:
        raise ArgumentTypeError("a batch", "be a mapping, a tuple or a tensor", type(batch).__name__)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """The model in ``eval()``; afterwards each module's training flag as it was."""
    flags = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, flag in flags:
            module.training = flag


@contextmanager
def _whole_units(sink: SafetensorsSink) -> Iterator[None]:
    try:
        yield
    except BaseException:
        sink.drop_unit()
        raise
