"""How many requests it takes to open and to verify a store of many shards in a bucket, and what verifying it finds."""

from __future__ import annotations

import time

import pytest
import torch

from activation_extractor import SafetensorsSink, extract, open_store
from activation_extractor._format._stored_rows import Ragged
from activation_extractor.sinks import Step
from activation_extractor.store import verify_store

pytest.importorskip("obstore", reason="the extra 'remote' is not installed")

SHARDS = 64
URL = "s3://bucket/store"


@pytest.fixture
def local(tmp_path, bucket):
    sink = SafetensorsSink(tmp_path / "store", rows_per_unit=2)
    for unit in range(SHARDS):
        values = {("a", "mean"): torch.randn(2, 40), ("b", "full"): Ragged(torch.randn(7, 3), torch.tensor([3, 4]))}
        sink.write(Step(unit, 2, values, [f"ü{unit}", f"b{unit}"], {"label": torch.tensor([unit, -unit])}))
    sink.close()
    bucket.add(tmp_path / "store", "store")
    return open_store(tmp_path / "store")


def names(bucket):
    return sorted(key for key in bucket.objects if "/shards/" in key)


def test_requests_are_in_proportion_to_what_is_read(local, bucket):
    for read, each in (
        (lambda store: store.ids, 2),  # the header, and the ids with their offsets
        (lambda store: store["b", "full"].lengths().tolist(), 2),
        (lambda store: store.keep["label"][:].tolist(), 2),
        (
            lambda store: [str(damage) for damage in store.verify()],
            5,
        ),  # header, values, ids, and offsets of two columns
    ):
        store = open_store(URL)
        bucket.requests.clear()
        assert read(store) == read(local)
        assert len(bucket.requests) <= each * SHARDS + 12, each


def test_ids_and_checks_of_many_shards_are_asked_for_at_a_time(local, bucket):
    bucket.latency = 0.1
    for read in (lambda store: store.ids, lambda store: list(store.verify())):
        start = time.perf_counter()
        assert read(open_store(URL)) == read(local)
        assert time.perf_counter() - start < SHARDS * bucket.latency


def test_a_store_without_journal_is_opened_by_headers_that_are_read_many_at_a_time(local, bucket):
    for key in [key for key in bucket.objects if "/journal/" in key]:
        del bucket.objects[key]
    bucket.latency = 0.1
    start = time.perf_counter()
    store = open_store(URL)
    assert time.perf_counter() - start < SHARDS * bucket.latency
    assert (store.rows, store.ids) == (local.rows, local.ids)


def test_row_numbers_of_a_store_without_ids_take_headers_that_are_read_at_a_time(tmp_path, bucket):
    rows = [{"input": torch.randn(1, 4)} for _ in range(SHARDS)]
    local = extract(torch.nn.Linear(4, 2), rows, "", out=tmp_path / "none", rows_per_unit=1, progress=False)
    bucket.add(tmp_path / "none", "none")
    bucket.latency = 0.1
    store = open_store("s3://bucket/none")
    start = time.perf_counter()
    assert store.ids == local.ids == list(range(SHARDS))
    assert time.perf_counter() - start < SHARDS * bucket.latency / 2
    assert torch.equal(store.row_numbers, local.row_numbers)


@pytest.mark.parametrize("request_bytes", [1, 7, 64, 1 << 23])
def test_verifying_finds_the_same_in_a_bucket_whatever_a_request_reads(local, bucket, monkeypatch, request_bytes):
    monkeypatch.setattr("activation_extractor.store._verify.REQUEST_BYTES", request_bytes)
    shards, folder = names(bucket), local.path / "shards"
    for number, at in ((3, -1), (5, -30), (9, -200), (9, -400), (20, -600)):
        data = bytearray(bucket.objects[shards[number]])
        data[at] ^= 1
        bucket.objects[shards[number]] = bytes(data)
    bucket.objects[shards[7]] = bucket.objects[shards[7]][:-4]
    bucket.objects[shards[8]] = b"nonsense" * 20
    bucket.objects[shards[30]] = bucket.objects[shards[31]]
    if request_bytes < 64:  # thousands of requests
        for key in shards[10:20] + shards[21:]:
            del bucket.objects[key]
    for path in folder.iterdir():
        path.unlink()
    for key in set(shards) & bucket.objects.keys():
        (folder / key.rpartition("/")[2]).write_bytes(bucket.objects[key])

    def found(where, place):
        return [(one.kind, str(one.path).removeprefix(place), one.detail.replace(place, "")) for one in where]

    here, there = found(verify_store(local.path), str(local.path)), found(verify_store(URL), URL)
    assert {kind for kind, *_ in here} >= {"altered", "truncated", "unreadable"}
    assert there == here
