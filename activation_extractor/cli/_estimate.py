"""How much a run is going to write, and whether there is room for it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from activation_extractor._display import human_bytes
from activation_extractor._format._codecs import CODECS
from activation_extractor._format._shards import SHARDS
from activation_extractor.activations import capture
from activation_extractor.cli._feed import POOLING_MASK, Feed
from activation_extractor.errors import ActivationError, ArgumentError, StoreError
from activation_extractor.layers._modules import evaluating
from activation_extractor.runs._batches import call_model
from activation_extractor.runs._length_batches import WINDOW_ROWS
from activation_extractor.sinks._unit_policy import UNIT_BYTES

LEAST_ROWS = 64
_LONGEST = 90  # characters of an error that are shown


@dataclass(frozen=True)
class Expected:
    """What a run is going to store.

    Attributes:
        layers: the recorded names.
        reducers: the reducers' names.
        rows: how many rows.
        nbytes: how many bytes, but for headers, ids and kept columns; exact where rows have the shapes that the
            example had.
    """

    layers: Sequence[str]
    reducers: Sequence[str]
    rows: int
    nbytes: int

    @property
    def unit_rows(self) -> int:
        """How many rows make a unit that is not too large to hold, nor too much work to lose."""
        return max(LEAST_ROWS, min(WINDOW_ROWS, UNIT_BYTES * self.rows // max(1, self.nbytes)))

    def __str__(self) -> str:
        first, last, count = self.layers[0], self.layers[-1], len(self.layers)
        layers = f"{first!r}" if count == 1 else f"{count} layers, {first!r} to {last!r}"
        reducers = ", ".join(self.reducers)
        return f"Capturing {layers} ({reducers}) for {self.rows:,} rows: about {human_bytes(self.nbytes)}."


def estimate(
    model: nn.Module,
    feed: Feed,
    layers: Any,
    rows: int,
    *,
    reduce: Any,
    format: str,
    stop_early: bool = False,
    pooling_mask: str | None = None,
    sequence_axis: tuple[int, ...] | None = None,
) -> Expected:
    """Run the model on a few rows and tell what the whole data set would take.

    Args:
        model: the model.
        feed: its batches.
        layers: as for `extract`.
        rows: how many rows there are.
        reduce: as for `extract`.
        format: as for `extract`.
        stop_early: as for `extract`.
        pooling_mask: as for `extract`.
        sequence_axis: as for `extract`.

    Raises:
        ArgumentError: the model cannot be run on these rows.
    """
    options: dict[str, Any] = {"reduce": reduce, "stop_early": stop_early, "sequence_axis": sequence_axis}
    with _telling():
        example = feed.example()
        mask = example.pop(POOLING_MASK) if pooling_mask else "attention_mask"
        recorded = capture(model, layers, mask=mask, **options)
        with evaluating(model), torch.inference_mode(), recorded as acts:
            call_model(model, example)
    names = list(acts)
    pairs = [name if isinstance(name, tuple) else (name, str(reduce[0])) for name in names]
    converted = [_stored_bytes(acts[name], format) for name in names]
    sizes = [
        _whole(acts[name], nbytes, reducer, rows, feed.lengths)
        for name, nbytes, (_, reducer) in zip(names, converted, pairs, strict=True)
    ]
    layer_names, reducers = (list(dict.fromkeys(column)) for column in zip(*pairs, strict=True))
    return Expected(layer_names, reducers, rows, sum(sizes))


def check_room(out: Path, nbytes: int, *, resume: bool = True) -> None:
    """Make sure that a disk has room for a run.

    Args:
        out: the store; what is there of it counts as written.
        nbytes: how many bytes the run is going to have written.
        resume: whether it goes on with what is there.

    Raises:
        StoreError: it has not.
    """
    there = sum(path.stat().st_size for path in (out / SHARDS).rglob("*") if path.is_file()) if resume else 0
    missing = max(0, nbytes - there)
    place = next(folder for folder in (out.absolute(), *out.absolute().parents) if folder.is_dir())
    free = shutil.disk_usage(place).free
    if missing > free:
        advice = "Make room, choose another disk, or keep fewer layers or a reducer such as mean."
        raise StoreError(out, f"have room for {human_bytes(missing)}", f"{human_bytes(free)} free", advice)


@contextmanager
def _telling() -> Iterator[None]:
    """What goes wrong with the first rows is most often that they are none for this model."""
    try:
        yield
    except ActivationError:
        raise
    except Exception as error:
        got = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        advice = "Check that --input and --model belong together."
        raise ArgumentError("the model", "run on the first rows of the input", got[:_LONGEST], advice) from error


def _stored_bytes(value: Tensor, format: str) -> int:
    """The size of a value as the format stores it."""
    return value.numel() * CODECS[format].convert(value.new_empty(0)).element_size()


def _whole(value: Tensor, nbytes: int, reducer: str, rows: int, lengths: Sequence[int] | None) -> int:
    """What a column takes of which a few rows take so many bytes."""
    if reducer == "full" and lengths is not None and value.dim() >= 3:
        return nbytes * sum(lengths) // max(1, value.shape[0] * value.shape[1])
    return nbytes * rows // max(1, value.shape[0])
