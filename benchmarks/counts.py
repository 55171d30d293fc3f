"""What is counted rather than timed: bytes that a disk reads, and memory that a run holds."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from activation_extractor import SafetensorsSink, capture
from activation_extractor.sinks._store_writer import QUEUE_BYTES
from benchmarks import inputs, llama, tokens
from benchmarks.extraction import BLOCKS, POOLED, Handing, extract_into, forward_alone
from benchmarks.measure import UnavailableError
from benchmarks.models import gpt2, token_batches
from benchmarks.sizes import Decoder, Size
from benchmarks.storage import MIB, ROWS_PER_MIB, UNIT_BYTES, drop_cache, one_shard, shard_of

_COLD_ROWS = 256
_STEP_MIB = 4
_HELD_MIB = 128 + 64 + _STEP_MIB  # the queue, one unit, one step
_POOLED_MIB = 2 * 16 + _STEP_MIB  # two units of 4,096 rows, one step
_DEVICE_MIB = (QUEUE_BYTES + UNIT_BYTES) / MIB
_LLAMA_BATCHES = 8
# A batch is a unit by itself there, as it is larger than one.
_LLAMA_MIB = (QUEUE_BYTES + Decoder().layers * llama.layer_bytes(Decoder())) / MIB


@dataclass(frozen=True)
class Count:
    """Something that is counted once.

    Attributes:
        name: dotted, its group first.
        about: what is counted, with its unit.
        limit: what it may be at most; None where nothing is demanded.
        count: counts it.
    """

    name: str
    about: str
    limit: float | None
    count: Callable[[Size], float]


def cold_rows(size: Size) -> float:
    """MiB read from the disk for random rows of 2 KiB of a store of which nothing is in the page cache."""
    rows = size.cold_megabytes * ROWS_PER_MIB
    store = one_shard(rows)
    column = store["layer"]
    column[0]  # the header, which every reader has to read
    drop_cache(shard_of(store))
    before = _read_bytes()
    for row in random.Random(0).sample(range(rows), _COLD_ROWS):
        column[row]
    return (_read_bytes() - before) / MIB


def held_memory(size: Size, kind: str, **environment: str) -> float:
    """MiB of memory at the peak of a run that writes activations, above the bare loop of forwards."""
    return _peak_in_child(kind, size, environment) - _peak_in_child("bare", size, environment)


def device_memory(size: Size, reduce: Any) -> float:
    """MiB of an accelerator's memory at the peak of an extraction, above the bare loop of forwards."""
    _require_allocator(size.device)
    return _above_forwards(size, gpt2(size), token_batches(size.batches), reduce, BLOCKS)


def llama_memory(size: Size, reduce: Any) -> float:
    """The same of a model of real size."""
    _require_allocator(size.device)
    llama.check(size)
    shape = size.decoder
    batches = token_batches(_LLAMA_BATCHES, shape.rows, shape.seq, shape.vocabulary)
    return _above_forwards(size, llama.model(size), batches, reduce, llama.LAYERS)


def waits(size: Size, reduce: Any) -> float:
    """How often a captured step with a mask makes the CPU wait for a GPU, as torch tells in its debug mode."""
    if size.device.type != "cuda":
        raise UnavailableError("needs a CUDA device, where torch tells of synchronisations")
    model = Handing(size.blocks)
    values = torch.randn(4, 128, 256, device=size.device)
    mask = torch.ones(4, 128, dtype=torch.int64, device=size.device)
    mask[1:, 100:] = 0
    with (
        tempfile.TemporaryDirectory() as folder,
        torch.inference_mode(),
        capture(model, BLOCKS, reduce=reduce, sink=SafetensorsSink(Path(folder) / "store")),
    ):
        model(values, attention_mask=mask)  # the first step makes what the next ones use: streams, pinned memory
        return _synchronisations(partial(model, values, attention_mask=mask))


def _synchronisations(run: Callable[[], object]) -> int:
    mode = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")  # which warns that it is a prototype
        try:
            run()
        finally:
            torch.cuda.set_sync_debug_mode(mode)
    return sum("called a synchronizing" in str(one.message) for one in caught)


def _above_forwards(size: Size, model: Any, batches: Sequence[Any], reduce: Any, layers: str) -> float:
    forwards = partial(forward_alone, model, batches, size.device)
    forwards()  # libraries take memory of their own at first
    with tempfile.TemporaryDirectory() as folder:
        alone = _device_peak(size.device, forwards)
        extracting = partial(extract_into, model, batches, Path(folder), reduce=reduce, layers=layers)
        return (_device_peak(size.device, extracting) - alone) / MIB


def _device_peak(device: torch.device, run: Callable[[], object]) -> int:
    allocator = torch.get_device_module(device)  # torch.accelerator tells since torch 2.9 only
    allocator.synchronize()
    allocator.reset_peak_memory_stats(device)
    run()
    peak: int = allocator.max_memory_allocated(device)
    return peak


def _require_allocator(device: torch.device) -> None:
    if device.type == "cpu" or not hasattr(torch.get_device_module(device), "max_memory_allocated"):
        raise UnavailableError("needs an accelerator whose allocator tells its peak")


COUNTS = [
    Count("store_read.cold_rows", "MiB read from the disk for 256 random rows of 2 KiB", 5.0, cold_rows),
    Count("tokens.mixing", "times fewer documents in a batch than among random tokens", 4 / 3, tokens.mixing),
    Count("tokens.memory", "MiB of memory of batches through a buffer of 256 MiB", tokens.MEMORY_MIB, tokens.memory),
    Count(
        "tokens.resumed",
        "bytes read for each that is left, from nine tenths of an epoch on",
        None,
        tokens.read_by_resumed,
    ),
    Count(
        "store_write.memory",
        "MiB of memory above the bare loop of forwards, whole activations",
        _HELD_MIB,
        partial(held_memory, kind="full"),
    ),
    Count(
        "store_write.memory_returned",
        "the same, where malloc gives freed blocks of 1 MiB back at once",
        _HELD_MIB,
        partial(held_memory, kind="full", MALLOC_MMAP_THRESHOLD_=str(MIB)),
    ),
    Count(
        "store_write.memory_pooled",
        "MiB of memory above the bare loop of forwards, pooled",
        _POOLED_MIB,
        partial(held_memory, kind="pooled"),
    ),
    Count(
        "device_memory.pooled",
        "MiB of the device above the forwards, mean and last",
        _DEVICE_MIB,
        partial(device_memory, reduce=POOLED),
    ),
    Count(
        "device_memory.full",
        "MiB of the device above the forwards, whole activations",
        _DEVICE_MIB,
        partial(device_memory, reduce="full"),
    ),
    Count(
        "synchronisations.pooled",
        "waits for the GPU in a step with a mask: mean, first, last and max",
        0,
        partial(waits, reduce=["mean", "first", "last", "max"]),
    ),
    Count(
        "llama_memory.pooled",
        "MiB of the device above the forwards of a Llama, mean and last",
        _DEVICE_MIB,
        partial(llama_memory, reduce=POOLED),
    ),
    Count(
        "llama_memory.full",
        "MiB of the device above the forwards of a Llama, whole activations",
        _LLAMA_MIB,
        partial(llama_memory, reduce="full"),
    ),
    *(
        Count(
            f"input_memory.{suffix}",
            f"MiB of a process that surveys and reads a .{suffix} file",
            600,
            partial(inputs.held_memory, suffix=suffix),
        )
        for suffix in ("csv", "jsonl", "fa", "parquet")
    ),
]


def run_loop(kind: str, megabytes: int, folder: Path) -> None:
    """Forwards that each return `_STEP_MIB`, captured into a store, whole or pooled, or not at all."""
    torch.set_num_threads(1)
    width, rows = 1024, _STEP_MIB * 256
    model, x = nn.Sequential(nn.Linear(64, width)).eval(), torch.randn(rows // 128, 128, 64)
    steps = megabytes // _STEP_MIB
    with torch.inference_mode():
        if kind == "bare":
            for _ in range(steps):
                model(x)
            return
        with capture(model, "0", sink=folder, reduce="mean" if kind == "pooled" else "full"):
            for _ in range(steps):
                model(x)


def _read_bytes() -> int:
    return int(_line(Path("/proc/self/io"), "read_bytes").split()[1])


def _line(path: Path, name: str) -> str:
    return next(line for line in path.read_text().splitlines() if line.startswith(name))


def _peak_in_child(kind: str, size: Size, environment: Mapping[str, str]) -> float:
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "benchmarks.counts", kind, str(size.whole_megabytes), f"{folder}/store"]
        done = subprocess.run(
            command,
            check=True,
            capture_output=True,
            text=True,
            cwd=Path(__file__).parents[1],
            env={**os.environ, **environment},
        )
    return float(done.stdout)


if __name__ == "__main__":
    run_loop(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]))
    print(
        int(_line(Path("/proc/self/status"), "VmHWM").split()[1]) / 1024
    )  # not ru_maxrss, which the parent's counts in
