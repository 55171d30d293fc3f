"""Runs of `extract` that several processes share, over data sets that count what is loaded."""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
import traceback
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from activation_extractor import extract

ROWS = 160
VALUES = torch.randn(ROWS, 8, generator=torch.Generator().manual_seed(0))


class Rows(Dataset):
    """Rows of a data set, which notes which were loaded."""

    def __init__(self, rows: int = ROWS, places: bool = False) -> None:
        self.rows, self.places = rows, places
        self.loaded: list[int] = []

    def __len__(self) -> int:
        return self.rows

    def __getitem__(self, row: int) -> dict[str, Any]:
        self.loaded.append(row)
        return {"input": VALUES[row % ROWS], "id": f"row {row}", **({"place": row} if self.places else {})}


class Numbered:
    """Batches with numbers, of which it notes which were loaded; the last one is smaller."""

    def __init__(self, size: int = 4, rows: int = ROWS - 2) -> None:
        self.size, self.rows = size, rows
        self.loaded: list[int] = []

    def __len__(self) -> int:
        return -(-self.rows // self.size)

    def __getitem__(self, number: int) -> dict[str, Any]:
        if not 0 <= number < len(self):
            raise IndexError(number)
        self.loaded.append(number)
        rows = range(number * self.size, min((number + 1) * self.size, self.rows))
        return {"input": VALUES[rows.start : rows.stop], "id": [f"row {row}" for row in rows]}


def scattered(size: int = 4, window: int = 32) -> list[list[int]]:
    """Rows in batches of any order within windows."""
    order = torch.randperm(window, generator=torch.Generator().manual_seed(1)).tolist()
    rows = [start + place for start in range(0, ROWS, window) for place in order]
    return [rows[at : at + size] for at in range(0, ROWS, size)]


def batches_of(kind: str) -> Any:
    if kind == "loader":
        return DataLoader(Rows(), batch_size=4)
    if kind == "workers":
        return DataLoader(Rows(), batch_size=4, num_workers=1)
    if kind == "order":
        return DataLoader(Rows(places=True), batch_sampler=scattered())
    numbered = Numbered()
    if kind == "numbered":
        return numbered
    batches = [numbered[number] for number in range(len(numbered))]
    return iter(batches) if kind == "generator" else batches


CALLS: list[int] = []  # grows by one with each forward
PAUSE = [0.0]  # seconds, before each


class Layered(nn.Module):
    """A layer whose calls are counted, and may take a while."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(8, 4)

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002
        CALLS.append(1)
        time.sleep(PAUSE[0])
        return self.layer(input)


def calls() -> int:
    """How many forwards there were since this was asked last."""
    count = len(CALLS)
    CALLS.clear()
    return count


def run(out: Path, kind: str = "loader", *, model: nn.Module | None = None, batches: Any = None, **options: Any):
    options = {"ids": "id", "rows_per_unit": 8, "progress": False} | options
    options |= {"order": "place"} if kind == "order" else {}
    return extract(model or Layered(), batches or batches_of(kind), "layer", out=out, **options)


def shards(out: Path) -> dict[str, bytes]:
    """The bytes of each file of each shard."""
    paths = [path for path in out.glob("shards/[!.]*") for path in (path.iterdir() if path.is_dir() else [path])]
    return {str(path.relative_to(out)): path.read_bytes() for path in paths}


class Rank:
    """A process that is one rank of a run."""

    def __init__(self, context: Any, rank: int, world: int, out: Path, *args: Any, **options: Any) -> None:
        self.pipe, other_end = context.Pipe()
        args = (other_end, rank, world, out, *args)
        self.process = context.Process(target=_work, args=args, kwargs=options)
        self.process.start()
        other_end.close()

    def result(self) -> Any:
        """How many forwards it ran, and how many rows its store has; an error fails the test."""
        if not self.pipe.poll(60):
            pytest.fail("a rank hangs")
        result = self.pipe.recv()
        if isinstance(result, str):
            pytest.fail(result)
        return result

    def discard(self) -> None:
        self.process.kill()
        self.process.join()


def _work(pipe: Any, rank: int, world: int, out: Path, kind: str, seconds: float = 0.0, **options: Any) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world))
    PAUSE[0] = seconds
    try:
        store = run(out, kind, **options)
        pipe.send((calls(), store.rows))
    except Exception as error:
        pipe.send("".join(traceback.format_exception(error)))


@pytest.fixture(scope="session")
def context():
    """Starts processes as forks of one that has imported everything, and no more than that."""
    context = multiprocessing.get_context("forkserver")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
        context.set_forkserver_preload(["divided_runs"])
        forkserver.ensure_running()
    return context


@pytest.fixture
def start(context):
    """Starts the ranks of a run; at the test's end none is left."""
    ranks: list[Rank] = []

    def start_ranks(world: int, *args: Any, only: Any = None, **options: Any) -> list[Rank]:
        new = [Rank(context, rank, world, *args, **options) for rank in only or range(world)]
        ranks.extend(new)
        return new

    yield start_ranks
    for rank in ranks:
        rank.discard()
