"""Runs of `extract` over a few rows: a model, batches, and what a run leaves."""

from __future__ import annotations

from pathlib import Path

import torch
from models import BlockStack

from activation_extractor import extract

FORMATS = ["safetensors", "npz", "npy"]
TOKENS = torch.randint(0, 50, (40, 6), generator=torch.Generator().manual_seed(0))
MASK = torch.arange(6)[None] < torch.randint(1, 7, (40, 1), generator=torch.Generator().manual_seed(1))


def batch(rows: slice | list[int]) -> dict:
    labels = torch.arange(40)[rows]
    ids = [f"row {index}" for index in labels]
    return {"input_ids": TOKENS[rows], "attention_mask": MASK[rows], "id": ids, "label": labels}


BATCHES = [batch(slice(start, start + 3)) for start in range(0, 15, 3)]  # two in a unit, one in the last


def small_model(seed: int = 0, eps: float = 1e-5) -> BlockStack:
    torch.manual_seed(seed)
    model = BlockStack(blocks=2)
    for block in model.h:
        block.norm.eps = eps
    return model


def run(out, batches=BATCHES, *, model=None, **options):
    options = {"layers": "h.*", "reduce": ["mean", "full"], "ids": "id", "keep": "label", "rows_per_unit": 6} | options
    return extract(model or small_model(), batches, options.pop("layers"), out=out, progress=False, **options)


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def shards(folder: Path) -> dict[str, bytes]:
    return files(folder / "shards")


def interrupted(batches, after: int):
    yield from batches[:after]
    raise KeyboardInterrupt


def counted(model):
    """The model, and a list that grows by one with each forward."""
    calls = []
    model.register_forward_hook(lambda *_: calls.append(1))
    return model, calls
