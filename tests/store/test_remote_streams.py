"""Columns of a store in a bucket, read as a whole or in blocks: few large requests, many under way, bounded memory."""

from __future__ import annotations

import threading
import time

import pytest
import torch

from activation_extractor import SafetensorsSink, _requests, open_store
from activation_extractor.errors import StoreError
from activation_extractor.sinks import Ragged, Step

pytest.importorskip("obstore", reason="the extra 'remote' is not installed")

MIB = 1 << 20
URL = "s3://bucket/store"
DENSE, RAGGED, SHORT = ("a", "mean"), ("b", "full"), ("c", "mean")


def stored(tmp_path, bucket, units=3, rows=40, width=64, lengths=(0, 7)):
    """A store on the disk and the same in the bucket: a dense and a ragged column, and one that lacks a unit."""
    sink, generator = SafetensorsSink(tmp_path / "store", rows_per_unit=rows), torch.Generator().manual_seed(0)
    for unit in range(units):
        sizes = torch.randint(*lengths, (rows,), generator=generator)
        positions = torch.randn(int(sizes.sum()), width, generator=generator)
        values = {DENSE: torch.randn(rows, width, generator=generator), RAGGED: Ragged(positions, sizes)}
        if unit:
            values[SHORT] = torch.randn(rows, 3, generator=generator)
        sink.write(Step(unit, rows, values, [f"{unit}/{row}" for row in range(rows)]))
    sink.close()
    bucket.add(tmp_path / "store", "store")
    return open_store(tmp_path / "store")


def alike(one, other):
    if isinstance(one, list):
        return len(one) == len(other) and all(map(torch.equal, one, other))
    return torch.equal(one, other) and one.dtype == other.dtype


@pytest.mark.parametrize("nbytes", [1, 700, 5000, 1 << 20])
@pytest.mark.parametrize("request_bytes", [300, 4096, 1 << 23])
def test_blocks_are_those_of_a_local_store_wherever_requests_end(tmp_path, bucket, monkeypatch, nbytes, request_bytes):
    monkeypatch.setattr("activation_extractor.store._rows_in_bucket.REQUEST_BYTES", request_bytes)
    monkeypatch.setattr("activation_extractor.store._rows_in_bucket._FIRST_BYTES", min(1000, request_bytes))
    monkeypatch.setattr(_requests, "REQUEST_BYTES", request_bytes)
    local = stored(tmp_path, bucket)
    store, mask = open_store(URL), torch.arange(120) % 3 > 0
    choices = [None, slice(5, 118), slice(50, 50), slice(None, None, -1), mask, [3, 3, 119, 0, 80], []]
    choices.append([*range(30, 110)])
    if nbytes == 1 or request_bytes == 300:
        choices = [None, slice(5, 118), [3, 3, 119, 0]]
    for key in (DENSE, RAGGED):
        for indices in choices:
            for flat in (False, True):
                here, there = (one[key].blocks(nbytes, indices=indices, flat=flat) for one in (local, store))
                assert all(alike(one, other) for one, other in zip(here, there, strict=True)), (key, indices, flat)
    assert all(alike(*pair) for pair in zip(local[SHORT].blocks(nbytes), store[SHORT].blocks(nbytes), strict=True))


def test_a_block_has_memory_of_its_own(tmp_path, bucket):
    stored(tmp_path, bucket)
    blocks = list(open_store(URL)[DENSE].blocks(1000))
    assert all(block.untyped_storage().nbytes() == block.nbytes for block in blocks)
    blocks[0].zero_()
    assert blocks[1].count_nonzero() > 0


def test_a_column_is_read_by_few_large_requests_and_one_that_is_left_early_by_fewer(tmp_path, bucket):
    local = stored(tmp_path, bucket, units=1, rows=40, width=MIB // 4, lengths=(0, 1))  # a row is 1 MiB
    column = open_store(URL)[DENSE]
    column[0]
    bucket.requests.clear()
    assert all(map(torch.equal, column.blocks(), local[DENSE].blocks()))
    assert 5 <= len(bucket.requests) <= 8  # of 40 MiB: 1, 2, 4, 8, 8, ...
    bucket.requests.clear()
    assert torch.equal(column[:], local[DENSE][:])
    assert len(bucket.requests) == 5
    bucket.requests.clear()
    next(iter(column))
    time.sleep(0.2)
    assert len(bucket.requests) <= 6


def test_many_small_shards_are_read_at_a_time(tmp_path, bucket):
    local, latency = stored(tmp_path, bucket, units=64, rows=2, width=4), 0.1
    bucket.latency = latency
    for read in (lambda store: list(store[DENSE].blocks()), lambda store: list(store[RAGGED].blocks(flat=True))):
        store = open_store(URL)
        start = time.perf_counter()
        found = read(store)
        assert time.perf_counter() - start < 64 * latency  # one by one they take two times that
        assert all(map(torch.equal, found, read(local)))
    store = open_store(URL)
    start = time.perf_counter()
    assert all(map(alike, store[RAGGED].blocks(100), local[RAGGED].blocks(100)))
    assert time.perf_counter() - start < 64 * latency


def test_scattered_rows_of_a_ragged_column_do_not_take_a_request_each(tmp_path, bucket):
    local, order = stored(tmp_path, bucket, units=2, rows=200), torch.randperm(400)
    column = open_store(URL)[RAGGED]
    assert all(map(alike, column.blocks(indices=order), local[RAGGED].blocks(indices=order)))
    assert len(bucket.requests) < 20


def test_what_is_under_way_is_bounded():
    under_way, most, lock = 0, 0, threading.Lock()

    def call():
        nonlocal under_way, most
        with lock:
            under_way += 1
            most = max(most, under_way)
        time.sleep(0.01)
        return b""

    for nbytes, limit in ((_requests.REQUEST_BYTES, 8), (1, 64), (10 * _requests.AHEAD_BYTES, 2)):
        under_way = most = 0
        for _ in _requests.ahead((call, nbytes) for _ in range(200)):
            with lock:
                under_way -= 1
        assert 1 < most <= limit + 1


def test_joined_places_are_filled_by_one_request_and_large_ones_by_several(monkeypatch):
    monkeypatch.setattr(_requests, "REQUEST_BYTES", 100)
    places = [(memoryview(bytearray(size)), position) for size, position in ((10, 50), (10, 0), (250, 200), (10, 5))]
    groups = [([(len(data), at) for data, at in group], size) for group, size in _requests.joined(places, gap=40)]
    assert groups == [
        ([(10, 0), (10, 5), (10, 50)], 60),
        ([(100, 200)], 100),
        ([(100, 300)], 100),
        ([(50, 400)], 50),
    ]


def test_a_shard_that_goes_while_a_column_streams_is_an_error_that_names_it(tmp_path, bucket):
    stored(tmp_path, bucket, units=3, rows=20, width=MIB // 4, lengths=(0, 1))
    name = max(key for key in bucket.objects if key.endswith(".safetensors"))
    column = open_store(URL)[DENSE]
    with pytest.raises(StoreError, match="must be a readable shard, got no such object") as caught:
        for _ in column.blocks():
            bucket.objects.pop(name, None)
    assert str(caught.value.path) == f"s3://bucket/{name}"
