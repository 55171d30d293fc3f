"""Batches for training out of a store in a bucket: those of a local store, by many requests at a time."""

from __future__ import annotations

import threading
import time
from itertools import islice

import pytest
import torch
from token_stores import IDS, KEY, LENGTHS, MEAN, OTHER, numbers, token_store
from torch.utils.data import DataLoader

from activation_extractor import open_store
from activation_extractor.errors import StoreError

pytest.importorskip("obstore", reason="the extra 'remote' is not installed")
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")  # on a machine with one core

URL = "s3://bucket/store"
COUNT = sum(LENGTHS)
SMALL = {"batch_size": 4, "buffer_bytes": 1200, "block_bytes": 24}


def stored(folder, bucket, lengths=LENGTHS, **options):
    """The same store on the disk and in the bucket."""
    local = token_store(folder, lengths, **options)
    bucket.add(folder / "out", "store")
    return local, open_store(URL)


def same(one, other):
    if isinstance(one, tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other if isinstance(one, list) else one.dtype == other.dtype and torch.equal(one, other)


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize(
    ("keys", "options"),
    [
        ([KEY], {}),
        ([KEY, OTHER], {}),
        ([KEY], {"beside": IDS, "rows": True, "keep": ["label", "text"]}),
        ([KEY, OTHER], {"beside": [IDS], "rows": True, "drop_last": False, "rank": 1, "world": 3}),
        ([KEY], {"statistics": True, "buffer_bytes": 10**6, "block_bytes": 1}),
    ],
    ids=["one key", "two keys", "beside", "rank", "statistics"],
)
def test_tokens_are_those_of_a_local_store(tmp_path, bucket, keys, options, shuffle):
    options = {**SMALL, "shuffle": shuffle, "seed": 3, "epochs": 3, **options}
    here, there = (store.tokens(*keys, **options) for store in stored(tmp_path, bucket))
    assert all(same(one, other) for one, other in zip(here, there, strict=True))
    assert here.state_dict()["batches"] == there.state_dict()["batches"] > 0
    if here._statistics is not None:
        assert torch.equal(here.statistics.mean, there.statistics.mean)


@pytest.mark.parametrize("shuffle", [True, False])
def test_batches_of_rows_are_those_of_a_local_store(tmp_path, bucket, shuffle):
    options = {"batch_size": 3, "shuffle": shuffle, "epochs": 2, "rows": True, "keep": "label", "drop_last": False}
    here, there = (store.batches(MEAN, **options) for store in stored(tmp_path, bucket))
    assert all(same(one, other) for one, other in zip(here, there, strict=True))


def test_a_state_goes_on_in_the_bucket_where_a_local_iterator_stood_and_back(tmp_path, bucket):
    local, store = stored(tmp_path, bucket)
    for taken in (0, 1, 7, 10, 13):
        here, there = (one.tokens(KEY, epochs=2, **SMALL) for one in (local, store))
        head = list(islice(here, taken))
        assert len(head) == taken
        there.load_state_dict(here.state_dict())
        assert all(map(torch.equal, list(islice(there, 3)), list(islice(here, 3))))
        again = local.tokens(KEY, epochs=2, **SMALL)
        again.load_state_dict(there.state_dict())
        assert all(same(one, other) for one, other in zip(there, again, strict=True))


def test_a_state_reads_nothing_that_was_used_up(tmp_path, bucket):
    lengths = [100] * 40  # 4,000 tokens of 8 bytes
    _, store = stored(tmp_path, bucket, lengths, rows_per_unit=40)
    options = {"batch_size": 40, "epochs": 1, "buffer_bytes": 10**6, "block_bytes": 80, "shuffle": False}
    batches = store.tokens(KEY, **options)
    batches.load_state_dict({**batches.state_dict(), "batches": 90})
    bucket.requests.clear()
    found = [number for batch in batches for number in numbers(batch)]
    assert found == [*range(3600, 4000)]
    spans = [one.rpartition("bytes=")[2].split("-") for one in bucket.requests if "bytes=" in one]
    starts = [int(start) for start, _ in spans if start != "0"]
    assert min(starts) > 3600 * 8


def test_three_ranks_of_two_spawned_workers_have_disjoint_parts_that_are_complete(tmp_path, bucket):
    _, store = stored(tmp_path, bucket)
    found = []
    for rank in range(3):
        tokens = store.tokens(KEY, rank=rank, world=3, epochs=1, drop_last=False, **SMALL)
        workers = {"num_workers": 2, "multiprocessing_context": "spawn"}
        found += [number for batch in DataLoader(tokens, batch_size=None, **workers) for number in numbers(batch)]
    assert sorted(found) == list(range(COUNT))


def test_a_forked_worker_is_told_to_be_spawned(tmp_path, bucket):
    _, store = stored(tmp_path, bucket)
    tokens = store.tokens(KEY, epochs=1, **SMALL)
    with pytest.raises(RuntimeError, match=r"copies of a reader, got a forked one\. Start them anew.*'spawn'"):
        list(DataLoader(tokens, batch_size=None, num_workers=1, multiprocessing_context="fork"))


@pytest.mark.parametrize("shuffle", [True, False])
def test_an_object_that_is_gone_or_cut_is_an_error_that_names_it(tmp_path, bucket, shuffle):
    _, store = stored(tmp_path, bucket)
    name = sorted(key for key in bucket.objects if key.endswith(".safetensors"))[1]
    data = bucket.objects[name]
    for harmed, text in ((None, "got no such object"), (data[:300], "must be a readable shard, got ")):
        tokens = store.tokens(KEY, epochs=2, shuffle=shuffle, **SMALL)
        bucket.objects.pop(name) if harmed is None else bucket.objects.update({name: harmed})
        with pytest.raises(StoreError, match=text) as caught:
            list(tokens)
        assert str(caught.value.path) == f"s3://bucket/{name}"
        bucket.objects[name] = data
        if not shuffle:
            assert len(list(tokens)) > 0  # it goes on where it stood, once the object is there again


def test_a_server_that_is_busy_or_breaks_off_is_asked_again(tmp_path, bucket):
    local, store = stored(tmp_path, bucket)
    here, there = (one.tokens(KEY, epochs=1, **SMALL) for one in (local, store))
    bucket.unavailable = bucket.broken = 2
    assert all(map(torch.equal, here, there))


def test_a_gone_object_among_many_columns_scanned_in_step_is_an_error(tmp_path, bucket):
    _, store = stored(tmp_path, bucket)
    name = max(key for key in bucket.objects if key.endswith(".safetensors"))
    del bucket.objects[name]
    with pytest.raises(StoreError, match="must be a readable shard, got no such object"):
        store.tokens(KEY, OTHER, **SMALL)


def test_many_blocks_are_asked_for_at_a_time_and_headers_once(tmp_path, bucket):
    lengths, latency = [50] * 120, 0.1  # 60 shards of 100 tokens
    local, store = stored(tmp_path, bucket, lengths, rows_per_unit=2)
    bucket.latency = latency
    bucket.requests.clear()
    start = time.perf_counter()
    tokens = store.tokens(KEY, OTHER, beside=IDS, batch_size=100, epochs=1, block_bytes=160)
    assert len(bucket.requests) == 60  # a header each, for three columns
    found = list(tokens)
    assert time.perf_counter() - start < 60 * latency
    assert len(bucket.requests) <= 60 * 4  # neighbouring blocks together
    assert len(found) == 60
    assert all(map(same, found, local.tokens(KEY, OTHER, beside=IDS, batch_size=100, epochs=1, block_bytes=160)))


def test_an_iterator_that_is_left_ends_its_threads(tmp_path, bucket):
    _, store = stored(tmp_path, bucket)
    before = threading.active_count()
    for shuffle in (True, False):
        tokens = store.tokens(KEY, shuffle=shuffle, **SMALL)
        next(tokens)
        del tokens
    deadline = time.monotonic() + 30
    while threading.active_count() > before + 4 and time.monotonic() < deadline:  # the server has threads, too
        time.sleep(0.05)
    names = [thread.name for thread in threading.enumerate()]
    assert "activation_extractor reader" not in names
