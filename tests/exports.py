"""A store of every kind of column, for tests of what is exported."""

from __future__ import annotations

from pathlib import Path

import torch

from activation_extractor import SafetensorsSink, open_store
from activation_extractor._format._stored_rows import Ragged
from activation_extractor.sinks import Step

LENGTHS = [2, 0, 3, 1, 4]
RAGGED = torch.arange(20.0).view(10, 2)
STARTS = [0, 2, 2, 5, 6, 10]
DENSE = torch.arange(30.0).view(5, 6) / 7
HALVES = torch.arange(10).view(5, 2).to(torch.bfloat16) / 3
SHORT = torch.arange(9.0).view(3, 3)  # of the rows 2, 3 and 4
IDS = ["a", "", "ünï", "d", "e"]
LABEL = torch.arange(5)


def make_store(folder: Path, ids=IDS, make_sink: type = SafetensorsSink):
    """Two units: five rows of four columns, of which one comes in the second unit alone."""
    sink = make_sink(folder / "store", rows_per_unit=1)
    for index, (start, stop) in enumerate([(0, 2), (2, 5)]):
        values = {
            ("h.0", "mean"): DENSE[start:stop].reshape(-1, 2, 3),
            ("h.0", "full"): Ragged(RAGGED[STARTS[start] : STARTS[stop]], torch.tensor(LENGTHS[start:stop])),
            ("h:1", "mean"): HALVES[start:stop],
        }
        if index:
            values["x", "mean"] = SHORT
        sink.write(Step(index, stop - start, values, ids and ids[start:stop], {"label": LABEL[start:stop]}))
    sink.close()
    return open_store(folder / "store")


def simple_store(folder: Path, values: dict, keep=None, ids=None):
    sink = SafetensorsSink(folder / "store")
    rows = len(next(iter(values.values())))
    sink.write(Step(0, rows, values, ids, keep or {}))
    sink.close()
    return open_store(folder / "store")
