"""Processes that write one store in a bucket: killed in any request, several of one run, and of different runs."""

from __future__ import annotations

import multiprocessing
import os
import re
import signal
import sys
from contextlib import suppress
from itertools import count
from multiprocessing import forkserver

import pytest
import torch
from s3_server import reached, serving
from small_runs import BATCHES, run, shards, small_model

from activation_extractor import SafetensorsSink, capture, open_store, plan_units, write_unit
from activation_extractor.errors import StoreError

pytest.importorskip("obstore", reason="the extra 'remote' is not installed")


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
def server():
    with serving() as (bucket, url), reached(url):
        yield bucket, url


@pytest.fixture
def start(context, server):
    """Starts a process that does something with the server; at the test's end none is left."""
    processes = []

    def start_process(do, *args, **options):
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=main, args=(theirs, server[1], do, args, options))
        process.told = ours
        processes.append(process)
        process.start()
        theirs.close()
        return process

    yield start_process
    for process in processes:
        process.kill()
        process.join()
        process.told.close()
        process.close()


def main(pipe, url, do, args, options) -> None:
    torch.set_num_threads(1)
    with reached(url):
        try:
            do(*args, **options)
        except StoreError as error:
            pipe.send(f"{type(error).__name__}: {error}")


def end(process) -> tuple[int, str]:
    """The code that a process ended with, and the error that it told of."""
    process.join(timeout=120)
    told = ""
    with suppress(EOFError):
        told = process.told.recv() if process.told.poll() else ""
    return process.exitcode, told


@pytest.fixture(scope="module")
def local(tmp_path_factory) -> dict[str, bytes]:
    """The shards of a run into a folder."""
    out = tmp_path_factory.mktemp("local") / "run"
    run(out)
    return {f"shards/{name}": data for name, data in shards(out).items()}


def shards_there(bucket, name: str) -> dict[str, bytes]:
    start = f"{name}/shards/0"
    return {key[len(name) + 1 :]: data for key, data in list(bucket.objects.items()) if key.startswith(start)}


def killing(bucket, when: str, number: int, part: str = "") -> list:
    """Kills the process that the list will hold, in the number-th PUT of an object whose key has a part."""
    processes, numbers = [], count()

    def kill(method: str, key: str) -> None:
        if method == "PUT" and part in key and next(numbers) == number:
            os.kill(processes[0].pid, signal.SIGKILL)
            raise ConnectionError  # nothing is done, or nothing is answered

    bucket.before = bucket.after = lambda method, key: None
    setattr(bucket, when, kill)
    return processes


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_writer_that_is_killed_in_any_put_leaves_whole_units_and_a_rerun_the_same_bytes(server, start, local, when):
    bucket, _ = server
    for number in count():
        name = f"run {number}"
        killed = killing(bucket, when, number)
        killed.append(start(run, f"s3://bucket/{name}"))
        ended = end(killed[0])
        bucket.before = bucket.after = lambda method, key: None
        assert ended in [(-signal.SIGKILL, ""), (0, "")]
        before = dict(bucket.objects)
        assert shards_there(bucket, name).items() <= local.items()
        if f"{name}/manifest.json" in before:
            found = open_store(f"s3://bucket/{name}", partial=True)
            assert found.rows in (0, 3, 6, 9, 12, 15)  # units are on their way together
            assert {one.kind for one in found.verify()} <= {"unfinished", "missing"}
        run(f"s3://bucket/{name}")
        assert shards_there(bucket, name) == local
        assert before.items() <= bucket.objects.items()
        assert bucket.replaced == []
        if ended == (0, ""):
            break
    assert number >= 7


@pytest.mark.parametrize("latency", [0.0, 0.01])
def test_several_processes_may_write_one_store_at_once(server, start, local, latency):
    bucket, _ = server
    bucket.latency = latency
    processes = [start(run, "s3://bucket/run") for _ in range(4)]
    assert [end(process) for process in processes] == [(0, "")] * 4
    assert shards_there(bucket, "run") == local
    store = open_store("s3://bucket/run")
    assert (store.rows, store.verify(), bucket.replaced) == (15, [], [])


def test_of_processes_with_different_arguments_one_stops_and_spoils_nothing(server, start, tmp_path):
    bucket, _ = server
    bucket.latency = 0.005
    processes = {reduce: start(run, "s3://bucket/run", reduce=reduce) for reduce in ("first", "last")}
    ends = {reduce: end(process) for reduce, process in processes.items()}
    winner = open_store("s3://bucket/run").reducers[0]
    loser = ({*ends} - {winner}).pop()
    assert ends[winner] == (0, "")
    assert re.match("OtherRunError: .* holds another run: it differs in reducers", ends[loser][1])
    run(tmp_path / "alone", reduce=winner)
    assert shards_there(bucket, "run") == {f"shards/{key}": data for key, data in shards(tmp_path / "alone").items()}
    assert (open_store("s3://bucket/run").verify(), bucket.replaced) == ([], [])


def block(url: str, number: int, steps: int = 4) -> None:
    layer = torch.nn.Linear(2, 2)
    with capture(layer, "", sink=SafetensorsSink(url, append=True, rows_per_unit=2)) as acts:
        for step in range(steps):
            with acts.step(ids=[f"{number} {step} a", f"{number} {step} b"]):
                layer(torch.full((2, 2), float(number)))


def test_blocks_of_several_processes_that_append_lose_no_row(server, start):
    bucket, _ = server
    bucket.latency = 0.005
    processes = [start(block, "s3://bucket/blocks", number) for number in range(4)]
    assert [end(process) for process in processes] == [(0, "")] * 4
    store = open_store("s3://bucket/blocks")
    assert sorted(store.ids) == sorted(
        f"{number} {step} {row}" for number in range(4) for step in range(4) for row in "ab"
    )
    assert (store.verify(), bucket.replaced) == ([], [])


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_block_that_is_killed_keeps_its_whole_units_and_others_append(server, start, when):
    bucket, _ = server
    killed = killing(bucket, when, 2, "/shards/2")
    killed.append(start(block, "s3://bucket/blocks", 0))
    assert end(killed[0]) == (-signal.SIGKILL, "")
    bucket.before = bucket.after = lambda method, key: None
    stored = open_store("s3://bucket/blocks").ids
    assert stored == [f"0 {step} {row}" for step in range(2 if when == "before" else 3) for row in "ab"]
    block("s3://bucket/blocks", 1)
    store = open_store("s3://bucket/blocks")
    assert store.ids == stored + [f"1 {step} {row}" for step in range(4) for row in "ab"]
    assert {one.kind for one in store.verify()} <= {"unfinished"}


def test_ranks_share_a_store_in_a_bucket(server, start, local):
    bucket, _ = server
    processes = [start(rank, "s3://bucket/run", number, 3) for number in range(3)]
    assert [end(process) for process in processes] == [(0, "")] * 3
    assert shards_there(bucket, "run") == local
    assert open_store("s3://bucket/run").verify() == []


def rank(url: str, number: int, world: int) -> None:
    os.environ.update(RANK=str(number), WORLD_SIZE=str(world))
    run(url)


def units(url: str, numbers: list[int]) -> None:
    """Write some of the units that the run has, in this order."""
    planned = plan_units(BATCHES, rows_per_unit=6)
    for number in numbers:
        options = {"reduce": ["mean", "full"], "ids": "id", "keep": "label"}
        write_unit(small_model(), BATCHES, "h.*", out=url, unit=planned[number], **options)


def test_units_may_be_written_in_any_order_by_any_process_and_twice(server, start, local):
    bucket, _ = server
    bucket.latency = 0.005
    processes = [start(units, "s3://bucket/run", order) for order in ([2, 1], [1, 0], [0, 2])]
    assert [end(process) for process in processes] == [(0, "")] * 3
    assert shards_there(bucket, "run") == local
    assert (open_store("s3://bucket/run").verify(), bucket.replaced) == ([], [])
    assert plan_units(BATCHES, rows_per_unit=6, out="s3://bucket/run") == []


def many(url: str) -> None:
    run(url, [{**BATCHES[0], "id": [f"{number} {row}" for row in range(3)]} for number in range(40)], rows_per_unit=3)


def test_a_store_can_be_read_at_any_time_while_it_is_written(server, start):
    bucket, _ = server
    bucket.latency = 0.002
    writer, rows = start(many, "s3://bucket/run"), [0]
    while writer.is_alive():
        if "run/manifest.json" in bucket.objects:
            store = open_store("s3://bucket/run", partial=True)  # units are on their way together
            rows.append(store.rows)
            assert len(store.ids) == len(store["h.0", "mean"].torch()) == store.rows
            assert {damage.kind for damage in store.verify()} <= {"unfinished", "missing"}
    assert end(writer) == (0, "")
    assert rows == sorted(rows)
    assert len({*rows}) > 1
    assert open_store("s3://bucket/run").rows == 120
