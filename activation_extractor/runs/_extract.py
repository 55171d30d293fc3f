"""`extract`: a whole data set through a model, into a store."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal, cast

import torch
from torch import nn

from activation_extractor._creation import check_place
from activation_extractor._display import dtype_name
from activation_extractor._format._codecs import CODECS
from activation_extractor._format._fingerprints import structure_digest, weights_digest
from activation_extractor._format._manifest import has_manifest
from activation_extractor.activations import capture
from activation_extractor.activations._options import Missing, Sharded
from activation_extractor.activations._recorded_values import Calls
from activation_extractor.errors import ArgumentError
from activation_extractor.layers._modules import evaluating, unwrap
from activation_extractor.reducers._masks import BatchMask
from activation_extractor.reducers._pooling import take_fields
from activation_extractor.reducers._reducers import resolve_reducers
from activation_extractor.reducers._sequence_axis import SequenceAxes
from activation_extractor.runs._added_rows import AddedRows
from activation_extractor.runs._batches import Batch, BatchFields, Ids, Keep, call_model
from activation_extractor.runs._devices import (
    check_weights,
    in_this_process,
    move,
    stored_elsewhere,
    with_weights,
    without_gradients,
)
from activation_extractor.runs._divided_units import passes_of
from activation_extractor.runs._items import BatchItems, RowItems
from activation_extractor.runs._march import current_march, marching
from activation_extractor.runs._padding import Padding
from activation_extractor.runs._progress import Progress
from activation_extractor.runs._ranks import Sharing
from activation_extractor.runs._run import OnFailure, Run
from activation_extractor.runs._run_arguments import check_arguments, check_masks, checked_share
from activation_extractor.runs._windowed_rows import WindowedRows
from activation_extractor.sinks._store_writer import QUEUE_BYTES
from activation_extractor.store import Store

Format = Literal["safetensors", "npz", "npy"]


@marching
def extract(
    model: nn.Module,
    batches: Iterable[Any],
    layers: Any,
    *,
    out: str | os.PathLike[str],
    reduce: Any = None,
    ids: Ids = None,
    keep: Keep = (),
    order: str | None = None,
    pooling_mask: str | None = None,
    group: str | None = None,
    weights: str | None = None,
    device: Any = None,
    progress: bool | None = None,
    rows_per_unit: int | None = None,
    unit_bytes: int | None = None,
    format: Format = "safetensors",  # noqa: A002 - what everybody calls it
    dtype: torch.dtype | None = None,
    queue_bytes: int = QUEUE_BYTES,
    resume: bool | Literal["full"] = True,
    share: Sharing = "auto",
    append: bool = False,
    on_failure: OnFailure | None = None,
    mask: Any = "attention_mask",
    sequence_axis: SequenceAxes = None,
    calls: Calls = "last",
    stop_early: bool = False,
    missing: Missing = "error",
    sharded: Sharded | None = None,
) -> Store:
    """Run a model over a data set and store what its layers compute.

    The model runs in ``eval()`` and under ``inference_mode``; its training flags are restored. Rows are gathered into
    units, and each unit appears on disk complete or not at all, while the model goes on. When the run fails or is
    killed, the complete units stay and the current one is lost. A batch that does not fit into memory is halved until
    it does; that is said once, and later batches begin at the size that worked.

    Called again with the same arguments, it resumes where it ended. What is stored is compared, not computed: a batch
    of it is run again and compared with what is stored, before anything is written. That finds what no digest sees,
    such as an adapter that is switched off. Another model, other weights, layers, reducers, values or data are an
    error, and the store stays as it is. A model that draws random numbers cannot be resumed. On one machine, with one
    device and the same versions, a run that was interrupted ends in the same bytes as one that was not, if its batches
    are the same; batches of another size give the same rows within rounding, and a warning says so.

    How much of the data set is compared depends on what it costs. Batches with ``__getitem__`` and ``__len__``, and a
    DataLoader over a map-style data set in a fixed order, are asked for those alone that are missing, beside the one
    that is run again: how many rows and batches there are is compared, and the rows of that batch. In a list, and where
    batches come one after the other, the ids of all rows are compared, and for 32 units at equal distances, the first
    and the last among them, a checksum over what the model would be called with (large rows are sampled).
    ``resume="full"`` compares ids and checksums of all units, for which it loads all batches.

    Several processes share a run with `share`. Without it, processes in one folder each compute the units that are not
    there yet when they come to them.

    Where rows cannot be counted before the model runs (several lengths among a batch's arguments, or rows on another
    axis than the first, and no `ids`), a unit is a number of batches: these stay the same, and are not halved.

    Args:
        model: the model.
        batches: an iterable of batches, a DataLoader for example, in the same order each time. A batch is a mapping
            (keyword arguments), a tuple or list (positional arguments) or a tensor. Tensors are moved to the model's
            device. A whole data set in one tensor is cut first: ``x.split(32)``.
        layers: any selection that `capture` takes.
        out: a new or empty folder, or the store of an earlier call with the same arguments; or a place in a bucket,
            ``s3://bucket/name``, also with gs, az or memory.
        reduce: what to keep of an activation, as for `capture`.
        ids: the field of the batches that holds the row ids, its key in a mapping or its position in a tuple; or a
            callable that takes a batch and returns them. Without it rows are numbered. Fields that are named here and
            below are taken out before the model is called.
        keep: fields of the batches to store beside the activations (labels, say), numbers or text. ``keep=1`` stores
            what is second in each tuple, as the kept column ``"1"``.
        order: the field with each row's place in the data set, from 0, for batches that come in another order, as
            `length_batches` makes them: rows are stored in the data set's order.
        pooling_mask: the field with the mask of the positions that reducers use and stores hold, ``(batch, seq)``,
            where it is not the model's own mask: padding and special tokens left out, say. It takes the place of
            `mask`.
        group: the field that says which window of which row each row of a batch is, for rows that are longer than the
            model takes: the `Window` objects of `windows`, or (place of the row in the data set, its number, how many
            windows the row has), as an int tensor ``(rows, 3)`` or triples. Rows are stored, not windows: reducers are
            merged over what `pooling_mask` holds, which is each position of a row in one of its windows. Ids and kept
            columns are those of the row, for each of its windows.
        weights: the field with the weights of positions, ``(batch, seq)``, that ``reduce="weighted_mean"`` takes; see
            `reducers.weighted_mean`. Fields that a reducer names, as ``span("start", "end")`` does, are taken out too.
        device: move the model there first; without it the model stays where it is. A model whose weights are all
            offloaded stays, and its batches go there, unless hooks of accelerate say where it runs.
        progress: a progress bar, which needs tqdm; by default one is shown if tqdm is installed, by the first rank.
        rows_per_unit: how many rows a unit has, the last one fewer; by default a power of two, up to 64 MiB of them and
            at most 4,096.
        unit_bytes: up to how many bytes a unit has, however many rows these are, where `rows_per_unit` is not given. An
            unfinished unit is lost with its process, and `queue_bytes` should hold two. A run that is resumed goes on
            in units of the size that it began with.
        format: of the shards; ``npz`` and ``npy`` hold bfloat16 and float8 as float32.
        dtype: store floating point numbers of activations as ``torch.float16``, ``torch.bfloat16`` or
            ``torch.float32``; None stores them as they were computed. See `StoreSink`.
        queue_bytes: how many bytes units may hold, those that wait to be written and the current one; the model waits
            while there are more. As many again may be on their way to a bucket, up to eight units at a time.
        resume: resume the store in the folder, if there is one; with False the folder must be new or empty. ``"full"``
            compares all of the data, see above.
        share: which part of the run this process does, where others do the rest, each with the same call: ``(rank,
            number of ranks)``; or ``"auto"`` for what torchrun, Slurm or MPI say in environment variables, which is no
            part without them. Unit n belongs to rank n modulo their number. A rank that has none left takes what is
            still missing, and returns the whole store once nothing is: a rank that died need not be started again.
            Batches come from the whole data set on each rank; such as can be asked for by their numbers, see above, are
            loaded by the rank that runs them alone. ``"auto"`` shares nothing where ranks have parts of the data set
            already (a ``DistributedSampler``), with ``resume=False``, and with `append` beside `ids`.
        append: add what is new in a data set that grew: the rows whose ids the store lacks, wherever they stand, behind
            those that it has; their inputs are not compared with what is stored. Without `ids`, the rows behind the
            last one that is stored. A store whose run was interrupted may be added to as well.
        on_failure: called with the id of each row that the model cannot run, or its number, and the exception; the row
            is left out, and the run goes on. A batch that fails is halved until the rows that fail are found. By
            default the exception is raised. It needs rows that can be counted.
        mask: as for `capture`.
        sequence_axis: as for `capture`.
        calls: as for `capture`.
        stop_early: as for `capture`.
        missing: as for `capture`.
        sharded: as for `capture`; where processes share a model it is ``"gather"``.

    Returns:
        The store, opened.

    Raises:
        StoredDtypeError: a finite value is too large for `dtype`.
        ArgumentError: a batch lacks a field, or is none of the above; a random sampler without ids; or see `capture`.
        OtherRunError: the folder holds a store of other arguments or other data, or the model computes other values.
        StoreError: the folder holds something else, an id comes twice, or the disk refuses.

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
    reduce, told = take_fields(reduce, weights)
    fields = BatchFields(ids, keep, order, pooling_mask, group, told.names)
    sizes = {"queue_bytes": queue_bytes, "rows_per_unit": rows_per_unit, "unit_bytes": unit_bytes}
    check_arguments(batches, ids, format, sizes, on_failure, resume=resume, append=append)
    check_masks(mask, pooling_mask, group, calls)
    check_weights(model)
    model, march = in_this_process(model), current_march()
    about = {**fields.fingerprint, **_dtype(dtype), "rows_per_unit": rows_per_unit}
    fingerprint = march.agree(partial(_fingerprint, model, about))
    folder, codec, padding = check_place("out", out), CODECS[format].storing(dtype), Padding(model, mask)
    is_counted = missing == "error" or any(name is not None for name in (ids, order, group))
    items = RowItems(rows_per_unit, padding, group, unit_bytes) if is_counted else BatchItems(rows_per_unit, unit_bytes)
    adds = append and ids is not None and has_manifest(folder)
    kind: Any = AddedRows if adds else partial(Run, resume=bool(resume), may_grow=append)
    how: Any = {"queue_bytes": queue_bytes, "on_failure": on_failure}
    run: Any = march.follower or kind(folder, codec, model, fingerprint, items, **how)
    reducers = resolve_reducers("full" if reduce is None else reduce)
    is_windowed = group and march.leads
    sink = WindowedRows(run, reducers, padding, skips_rows=on_failure is not None) if is_windowed else run
    counted = BatchMask(pooling_mask or "", is_of_windows=group is not None)
    options: Any = {"reduce": reduce, "sequence_axis": sequence_axis, "calls": calls, "stop_early": stop_early}
    options |= {"mask": counted if pooling_mask else mask, "missing": missing, "sharded": march.sharded(sharded)}
    recorded = capture(model, layers, sink=sink, **options)
    part = march.share(checked_share(share, batches, resume=resume, adds=adds), batches)
    passes = passes_of(sink, run, batches, fields, share=part, is_full=resume == "full")
    bar = Progress(passes, progress)
    with _visiting(model):
        where = move(model, device)

    def forward(batch: Batch, is_again: bool) -> None:
        counted.now = batch.pooling_mask
        told.begin(batch.pooling)
        march.send(batch)
        with acts.step(ids=batch.ids, keep=batch.keep):
            call_model(model, batch.arguments, where, copy=is_again)

    with evaluating(model), without_gradients(model), recorded as acts:
        march.follow(forward)
        for item in march.awake(bar):
            batch = fields.split(item)
            sink.add(batch, forward)
            bar.show(run.stored_rows, run.rows, run.nbytes)
        sink.end()
    if not (run.rows + run.stored_rows or has_manifest(folder)):
        raise ArgumentError("batches", "hold at least one row", batches)
    return cast("Store", passes.result(out))  # of `write_unit`, a receipt


def _fingerprint(model: nn.Module, more: Mapping[str, Any]) -> dict[str, Any]:
    """What the values of a run depend on: the weights and the structure of the model, and more."""
    plain = unwrap(model)
    with _visiting(plain):
        return {
            "weights": weights_digest(with_weights(model), stored_elsewhere(plain)),
            "structure": structure_digest(plain),
            **more,
        }


def _dtype(dtype: torch.dtype | None) -> dict[str, str]:
    return {"dtype": dtype_name(dtype)} if dtype else {}


@contextmanager
def _visiting(model: nn.Module) -> Iterator[None]:
    """Refuse a model of which torch's own methods visit the modules without an end."""
    try:
        yield
    except RecursionError:
        condition, advice = "hold no module that holds it in turn", "Keep the parent in a list: self.parent = [parent]."
        raise ArgumentError("model", condition, type(model).__name__, advice) from None
