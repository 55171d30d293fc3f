"""Rows longer than a model takes: batches of their windows, and the same done by hand."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from activation_extractor import Store, capture, extract, length_batches, windows

REDUCE = ["mean", "max", "first", "last", "full"]
LENGTHS = [25, 3, 60, 9, 10, 11, 1, 40]


def random_rows(lengths: list[int], tokens: int = 30) -> list[list[int]]:
    generator = random.Random(0)
    return [[generator.randrange(4, tokens) for _ in range(length)] for length in lengths]


ROWS = random_rows(LENGTHS)


def run_windows(out, batches, model=None, layers="blocks.*", **options) -> Store:
    options = {"reduce": REDUCE, "ids": "id", "keep": "length", "group": "window", "pooling_mask": "counts"} | options
    return extract(model or local_model(), batches, layers, out=out, progress=False, **options)


def local_model(kind: str = "conv") -> LocalModel:
    return LocalModel(blocks=2, reach=1, kind=kind)


def whole_rows(model: nn.Module, layer: str = "blocks.1") -> list[Tensor]:
    """What a layer computes of each row, run as a whole."""
    return [by_hand(model, layer, row, 1000, 1) for row in ROWS]


def window_batches(
    rows: list[list[int]], size: int, *, batch_size: int = 4, stride: int | None = None, special: tuple[int, ...] = ()
) -> Iterator[dict[str, Any]]:
    """Batches of windows by their lengths; `special` is CLS and SEP, or nothing."""
    made = windows(map(len, rows), size=size, stride=stride)
    for numbers in length_batches([window.length for window in made], batch_size=batch_size):
        yield window_batch(rows, [made[number] for number in numbers], special=special)


def window_batch(rows: list[list[int]], chosen: list[Any], *, special: tuple[int, ...] = ()) -> dict[str, Any]:
    """A batch of these windows, padded with 0."""
    before, after = special[:1], special[1:]
    inputs = [[*before, *rows[window.row][window.start : window.stop], *after] for window in chosen]
    longest = max(map(len, inputs))
    tokens = torch.tensor([[*row, *[0] * (longest - len(row))] for row in inputs])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in inputs])
    counts = torch.zeros_like(mask)
    for row, window in zip(counts, chosen, strict=True):
        row[window.owns(before=len(before), after=len(after))] = 1
    ids = [f"row {window.row}" for window in chosen]
    length = torch.tensor([len(rows[window.row]) for window in chosen])
    batch = {"input_ids": tokens, "attention_mask": mask, "counts": counts, "window": chosen}
    return {**batch, "id": ids, "length": length}


def by_hand(
    model: nn.Module, layer: str, row: list[int], size: int, stride: int, special: tuple[int, ...] = ()
) -> Tensor:
    """What a layer computes of a row, ``(positions, features)``, each position in the window that sees most around it.

    Each window is run alone, and nothing of the library decides what is taken from it.
    """
    starts = [0]
    while starts[-1] + size < len(row):
        starts.append(min(starts[-1] + stride, len(row) - size))
    best = [(-math.inf, torch.empty(0))] * len(row)
    around: list[Tensor] = []
    for start in starts:
        stop = min(start + size, len(row))
        tokens = torch.tensor([[*special[:1], *row[start:stop], *special[1:]]])
        with torch.no_grad(), capture(model, layer) as acts:
            model(input_ids=tokens, attention_mask=torch.ones_like(tokens))
        hidden = acts[layer][0]
        around = [*(around[:1] or [hidden[:1]]), hidden[-1:]]
        for place in range(start, stop):
            left = place - start if start else math.inf
            right = stop - 1 - place if stop < len(row) else math.inf
            if min(left, right) > best[place][0]:
                best[place] = min(left, right), hidden[len(special[:1]) + place - start]
    inner = torch.stack([hidden for _, hidden in best])
    return torch.cat([around[0], inner, around[-1]]) if special else inner


def check_columns(store: Any, layer: str, wholes: list[Tensor], *, tolerance: float) -> None:
    """Every column of a layer, against what the layer computed of each row."""
    close = {"rtol": tolerance, "atol": tolerance}
    for number, whole in enumerate(wholes):
        torch.testing.assert_close(store[layer, "full"][number], whole, **close)
        torch.testing.assert_close(store[layer, "mean"][number], whole.mean(0), **close)
        torch.testing.assert_close(store[layer, "max"][number], whole.amax(0), **close)
        torch.testing.assert_close(store[layer, "first"][number], whole[0], **close)
        torch.testing.assert_close(store[layer, "last"][number], whole[-1], **close)


class LocalModel(nn.Module):
    """Blocks that see `reach` positions to each side, by a convolution or by attention with a band."""

    def __init__(self, blocks: int, reach: int, kind: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(30, 8)
        self.blocks = nn.ModuleList(_Convolution(reach) if kind == "conv" else _Band(reach) for _ in range(blocks))

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        hidden = self.embed(input_ids)
        for block in self.blocks:
            hidden = block(hidden, attention_mask.bool())
        return hidden


class _Convolution(nn.Module):
    def __init__(self, reach: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 8, 2 * reach + 1) / 4)

    def forward(self, hidden: Tensor, real: Tensor) -> Tensor:
        seen = hidden.where(real[..., None], 0).transpose(1, 2)
        return hidden + nn.functional.conv1d(seen, self.weight, padding="same").transpose(1, 2).tanh()


class _Band(nn.Module):
    def __init__(self, reach: int) -> None:
        super().__init__()
        self.reach, self.query, self.key, self.value = reach, nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, hidden: Tensor, real: Tensor) -> Tensor:
        places = torch.arange(hidden.shape[1])
        is_near = (places[:, None] - places).abs() <= self.reach
        seen = is_near & real[:, None]
        seen |= torch.eye(len(places), dtype=torch.bool)  # padding sees itself
        return hidden + nn.functional.scaled_dot_product_attention(
            self.query(hidden), self.key(hidden), self.value(hidden), attn_mask=seen
        )
