"""Runs that write some MiB, in any format, by `extract` and through a with-block."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from activation_extractor import NpySink, NpzSink, SafetensorsSink, capture, extract

SINKS = {"safetensors": SafetensorsSink, "npz": NpzSink, "npy": NpySink}
ROWS = torch.randn(512, 4, generator=torch.Generator().manual_seed(0))


def wide_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 2048))


def batches(rows: int = 8):
    return [{"input": ROWS[at : at + rows], "id": list(range(at, at + rows))} for at in range(0, 512, rows)]


def run(out: Path, kind: str = "safetensors", data=None, **options):
    """4 MiB of rows, in units of 128 KiB."""
    options = {"ids": "id", "rows_per_unit": 16, "format": kind} | options
    return extract(wide_model(), batches() if data is None else data, "0", out=out, progress=False, **options)


def record(sink, done: list) -> None:
    """The same rows through a with-block; a batch is done once its step has ended."""
    model = wide_model()
    with capture(model, "0", sink=sink) as acts:
        for one in batches():
            with acts.step(ids=one["id"]):
                model(one["input"])
            done.append(one)


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def shards(out: Path) -> dict[str, bytes]:
    return {name: content for name, content in files(out).items() if name.startswith("shards")}


def uneven():
    """Batches with notes to keep, which make units of 256 KiB from the fourth on."""
    return [one | {"note": ["long " * 2600 if row >= 64 else "short" for row in one["id"]]} for one in batches()[:16]]
