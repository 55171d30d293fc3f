"""Stores of few tokens whose values say which token they are, in each format, for the tests of `Store.tokens`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from activation_extractor import SafetensorsSink, Store, open_store
from activation_extractor._format._stored_rows import Ragged
from activation_extractor.sinks import Step

LENGTHS = (3, 1, 4, 0, 5, 9, 2, 6, 5, 3, 5)  # 43 tokens
KEY, OTHER, IDS, MEAN = ("a", "full"), ("b", "full"), ("ids", "full"), ("a", "mean")


def token_store(
    folder: Path, lengths: Sequence[int] = LENGTHS, *, sink=SafetensorsSink, rows_per_unit: int = 3
) -> Store:
    """Token number n is [n, -n] in `KEY`, [n + 0.5, 0.5 - n] in `OTHER` and 10 * n in `IDS`.

    Row number r is [r, r, r] in `MEAN`; its label is 100 * r and its text the number.
    """
    count = sum(lengths)
    tokens = torch.stack([torch.arange(count), -torch.arange(count)], dim=1).float()
    rows, ids = torch.split(tokens, list(lengths)), torch.split(10 * torch.arange(count), list(lengths))
    writer = sink(folder / "out", rows_per_unit=rows_per_unit)
    for start in range(0, len(lengths), 2):
        part = slice(start, start + 2)
        numbers = torch.arange(len(lengths))[part]
        sizes = torch.tensor(lengths[part])
        columns = {
            KEY: Ragged(torch.cat(rows[part]), sizes),
            OTHER: Ragged(torch.cat(rows[part]) + 0.5, sizes),
            IDS: Ragged(torch.cat(ids[part]), sizes),
            MEAN: numbers[:, None].expand(-1, 3).float(),
        }
        kept = {"label": 100 * numbers, "text": [str(number) for number in numbers.tolist()]}
        writer.write(Step(start, len(numbers), columns, [f"id{number}" for number in numbers.tolist()], kept))
    writer.close()
    return open_store(folder / "out")


def numbers(batch: Tensor) -> list[int]:
    """The numbers of the tokens of a batch."""
    return [int(number) for number in batch.reshape(len(batch), -1)[:, 0].tolist()]
