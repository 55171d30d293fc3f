"""Runs of `extract` that are killed, share a folder or are read meanwhile."""

from __future__ import annotations

import multiprocessing
import os
import random
import re
import signal
import sys
import time
from contextlib import suppress
from multiprocessing import forkserver
from pathlib import Path

import pytest
import torch
from models import BlockStack

from activation_extractor import extract, open_store
from activation_extractor.errors import OtherRunError, StoreError
from activation_extractor.store import _verify

TOKENS = torch.randint(0, 50, (400, 6), generator=torch.Generator().manual_seed(0))


def batches(out: Path, pause: float = 0.0):
    """60 batches, two to a unit; the pause is made before those that are not in the store yet."""
    for start in range(0, 120, 2):
        if pause and not any(out.glob(f"shards/{start // 4:08d}.*")):
            time.sleep(pause)
        yield {"input_ids": TOKENS[start : start + 2], "id": [f"row {start}", f"row {start + 1}"]}


def run(out: Path, kind: str = "safetensors", data=None, *, reduce: str = "mean"):
    torch.manual_seed(0)
    options = {"ids": "id", "rows_per_unit": 4, "format": kind, "progress": False}
    return extract(BlockStack(blocks=1), data or batches(out), "h.0", out=out, reduce=[reduce, "full"], **options)


def shards(out: Path) -> dict[str, bytes]:
    """The bytes of each file of each shard."""
    paths = [path for path in out.glob("shards/[!.]*") for path in (path.iterdir() if path.is_dir() else [path])]
    return {str(path.relative_to(out)): path.read_bytes() for path in paths}


class Child:
    """A process that does `main` with these options once it is told to go."""

    def __init__(self, context, out: Path, **options) -> None:
        self.pipe, other_end = context.Pipe()
        self.process = context.Process(target=main, args=(other_end, out), kwargs=options)
        self.process.start()
        other_end.close()

    def kill(self) -> None:
        self.process.kill()
        assert self.end() == (-signal.SIGKILL, "")

    def end(self) -> tuple[int, str]:
        """The code that it ended with, and the error that it told of."""
        self.process.join(timeout=120)
        told = [""]
        with suppress(EOFError, ConnectionError):
            while self.pipe.poll():
                told.append(self.pipe.recv())
        return self.process.exitcode, told[-1] if "Error" in told[-1] else ""

    def discard(self) -> None:
        self.process.kill()
        self.process.join()
        self.process.close()
        self.pipe.close()


@pytest.fixture(scope="module")
def context():
    """Starts processes as forks of one that has imported everything, and no more than that."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
        forkserver.ensure_running()
    return context


@pytest.fixture
def start(context):
    """Starts a `Child` that is ready; at the test's end none is left."""
    children = []

    def start_child(*args, **options) -> Child:
        children.append(Child(context, *args, **options))
        assert children[-1].pipe.recv() == "ready"
        return children[-1]

    yield start_child
    for one in children:
        one.discard()


def main(pipe, out: Path, kind="safetensors", pause=0.0, reduce="mean", lingers=False, dies=None) -> None:
    torch.set_num_threads(1)
    pipe.send("ready")
    pipe.recv()
    if dies:
        die_at(*dies)
    try:
        run(out, kind, announced(pipe, out, pause, lingers), reduce=reduce)
    except StoreError as error:
        pipe.send(f"{type(error).__name__}: {error}")


def announced(pipe, out: Path, pause: float, lingers: bool):
    is_told = False
    for batch in batches(out, pause):
        if not is_told and shards(out):
            is_told = True
            pipe.send("a shard is there")
        yield batch
    if lingers:
        time.sleep(600)


def die_at(call: str, number: int, when: str) -> None:
    """Kill this process before or after a function of `os` is called for the number-th time."""
    publish, counts = getattr(os, call), iter(range(1, 1000))

    def publish_or_die(*args) -> None:
        is_last = next(counts) == number
        if not is_last or when == "after":
            publish(*args)
        if is_last:
            os.kill(os.getpid(), signal.SIGKILL)

    setattr(os, call, publish_or_die)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> dict[str, dict[str, bytes]]:
    """The shards of runs that nobody disturbed, by format."""
    found = {}
    for kind in ("safetensors", "npz", "npy"):
        out = tmp_path_factory.mktemp(kind) / "out"
        run(out, kind)
        found[kind] = shards(out)
    return found


@pytest.mark.parametrize(("kind", "seed"), [("safetensors", 1), ("safetensors", 2), ("npz", 3), ("npy", 4)])
def test_a_run_that_is_killed_again_and_again_ends_in_the_same_bytes(tmp_path, start, undisturbed, kind, seed):
    chance, out = random.Random(seed), tmp_path / "out"
    for number in range(5):
        child = start(out, kind=kind, pause=0.02, lingers=True)
        child.pipe.send("go")
        if number:  # the first kill comes anywhere around the first shard, the others behind it
            assert child.pipe.recv() == "a shard is there"
        time.sleep(chance.uniform(0.0, 0.15))
        child.kill()
        assert shards(out).items() <= undisturbed[kind].items()
        if (out / "manifest.json").exists():
            assert open_store(out).rows % 4 == 0
            assert {damage.kind for damage in open_store(out).verify()} <= {"unfinished"}
    store = run(out, kind)
    assert shards(out) == undisturbed[kind]
    assert store.ids == [f"row {row}" for row in range(120)]
    assert {damage.kind for damage in store.verify()} <= {"unfinished"}


@pytest.mark.parametrize(
    ("kind", "call", "number"),
    [("safetensors", "link", 1), ("safetensors", "link", 4), ("npz", "link", 2), ("npy", "rename", 3)],
)
def test_a_kill_before_a_file_gets_its_name_leaves_a_draft_and_whole_units(
    tmp_path, start, undisturbed, kind, call, number
):
    out = tmp_path / "out"
    child = start(out, kind=kind, dies=(call, number, "before"))
    child.pipe.send("go")
    assert child.end() == (-signal.SIGKILL, "")
    units = number - 1 if kind == "npy" else max(number - 2, 0)  # the first link is the manifest's
    assert len(list(out.rglob(".*.tmp"))) == 1
    assert shards(out).items() <= undisturbed[kind].items()
    if (kind, number) == ("safetensors", 1):
        with pytest.raises(StoreError, match="must be a store, got a folder without manifest.json"):
            open_store(out)
    else:
        assert open_store(out).ids == [f"row {row}" for row in range(4 * units)]
        assert [damage.kind for damage in open_store(out).verify()] == ["unfinished"]
    run(out, kind)
    assert shards(out) == undisturbed[kind]
    assert [damage.kind for damage in open_store(out).verify()] == ["unfinished"]  # a draft is swept when an hour old


def test_a_kill_after_a_shard_gets_its_name_leaves_a_unit_that_no_journal_knows(tmp_path, start, undisturbed):
    out = tmp_path / "out"
    child = start(out, dies=("link", 4, "after"))
    child.pipe.send("go")
    assert child.end() == (-signal.SIGKILL, "")
    assert sum(len(path.read_text().splitlines()) for path in out.glob("journal/*")) == 2
    assert open_store(out).ids == [f"row {row}" for row in range(12)]
    run(out)
    assert shards(out) == undisturbed["safetensors"]
    assert open_store(out).rows == 120


@pytest.mark.parametrize("kind", ["safetensors", "npy"])
def test_two_processes_may_write_one_store_at_once(tmp_path, start, undisturbed, kind):
    out = tmp_path / "out"
    children = [start(out, kind=kind, pause=0.002) for _ in range(2)]
    for child in children:
        child.pipe.send("go")
    assert [child.end() for child in children] == [(0, ""), (0, "")]
    assert shards(out) == undisturbed[kind]
    assert open_store(out).verify() == []


def test_of_two_processes_with_different_arguments_one_stops_and_spoils_nothing(tmp_path, start):
    out = tmp_path / "out"
    children = {reduce: start(out, reduce=reduce) for reduce in ("first", "last")}
    for child in children.values():
        child.pipe.send("go")
    ends = {reduce: child.end() for reduce, child in children.items()}
    winner = open_store(out).reducers[0]
    loser = ({*ends} - {winner}).pop()
    assert ends[winner] == (0, "")
    assert re.match("OtherRunError: .* holds another run: it differs in reducers", ends[loser][1])
    run(tmp_path / "alone", reduce=winner)
    assert shards(out) == shards(tmp_path / "alone")
    assert open_store(out).verify() == []


def interrupt() -> None:
    raise KeyboardInterrupt


def interposed(out: Path, at: int, act) -> list:
    """The batches, with something done before one of them is handed out."""
    for number, batch in enumerate(batches(out)):
        if number == at:
            act()
        yield batch


@pytest.mark.parametrize("at", [0, 1, 2, 30])
@pytest.mark.parametrize("kind", ["safetensors", "npy"])
def test_a_run_that_another_one_overtakes_ends_in_the_same_bytes(tmp_path, undisturbed, kind, at):
    out = tmp_path / "out"
    store = run(out, kind, interposed(out, at, lambda: run(out, kind)))
    assert shards(out) == undisturbed[kind]
    assert store.rows == 120


@pytest.mark.parametrize("at", [0, 1])
def test_a_run_that_another_one_overtakes_in_its_folder_is_told_what_differs(tmp_path, at):
    out = tmp_path / "out"
    with pytest.raises(OtherRunError, match=r"holds another run: it differs in reducers \("):
        run(out, "safetensors", interposed(out, at, lambda: run(out, reduce="first")), reduce="last")
    run(tmp_path / "alone", reduce="first")
    assert shards(out) == shards(tmp_path / "alone")


def test_two_runs_of_different_data_cannot_share_a_folder(tmp_path):
    out = tmp_path / "out"
    other = [{**batch, "input_ids": TOKENS[200:202]} for batch in batches(out)]
    with pytest.raises(StoreError, match="hold what this run computed, got other values|differs in data"):
        run(out, "safetensors", interposed(out, 1, lambda: run(out, data=other)))
    run(tmp_path / "alone", data=other)
    assert shards(out) == shards(tmp_path / "alone")


def test_a_store_can_be_read_at_any_time_while_it_is_written(tmp_path, start, undisturbed):
    out, rows = tmp_path / "out", [0]
    child = start(out, pause=0.003)
    child.pipe.send("go")
    assert child.pipe.recv() == "a shard is there"
    while child.process.is_alive():
        store = open_store(out)
        rows.append(store.rows)
        assert len(store.ids) == len(store["h.0", "mean"].torch()) == store.rows
        assert {damage.kind for damage in store.verify()} <= {"unfinished"}
    assert child.end() == (0, "")
    assert rows == sorted(rows)
    assert len({*rows}) > 3
    assert shards(out) == undisturbed["safetensors"]


@pytest.mark.parametrize("name", ["read_records", "read_manifest", "scan_shards"])
def test_a_unit_that_appears_while_a_store_is_verified_is_no_damage(tmp_path, monkeypatch, name):
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, data=interposed(tmp_path, 9, interrupt))
    asked = getattr(_verify, name)

    def complete_and_ask(*args):
        run(tmp_path)
        return asked(*args)

    monkeypatch.setattr(_verify, name, complete_and_ask)
    assert open_store(tmp_path).verify() == []
