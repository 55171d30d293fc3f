"""Rows as they are stored: ids, kept columns, ragged values, text."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

RowId = int | str
KeptColumn = Tensor | list[str]


def as_bytes(texts: Iterable[str]) -> Ragged:
    """Texts as they are stored: the bytes of their UTF-8, one text after another."""
    encoded = [text.encode() for text in texts]
    lengths = torch.tensor([len(text) for text in encoded], dtype=torch.int64)
    joined = torch.frombuffer(bytearray(b"".join(encoded)) or bytearray(1), dtype=torch.uint8)
    return Ragged(joined[: int(lengths.sum())], lengths)


def offsets(lengths: Tensor) -> Tensor:
    """Where each row of a ragged column begins, and where the last one ends, ``(rows + 1,)`` int64."""
    return torch.cat([torch.zeros(1, dtype=torch.int64), lengths.to(torch.int64).cumsum(0)])


@dataclass(frozen=True)
class Ragged:
    """Rows of different lengths, padding left out.

    Attributes:
        values: ``(positions, *features)``, one row after another.
        lengths: ``(rows,)`` int64 on the CPU, how many positions each row has.
    """

    values: Tensor
    lengths: Tensor

    def rows(self) -> tuple[Tensor, ...]:
        """A view ``(positions, *features)`` for each row."""
        lengths = self.lengths.tolist()
        if type(self.values) is Tensor:
            return torch.split(self.values, lengths)
        ends = accumulate(lengths)  # a class of its own may know slices alone
        return tuple(self.values[end - length : end] for end, length in zip(ends, lengths, strict=True))
