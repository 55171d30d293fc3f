"""What columns read of their files: only what is asked for, with few files open, from any thread and process."""

from __future__ import annotations

import errno
import multiprocessing
import operator
import os
import pickle
import random
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch

from activation_extractor import NpySink, NpzSink, SafetensorsSink, Store, open_store
from activation_extractor._format import _reader
from activation_extractor._format._stored_rows import Ragged
from activation_extractor.errors import StoreError
from activation_extractor.sinks import Step

SINKS = [SafetensorsSink, NpySink, NpzSink]
ROW_BYTES = 12  # of "dense", three float32
MANY = 150
MOST_OPEN = 130


def written(folder: Path, make_sink: type, shards: int, rows: int = 4) -> Store:
    """A store whose row `i` is `[i, i, i]` in "dense", and `1 + i % 3` times `[i, i]` in "ragged"."""
    sink = make_sink(folder / "out", rows_per_unit=rows)
    for index in range(shards):
        numbers = torch.arange(index * rows, (index + 1) * rows)
        lengths = 1 + numbers % 3
        ragged = Ragged(numbers.repeat_interleave(lengths)[:, None].expand(-1, 2).float(), lengths)
        dense = numbers[:, None].expand(-1, 3).float()
        values = {("dense", "a"): dense, ("more", "a"): dense + 1, ("ragged", "a"): ragged}
        sink.write(Step(index, rows, values, [f"row {one}" for one in numbers.tolist()], {"label": numbers}))
    sink.close()
    return open_store(folder / "out")


@pytest.fixture(scope="module", params=SINKS)
def store(request):
    with tempfile.TemporaryDirectory() as folder:
        yield written(Path(folder), request.param, shards=3)


@pytest.fixture(scope="module", params=SINKS)
def wide(request):
    """A store of many shards."""
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)  # as a power cut is not tested here
        yield written(Path(folder), request.param, MANY, rows=1)


@pytest.mark.parametrize(
    ("index", "runs"),
    [
        (5, [1]),
        (-1, [1]),
        (slice(1, 3), [2]),
        (slice(0, 0), []),
        (slice(2, 7), [2, 3]),  # from two shards
        (slice(None), [4, 4, 4]),
        (slice(0, 8, 3), [1, 1, 1]),
        ([4, 5, 6], [3]),
        ([8, 9, 4, 5, 6, 0], [2, 3, 1]),
        ([3, 4], [1, 1]),
        ([2, 2], [1, 1]),
        ([], []),
        (np.arange(12) < 3, [3]),
    ],
    ids=str,
)
def test_only_the_bytes_asked_for_are_read_and_neighbours_at_once(store, reads, index, runs):
    store["dense"][index]
    assert reads == [rows * ROW_BYTES for rows in runs]


@pytest.mark.parametrize("index", [slice(None, None, -1), slice(10, 1, -3)])
def test_a_negative_step_reads_no_row_that_is_not_asked_for(store, reads, index):
    rows = range(12)[index]
    assert store["dense"][index][:, 0].tolist() == list(rows)
    assert sum(reads) == len(rows) * ROW_BYTES


def test_a_ragged_row_costs_its_positions_and_two_offsets(store, reads):
    assert store["ragged"][5].tolist() == [[5, 5]] * 3
    assert reads == [2 * 8, 3 * 8]
    reads.clear()
    store["ragged"][4:7]
    assert reads == [4 * 8, (2 + 3 + 1) * 8]


def test_a_column_tells_what_it_is_without_reading(store, reads):
    dense, ragged = store["dense"], store["ragged"]
    assert (len(dense), dense.shape, ragged.shape, dense.rows.tolist()) == (12, (12, 3), (12, None, 2), list(range(12)))
    assert repr(ragged) in repr([ragged])
    assert reads == []


def test_walking_through_a_column_reads_it_in_blocks_and_no_block_too_early(store, reads):
    assert [row[0].item() for row in store["dense"]] == list(range(12))
    assert reads == [4 * ROW_BYTES] * 3
    reads.clear()
    rows = chain.from_iterable(store["dense"].blocks(2 * ROW_BYTES))
    assert next(rows)[0] == next(rows)[0] - 1 == 0
    assert reads == [2 * ROW_BYTES]
    assert len(list(rows)) == 10
    assert reads == [2 * ROW_BYTES] * 6


def test_walking_through_a_ragged_column_reads_it_in_blocks_too(store, reads):
    rows = chain.from_iterable(store["ragged"].blocks(3 * 520))
    assert len(next(rows)) == 1
    assert len(reads) == 3 + 2  # offsets of all shards, then those of the first block and its values
    assert [1, *map(len, rows)] == [1 + row % 3 for row in range(12)]
    assert list(map(len, store["ragged"])) == [1 + row % 3 for row in range(12)]


def test_a_column_and_a_store_can_be_pickled(store):
    for one in (store["dense"], store["ragged"], store.keep["label"]):
        one[0]  # opens a file, which does not travel
        twin = pickle.loads(pickle.dumps(one))
        assert repr(twin) == repr(one)
        assert str(twin[:]) == str(one[:])
    assert pickle.loads(pickle.dumps(store)).ids == store.ids


def test_a_column_works_in_another_process(tmp_path):
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        for make_sink in SINKS:
            store = written(tmp_path / make_sink.__name__, make_sink, shards=2)
            store["dense"][0]
            assert pool.submit(operator.getitem, store["dense"], [5, 0]).result().tolist() == [[5] * 3, [0] * 3]
            assert pool.submit(operator.getitem, store["ragged"], 4).result().tolist() == [[4, 4], [4, 4]]
            assert repr(pool.submit(operator.getitem, store, "dense").result()) == repr(store["dense"])


def _open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


needs_proc = pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="the system does not tell what is open")


@needs_proc
def test_threads_share_a_column_and_few_files_stay_open(wide):
    dense, ragged, before, peaks = wide["dense"], wide["ragged"], _open_files(), []

    def read(seed: int) -> None:
        for row in random.Random(seed).sample(range(MANY), 50):
            assert dense[row].tolist() == [row] * 3
            assert ragged[row].tolist() == [[row, row]] * (1 + row % 3)
        peaks.append(_open_files() - before)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(read, range(8)))
    assert max(peaks) <= 2 * MOST_OPEN


def ways_to_read(store: Store, layers: list[str]) -> dict[str, Callable[[], object]]:
    columns = [store[layer] for layer in layers]
    order = random.Random(0).sample(range(MANY), MANY)
    return {
        "ids": lambda: store.ids,
        "whole": lambda: [column[:] for column in columns],
        "shuffled": lambda: [column[order] for column in columns],
        "rows": lambda: [column[row] for row in order[:100] for column in columns],
        "walk": lambda: [next(iter(column)) for column in columns],
        "flat": lambda: [(column.flat(), column.lengths()) for column in columns if column.is_ragged],
        "dataset": lambda: store.dataset(*layers, keep="label").__getitems__(order),
    }


@needs_proc
@pytest.mark.parametrize("layers", [["dense"], ["dense", "more", "ragged"]], ids=len)
def test_a_store_of_many_shards_holds_few_files_open_however_it_is_read(wide, layers):
    before = _open_files()
    for name, read in ways_to_read(open_store(wide.path), layers).items():
        read()
        assert _open_files() - before <= MOST_OPEN, name


@needs_proc
def test_files_are_closed_when_a_store_and_its_columns_are_gone(store):
    before = _open_files()
    again = open_store(store.path)
    columns = [again["dense"], again["ragged"]]
    assert all(len(column[:]) == 12 for column in columns)
    assert again.ids[0] == "row 0"
    assert _open_files() > before
    del again, columns
    assert _open_files() <= before


def file_of(store: Store, shard: int, entry: str) -> Path:
    path = sorted((store.path / "shards").iterdir())[shard]
    return next(path.glob(f"*-{entry}_a.npy")) if path.is_dir() else path


@pytest.mark.parametrize("make_sink", SINKS)
@pytest.mark.parametrize("size", [0, 100])
@pytest.mark.parametrize("is_open", [True, False])
@pytest.mark.parametrize("name", ["dense", "ragged"])
def test_a_file_that_is_cut_short_after_the_store_was_opened_is_an_error(tmp_path, make_sink, size, is_open, name):
    store = written(tmp_path, make_sink, shards=2)
    column = store[name]
    if is_open:
        column[5]
    os.truncate(file_of(store, 1, name), size)
    ways = [lambda: column[5], lambda: column[4:], lambda: column[[5]], lambda: column[:], lambda: list(column)]
    ways += [column.torch, column.mapped, *([column.flat] if column.is_ragged else [])]
    for way in ways:
        with pytest.raises(
            StoreError, match=r"must be a readable shard, got .*\. Restore it from a copy, or delete it"
        ):
            way()
    assert column[0].flatten()[0] == 0  # the other shard is well


@pytest.mark.parametrize("code", [errno.EIO, errno.ESTALE])
def test_a_disk_that_fails_while_it_is_read_is_an_error_that_names_the_file(store, monkeypatch, code):
    def preadv(*arguments):
        raise OSError(code, os.strerror(code))

    dense, ragged = store["dense"], store["ragged"]
    monkeypatch.setattr(_reader.os, "preadv", preadv)
    for ask in (lambda: dense[0], lambda: dense[:], lambda: ragged[0], ragged.flat):
        with pytest.raises(StoreError, match=f"must be a readable shard, got {os.strerror(code)}") as caught:
            ask()
        assert str(caught.value.path).startswith(str(store.path))


@pytest.mark.parametrize("code", [errno.EMFILE, errno.EACCES])
def test_a_shard_that_cannot_be_opened_now_is_not_to_be_deleted(store, monkeypatch, code):
    def refuse(path):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(_reader, "open_regular", refuse)
    with pytest.raises(StoreError, match=os.strerror(code)) as caught:
        open_store(store.path)["dense"][-1]
    assert "delete" not in str(caught.value)


@pytest.mark.parametrize("most", [1, 5, 12])
def test_a_system_that_gives_less_than_asked_for_is_asked_again(store, monkeypatch, most):
    real = os.preadv
    monkeypatch.setattr(_reader.os, "preadv", lambda file, buffers, at: real(file, [buffers[0][:most]], at))
    monkeypatch.setattr(_reader, "bytearray", lambda size: memoryview(bytearray(size)), raising=False)
    assert store["dense"][2:4].tolist() == [[2] * 3, [3] * 3]
    assert store["ragged"][5].tolist() == [[5, 5]] * 3
    assert store["dense"][5].tolist() == [5] * 3
