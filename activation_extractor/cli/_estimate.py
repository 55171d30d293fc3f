"""How much a run is going to write, and whether the folder and the disk can take it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from activation_extractor._display import human_bytes, one_line, plural
from activation_extractor._format._codecs import CODECS, Codec
from activation_extractor._storage import RemotePath
from activation_extractor._tensors import as_dense, rows_of
from activation_extractor.activations import capture
from activation_extractor.cli._feed import Feed
from activation_extractor.cli._fresh import check_replaceable
from activation_extractor.cli._terminal import warn
from activation_extractor.cli._texts import POOLING_MASK
from activation_extractor.errors import ActivationError, ArgumentError, StoreError
from activation_extractor.layers._modules import evaluating
from activation_extractor.runs._batches import call_model
from activation_extractor.runs._devices import move, without_gradients
from activation_extractor.runs._length_batches import WINDOW_ROWS
from activation_extractor.sinks._resume import holds_store
from activation_extractor.sinks._unit_policy import UNIT_BYTES

LEAST_ROWS = 64

Probe = Callable[[dict[str, Any]], Any]


@dataclass(frozen=True)
class Expected:
    """What a run is going to store: names of layers and reducers, and how many rows and bytes.

    Headers, ids and kept columns are not counted; bytes are exact where rows have the shapes that the example had.
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
        return f"Capturing {layers} ({reducers}) for {plural(self.rows, 'row')}: about {human_bytes(self.nbytes)}."


def estimate(
    model: nn.Module,
    feed: Feed,
    layers: Any,
    rows: int,
    *,
    reduce: Any,
    format: str,
    dtype: torch.dtype | None = None,
    stop_early: bool = False,
    pooling_mask: str | None = None,
    mask: Any = "attention_mask",
    sequence_axis: tuple[int, ...] | None = None,
) -> Expected:
    """Run the model on its longest rows, and compute what the whole data set will take; options are those of `extract`.

    Rows that are too long for the memory fail here, before anything is written.

    Raises:
        ArgumentError: the model cannot be run on these rows, or the format lacks the dtype of what is kept.
    """
    run = probe(
        model,
        layers,
        reduce=reduce,
        stop_early=stop_early,
        pooling_mask=pooling_mask,
        mask=mask,
        sequence_axis=sequence_axis,
    )
    acts = _run_longest(model, feed, run)
    pairs = [key if isinstance(key, tuple) else (key, str(reduce[0])) for key in acts]
    sizes = [
        _column_bytes(value, CODECS[format].storing(dtype), rows, feed.positions if reducer == "full" else None)
        for value, (_, reducer) in zip(acts.values(), pairs, strict=True)
    ]
    names, reducers = (list(dict.fromkeys(column)) for column in zip(*pairs, strict=True))
    return Expected(names, reducers, rows, sum(sizes))


def probe(
    model: nn.Module,
    layers: Any,
    *,
    reduce: Any,
    stop_early: bool = False,
    pooling_mask: str | None = None,
    mask: Any = "attention_mask",
    sequence_axis: tuple[int, ...] | None = None,
) -> Probe:
    """What runs the model on a batch and returns what is captured of it, and stores nothing."""

    def run(example: dict[str, Any]) -> Any:
        real = example.pop(POOLING_MASK) if pooling_mask else mask
        recorded = capture(model, layers, mask=real, reduce=reduce, stop_early=stop_early, sequence_axis=sequence_axis)
        with evaluating(model), without_gradients(model), recorded as acts:
            call_model(model, example, move(model, None))
        return acts

    return run


def _run_longest(model: nn.Module, feed: Feed, run: Probe) -> Any:
    """Run a model on its longest rows; its decoder is given a token to begin with, where it needs input of its own."""
    try:
        return run(feed.example())
    except ActivationError:
        raise
    except Exception as error:
        config = getattr(model, "config", None)
        names = ("decoder_start_token_id", "bos_token_id", "pad_token_id")
        token = next((token for name in names if (token := getattr(config, name, None)) is not None), None)
        if not getattr(config, "is_encoder_decoder", False) or not isinstance(token, int):
            raise _refusal(feed, run, error) from error
    feed.start_decoder(token)
    try:
        acts = run(feed.example())
    except ActivationError:
        raise
    except Exception as error:
        raise _refusal(feed, run, error) from error
    warn(f"The decoder is given its first token alone ({token}), since the input is for the encoder.")
    return acts


def _refusal(feed: Feed, run: Probe, error: Exception) -> ArgumentError:
    """Why a model could not be run on its longest rows: their length, if it can be run on the shortest."""
    advice = "Check that --input and --model belong together."
    shortest, longest = feed.lengths
    if shortest < longest:
        with suppress(Exception):
            run(feed.batch_of([feed.extremes()[0]]))
            advice = f"It runs on a row of {shortest} tokens: pass a --max-length below {longest}."
            return ArgumentError("the model", f"run on rows of {longest} tokens", f"{one_line(error):.90}", advice)
    return ArgumentError("the model", "run on rows of the input", f"{one_line(error):.90}", advice)


def check_out(out: Path, codec: Codec, *, resume: bool = True) -> None:
    """Make sure that a run may be stored in a folder, before data and model are read.

    Raises:
        StoreError: it is a file, or holds something else than a store, which the run resumes or else sets aside; or
            shards of this format cannot be written there.
    """
    codec.check_place(out)
    if holds_store(out, may_join=True) and not resume:
        check_replaceable(out)


def check_room(out: Path, nbytes: int, *, resume: bool = True) -> None:
    """Make sure that a disk has room for a run of `nbytes`; what the store holds needs no room again on `resume`.

    A bucket has.

    Raises:
        StoreError: the disk has less room.
    """
    if isinstance(out, RemotePath):
        return
    written = _bytes_in(out) if resume else 0
    missing = max(0, nbytes - written)
    place = next(folder for folder in (out.absolute(), *out.absolute().parents) if folder.is_dir())
    free = shutil.disk_usage(place).free
    if missing > free:
        advice = "Make room, choose another disk, or keep fewer layers or a reducer such as mean."
        raise StoreError(out, f"have room for {human_bytes(missing)}", f"{human_bytes(free)} free", advice)


def _column_bytes(value: Tensor, codec: Codec, rows: int, positions: int | None) -> int:
    """The size in bytes of a column of so many rows in a format, from its values for a few rows.

    Values are ``(batch, *features)``, or ``(batch, seq, *features)`` where all positions are stored; `positions` is
    then how many all rows have, where that is known.
    """
    value = as_dense(value)
    some = rows_of(value)[0] if value.is_nested else value
    item = codec.convert(some.new_zeros(1))
    itemsize = codec.dtype.itemsize if codec.dtype and item.is_floating_point() else item.element_size()
    if value.is_nested:
        return value.numel() * itemsize * rows // value.size(0)
    if positions is not None and value.dim() >= 3:
        return value.numel() * itemsize * positions // max(1, value.shape[0] * value.shape[1])
    return value.numel() * itemsize * rows // max(1, value.shape[0])


def _bytes_in(folder: Path) -> int:
    """The bytes of the files in a folder, of which other processes may remove some meanwhile."""
    nbytes = 0
    for place, _, names in os.walk(folder):
        for name in names:
            with suppress(OSError):
                nbytes += os.lstat(os.path.join(place, name)).st_size
    return nbytes
