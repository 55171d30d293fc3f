"""Batches of tokens on threads, in workers of a DataLoader, in forked processes, and when a script ends."""

from __future__ import annotations

import copy
import gc
import multiprocessing
import os
import pickle
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from token_stores import KEY, LENGTHS, numbers, token_store
from torch.utils.data import DataLoader

from activation_extractor import open_store
from activation_extractor._format._reader import Values
from activation_extractor.errors import ArgumentError, StoreError

COUNT = sum(LENGTHS)
PATIENCE_SECONDS = 60
READER = "activation_extractor reader"
pytestmark = [
    pytest.mark.filterwarnings("ignore:This process:DeprecationWarning"),  # of Python 3.12 on, about fork itself
    pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning"),  # on a machine with one core
]


@pytest.fixture(scope="module")
def store():
    with tempfile.TemporaryDirectory() as folder:
        yield token_store(Path(folder))


def readers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == READER]


def wait_until(is_so) -> None:
    end = time.monotonic() + PATIENCE_SECONDS
    while not is_so():
        assert time.monotonic() < end
        time.sleep(0.01)


def wait_until_no_reader() -> None:
    gc.collect()
    wait_until(lambda: not readers())


def loader(store, workers=2, context="fork", **options):
    options = {"batch_size": 4, "buffer_bytes": 1200, "block_bytes": 24, **options}
    tokens = store.tokens(KEY, **options)
    context = context if workers else None
    return tokens, DataLoader(tokens, batch_size=None, num_workers=workers, multiprocessing_context=context)


def test_three_ranks_of_two_workers_have_disjoint_parts_that_are_complete(store):
    found = []
    for rank in range(3):
        _, batches = loader(store, rank=rank, world=3, epochs=1, drop_last=False)
        found += [number for batch in batches for number in numbers(batch)]
    assert sorted(found) == list(range(COUNT))


def test_a_worker_that_is_spawned_has_its_part(store):
    tokens, batches = loader(store, 1, "spawn", epochs=1, drop_last=False)
    assert sorted(number for batch in batches for number in numbers(batch)) == list(range(COUNT))
    with pytest.raises(ArgumentError, match="batches must be given where the workers"):
        tokens.state_dict()


def test_a_loader_without_workers_gives_what_the_iterator_gives(store):
    tokens, batches = loader(store, 0, epochs=1)
    again, _ = loader(store, 0, epochs=1)
    assert all(map(torch.equal, batches, again))
    assert tokens.state_dict() == again.state_dict()


@pytest.mark.parametrize("handed_out", [5, 8])
def test_a_loader_with_workers_goes_on_where_another_one_stood(store, handed_out):
    options = {"epochs": 2, "drop_last": False}
    tokens, batches = loader(store, **options)
    whole = []
    for batch in batches:
        whole.append(batch)
        if len(whole) == handed_out:
            state = tokens.state_dict(batches=handed_out)
    again, rest = loader(store, **options)
    again.load_state_dict(state)
    assert [numbers(batch) for batch in rest] == [numbers(batch) for batch in whole[handed_out:]]


def test_a_state_goes_on_with_as_many_workers_alone(store):
    tokens, batches = loader(store)
    next(iter(batches))
    with pytest.raises(ArgumentError, match=r"batches must be given where the workers .* state_dict\(batches=count\)"):
        tokens.state_dict()
    state = tokens.state_dict(batches=1)
    for workers in (0, 3):
        other, batches = loader(store, workers)
        other.load_state_dict(state)
        error = RuntimeError if workers else ArgumentError  # a worker's errors come as torch makes them
        with pytest.raises(error, match=f"num_workers must be 2, as in the part that is over, got {workers}"):
            next(iter(batches))
    with pytest.raises(ArgumentError, match="batches must be how many there were, got -1"):
        tokens.state_dict(batches=-1)


def test_workers_refuse_what_they_cannot_do(store):
    _, batches = loader(store, statistics=True)
    with pytest.raises(RuntimeError, match="statistics must be left out in the workers of a DataLoader"):
        next(iter(batches))


def test_a_part_with_less_than_a_batch_is_an_error_in_its_worker(store):
    _, batches = loader(store, batch_size=30)
    with pytest.raises(RuntimeError, match="at most the number of tokens of each of 2 parts, 21"):
        next(iter(batches))


def test_an_iterator_at_work_can_be_copied_pickled_and_forked(store):
    tokens, _ = loader(store)
    next(tokens)
    copies = [copy.deepcopy(tokens), pickle.loads(pickle.dumps(tokens))]
    following = next(tokens)
    assert all(torch.equal(next(other), following) for other in copies)
    ahead = tokens._plan.ahead + 5  # what was made before the fork is used up, and more is made
    assert in_a_fork(lambda: [numbers(next(tokens)) for _ in range(ahead)]) == [
        numbers(next(tokens)) for _ in range(ahead)
    ]


def test_a_fork_lets_go_of_an_iterator_whose_thread_held_its_lock(store):
    tokens, _ = loader(store)
    next(tokens)
    iterators, changed = [tokens], tokens._prefetch._handover._changed
    del tokens, _

    def let_go():
        iterators.clear()
        gc.collect()
        return True

    is_held, is_over = threading.Event(), threading.Event()

    def hold():
        with changed:
            is_held.set()
            is_over.wait(PATIENCE_SECONDS)

    thread = threading.Thread(target=hold)
    thread.start()
    is_held.wait(PATIENCE_SECONDS)
    try:
        assert in_a_fork(let_go)
    finally:
        is_over.set()
        thread.join()


def in_a_fork(run):
    """What a function returns in a process that was forked; None where that hangs."""
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    process = context.Process(target=lambda: queue.put(run()), daemon=True)
    process.start()
    process.join(PATIENCE_SECONDS)
    process.kill()
    return queue.get() if process.exitcode == 0 else None


def test_the_thread_ends_when_the_iterator_is_dropped(store):
    wait_until_no_reader()
    tokens, _ = loader(store)
    next(tokens)
    assert len(readers()) == 1
    del tokens, _
    wait_until_no_reader()


def test_the_thread_ends_with_the_last_epoch_and_no_thread_is_begun_before_the_first_batch(store):
    wait_until_no_reader()
    tokens, _ = loader(store, epochs=1)
    iter(tokens)
    assert not readers()
    list(tokens)
    assert not readers()


def test_a_damaged_shard_is_an_error_in_its_turn_and_again_when_it_is_asked_for_again(tmp_path):
    store = token_store(tmp_path)
    tokens = store.tokens(KEY, batch_size=2, shuffle=False)
    shard = sorted((tmp_path / "out/shards").iterdir())[2]
    whole = shard.read_bytes()
    shard.write_bytes(b"")
    found = []
    with pytest.raises(StoreError, match="must be a readable shard"):
        found.extend(tokens)  # endless but for the error
    assert [numbers(batch) for batch in found] == [[number, number + 1] for number in range(0, 2 * len(found), 2)]
    with pytest.raises(StoreError):
        next(tokens)
    shard.write_bytes(whole)
    wanted = 2 * len(found)
    assert numbers(next(tokens)) == [wanted, wanted + 1]


def test_going_on_reads_nothing_that_was_used_up(tmp_path, monkeypatch):
    store = token_store(tmp_path, (10,) * 40, rows_per_unit=10)
    options = {"batch_size": 20, "block_bytes": 8, "buffer_bytes": 10_000, "epochs": 1}
    tokens = store.tokens(KEY, **options)
    windows = -(-400 // tokens._order().window)
    assert windows > 2
    real, read = Values.read_bytes, []

    def read_bytes(values, data, start):
        read.append(len(data))
        real(values, data, start)

    monkeypatch.setattr(Values, "read_bytes", read_bytes)
    for handed_out in range(20):
        read.clear()
        again = store.tokens(KEY, **options)
        again.load_state_dict({**tokens.state_dict(), "batches": handed_out})
        assert len(list(again)) == 20 - handed_out
        assert sum(read) == 8 * (400 - 20 * handed_out)  # blocks are single tokens here: exactly what was left


def test_a_script_ends_while_batches_are_made(tmp_path):
    token_store(tmp_path)
    code = """
        import sys
        from activation_extractor import open_store
        store = open_store(sys.argv[1])
        endless = [store.tokens(("a", "full"), batch_size=5, seed=seed) for seed in range(4)]
        first = [next(tokens) for tokens in endless]
        sys.kept = endless
    """
    command = [sys.executable, "-W", "error", "-c", textwrap.dedent(code), str(tmp_path / "out")]
    for _ in range(2):
        ended = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_SECONDS, check=False)
        assert (ended.returncode, ended.stderr) == (0, "")


def test_two_iterators_at_once_have_their_own_places(store):
    one, two = (store.tokens(KEY, batch_size=4, seed=seed) for seed in (1, 2))
    alone = [numbers(next(store.tokens(KEY, batch_size=4, seed=seed))) for seed in (1, 2)]
    assert [numbers(next(one)), numbers(next(two))] == alone


def test_threads_that_share_an_iterator_have_each_token_once(store):
    tokens = store.tokens(KEY, batch_size=1)
    with ThreadPoolExecutor(8) as threads:
        found = list(threads.map(lambda _: numbers(next(tokens))[0], range(COUNT)))
    assert sorted(found) == list(range(COUNT))
    assert tokens.state_dict()["batches"] == COUNT


def test_descriptors_are_closed_with_the_iterator(tmp_path):
    store = token_store(tmp_path)
    tokens = store.tokens(KEY, batch_size=4)
    next(tokens)
    del tokens, store
    gc.collect()
    folder = str(tmp_path)

    def open_files():
        links = [f"/proc/self/fd/{number}" for number in os.listdir("/proc/self/fd")]
        return [link for link in links if os.path.exists(link) and os.path.realpath(link).startswith(folder)]

    wait_until(lambda: not open_files())


def test_a_store_that_was_interrupted_says_so(tmp_path):
    from torch import nn

    from activation_extractor import extract

    class StopError(Exception):
        pass

    def rows():
        yield from torch.randn(6, 2, 4)
        raise StopError

    with pytest.raises(StopError):
        extract(nn.Linear(4, 4), rows(), "", out=tmp_path / "out", rows_per_unit=2, progress=False)
    store = open_store(tmp_path / "out")
    with pytest.warns(UserWarning, match="has no end: extract is at work, was interrupted"):
        store.tokens(batch_size=2)
    next(open_store(tmp_path / "out", partial=True).tokens(batch_size=2))  # as the text advises
    complete = extract(
        nn.Linear(4, 4), list(torch.randn(6, 2, 4)), "", out=tmp_path / "whole", rows_per_unit=2, progress=False
    )
    next(complete.tokens(batch_size=2))
