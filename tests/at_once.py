"""Processes that begin in one folder at the same instant, as an array job does; run as a program.

``python at_once.py FOLDER ROUNDS WHAT PAUSE [LATE]``: eight forks a round do the same in a new folder, which does not
exist yet in every other round. With a pause, each waits between its looks at the folder; each begins up to so many
seconds late.
"""

from __future__ import annotations

import os
import random
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from activation_extractor import SafetensorsSink, capture, extract, open_store
from activation_extractor.runs import _extract
from activation_extractor.runs._stored_unit import StoredUnits
from activation_extractor.sinks import _resume, _store_sinks

PROCESSES, ROWS = 8, torch.arange(32.0).reshape(16, 2)


def by_extract(out: Path, number: int, **options) -> None:
    data = [{"input": ROWS[at : at + 4], "id": list(range(at, at + 4))} for at in range(0, 16, 4)]
    store = extract(MODEL, data, "0", out=out, rows_per_unit=4, progress=False, **{"ids": "id"} | options)
    assert store.rows == 16


def by_block(out: Path, number: int, sink: type = SafetensorsSink, **options) -> None:
    with capture(MODEL, "0", sink=sink(out, append=True, **options)) as acts:
        for at in range(0, 16, 4):
            with acts.step(ids=[f"{number} {row}" for row in range(at, at + 4)]):
                MODEL(ROWS[at : at + 4])


MODEL = nn.Sequential(nn.Linear(2, 3))


WAYS: dict[str, tuple[Callable[..., None], int]] = {
    "extract": (by_extract, 16),
    "extract without ids": (
        lambda out, number: by_extract(out, number, ids=lambda batch: batch.pop("id"), format="npz"),
        16,
    ),
    "extract that appends": (lambda out, number: by_extract(out, number, append=True), 16),
    "block": (by_block, 16 * PROCESSES),
    "block of small units": (lambda out, number: by_block(out, number, rows_per_unit=4), 16 * PROCESSES),
}


def pause_between_looks() -> None:
    """Let each process wait a little after each look at the folder, and after each file that it makes known."""
    for place, name in (
        (_resume, "has_manifest"),
        (_store_sinks, "has_manifest"),
        (_extract, "has_manifest"),
        (StoredUnits, "has"),
        (os, "link"),
        (os, "scandir"),
        (os, "listdir"),
    ):
        look = getattr(place, name)
        wait = lambda *given, look=look: (look(*given), time.sleep(random.random() / 50))[0]  # noqa: E731
        setattr(place, name, wait)


def child(way: Callable[..., None], out: Path, number: int, start: float, late: float) -> None:
    try:
        random.seed(f"{number} {start}")
        while time.time() < start + late * random.random():
            pass
        way(out, number)
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def main(folder: Path, rounds: int, name: str, pause: bool, late: float = 0.0) -> None:
    torch.set_num_threads(1)
    way, rows = WAYS[name]
    if pause:
        pause_between_looks()
    for round_number in range(rounds):
        out = folder / f"round {round_number}" / "deeper"
        if round_number % 2:
            out.mkdir(parents=True)
        start = time.time() + 0.05
        forks = []
        for number in range(PROCESSES):
            fork = os.fork()
            if not fork:
                child(way, out, number, start, late)
            forks.append(fork)
        codes = [os.waitpid(fork, 0)[1] for fork in forks]
        assert not any(codes), (round_number, codes)
        store = open_store(out)
        assert store.rows == rows, store.rows
        assert store.verify() == []


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4] == "pause", *map(float, sys.argv[5:]))
