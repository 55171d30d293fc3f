"""Steps and masks that tests of sinks share, and where a store keeps its shards."""

from __future__ import annotations

from pathlib import Path

import torch

from activation_extractor.sinks import Step

LEFT = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
RIGHT = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])


def shards(folder: Path) -> list[Path]:
    return sorted((folder / "shards").glob("*.safetensors"))


def mean_step(rows: int, ids=None, value: float = 0.0) -> Step:
    return Step(0, rows, {("h.0", "mean"): torch.full((rows, 3), value)}, ids, {})
