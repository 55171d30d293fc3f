"""Factories and functions that the tests of engines name as text, for workers to import."""

from __future__ import annotations

import os
import time
from pathlib import Path

import numpy as np
import torch
from small_runs import MASK, TOKENS, batch, small_model
from torch import nn

from activation_extractor import write_unit

UNIT_OPTIONS = {"reduce": ["mean", "full"], "ids": "id", "keep": "label"}
SEEN = "SEEN_BY_ENGINES"  # names a folder in the environment, where builds and batches leave a file each


def small() -> nn.Module:
    _leave("built")
    return small_model()


def in_bfloat16() -> nn.Module:
    _leave("built")
    return small_model().to(torch.bfloat16)


def in_pairs():
    return small_model(), padded


def broken() -> nn.Module:
    raise FileNotFoundError("no weights at /models/large")


def nothing() -> str:
    return "a model"


def padded(columns):
    """Rows of tokens of several lengths, padded on the right; all but the tokens is left out."""
    rows = [torch.as_tensor(np.array(row)) for row in columns["tokens"]]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    return {
        "input_ids": ids,
        "attention_mask": torch.arange(ids.shape[1])[None] < torch.tensor([*map(len, rows)])[:, None],
    }


def slowly(columns):
    """What it is given, after a while in which its process can be killed."""
    _leave(str(os.getpid()))
    time.sleep(0.5)
    return columns


def letters(columns):
    """A token for each letter of a text."""
    return padded({"tokens": [[ord(letter) % 50 for letter in text] for text in columns["text"]]})


def failing(columns):
    return columns["no such column"]


def write_slowly(unit, out, number: int = 0):
    """The task of one unit, in which its process can be killed."""
    _leave(str(os.getpid()))
    time.sleep(0.5)
    batches = [batch(slice(4 * place, 4 * place + 4)) for place in unit.batches]
    return write_unit(small_model(), batches, "h.*", out=out, unit=unit, **UNIT_OPTIONS)


def rows_of(rows: slice = slice(0, 8)) -> dict:
    """Rows of the small runs, as an engine has them."""
    numbers = np.arange(40)[rows]
    return {
        "id": np.array([f"row {number}" for number in numbers], object),
        "input_ids": TOKENS[rows].numpy(),
        "attention_mask": MASK[rows].numpy(),
        "label": numbers,
    }


def _leave(name: str) -> None:
    if folder := os.environ.get(SEEN):
        (Path(folder) / f"{name}-{os.getpid()}-{time.time_ns()}").touch()
