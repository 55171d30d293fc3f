"""Stores that lie in a bucket: byte-equal to those on a disk, in few requests, and clear when something fails."""

from __future__ import annotations

import multiprocessing
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from exports import make_store

from activation_extractor import (
    NpzSink,
    SafetensorsSink,
    _storage,
    capture,
    compare,
    export,
    open_store,
    statistics,
)
from activation_extractor._format._stored_rows import Ragged
from activation_extractor.errors import ArgumentError, MissingExtraError, StoreError
from activation_extractor.sinks import Step
from activation_extractor.store import verify_store

obstore = pytest.importorskip("obstore", reason="the extra 'remote' is not installed")

URL = "s3://bucket/my/store"


@pytest.fixture
def local(tmp_path, bucket):
    store = make_store(tmp_path)
    bucket.add(tmp_path / "store", "my/store")
    return store


def write_units(folder, units, rows=4):
    """Units of a dense and a ragged column, with ids."""
    sink = SafetensorsSink(folder, rows_per_unit=rows)
    for index in range(units):
        numbers = torch.arange(index * rows, (index + 1) * rows)
        dense = numbers.float().view(-1, 1)
        ragged = Ragged(dense.repeat(1, 6).view(-1, 2), torch.full((rows,), 3))
        values = {("a", "mean"): dense.repeat(1, 5), ("b", "full"): ragged}
        sink.write(Step(index, rows, values, [f"row {number}" for number in numbers.tolist()]))
    sink.close()


def same(one, other):
    if isinstance(one, list):
        return len(one) == len(other) and all(map(torch.equal, one, other))
    return torch.equal(one, other)


def test_every_way_of_reading_gives_what_a_local_store_gives(local):
    store = open_store(URL)
    assert (store.ids, store.pairs, store.rows, store.nbytes) == (local.ids, local.pairs, local.rows, local.nbytes)
    assert store.keep["label"][:].tolist() == local.keep["label"][:].tolist()
    for key in local.pairs:
        here, there = local[key], store[key]
        for index in (slice(None), slice(1, 3), [0, 2], [2, 0, 1, 1], [], 0, -1, slice(None, None, -1)):
            assert same(here[index], there[index]), (key, index)
        assert torch.equal(here.rows, there.rows)
        assert all(same(one, other) for one, other in zip(here.blocks(8), there.blocks(8), strict=True))
        assert all(same(one, other) for one, other in zip(here, there, strict=True))
        if here.is_ragged:
            assert torch.equal(here.flat(), there.flat())
            assert torch.equal(here.lengths(), there.lengths())
            flat = zip(here.blocks(8, flat=True), there.blocks(8, flat=True), strict=True)
            assert all(same(one, other) for one, other in flat)


def test_a_store_in_a_bucket_is_verified_compared_and_exported_like_any_other(local, tmp_path, bucket):
    store = open_store(URL)
    assert store.verify() == []
    assert compare(local, store).first_difference is None
    assert statistics(store["h.0", "mean"]) == statistics(local["h.0", "mean"])
    export(store, tmp_path / "there.npz", "npz")
    export(local, tmp_path / "here.npz", "npz")
    with np.load(tmp_path / "there.npz") as there, np.load(tmp_path / "here.npz") as here:
        assert all(np.array_equal(there[name], here[name]) for name in here.files)
    name = next(key for key in bucket.objects if key.endswith("0.safetensors"))
    bucket.objects[name] = bucket.objects[name][:-1] + bytes([bucket.objects[name][-1] ^ 1])
    assert [(one.kind, str(one.path)) for one in verify_store(URL)] == [("altered", f"s3://bucket/{name}")]
    bucket.objects["my/store/other.txt"] = b""
    assert [one.kind for one in verify_store(URL)] == ["foreign", "altered"]


def test_opening_takes_few_requests_however_many_units_there_are(tmp_path, bucket):
    write_units(tmp_path / "store", 300, rows=1)
    bucket.add(tmp_path / "store", "my/store")
    bucket.page = 100  # a listing of many pages
    store = open_store(URL)
    assert (store.rows, len(bucket.requests)) == (300, 7)


def test_rows_of_one_shard_are_read_by_few_requests_and_many_shards_at_a_time(tmp_path, bucket):
    write_units(tmp_path / "store", 2, rows=100)
    bucket.add(tmp_path / "store", "my/store")
    store = open_store(URL)
    bucket.requests.clear()
    rows = torch.randperm(200)[:80].tolist()
    assert store["a", "mean"][rows][:, 0].tolist() == rows
    assert len(bucket.requests) == 4  # the header of each shard, and its rows
    bucket.requests.clear()
    assert [row[0, 0].item() for row in store["b", "full"][rows]] == rows
    assert len(bucket.requests) <= 4  # offsets and positions
    bucket.requests.clear()
    assert store["a", "mean"][150].tolist() == [150] * 5
    assert len(bucket.requests) == 1


def test_a_path_object_and_the_command_line_take_the_url_too(local):
    from commands import run

    assert open_store(Path(URL)).ids == local.ids
    assert "All well" in run("verify", URL).stdout
    assert "h.0" in run("show", URL).stdout


def test_a_server_that_is_busy_or_breaks_off_is_asked_again(local, bucket):
    bucket.unavailable = 2
    store = open_store(URL)
    bucket.unavailable = bucket.broken = 1
    assert torch.equal(store["h.0", "mean"][:], local["h.0", "mean"][:])
    bucket.broken = 1
    assert torch.equal(store["h.0", "full"].flat(), local["h.0", "full"].flat())


@pytest.mark.parametrize(
    ("harm", "text"),
    [
        (lambda data: None, "must be a readable shard, got no such object"),
        (lambda data: data[:-4], "must be a readable shard, got a file that ends 4 bytes too early"),
        (lambda data: b"", "must be a readable shard, got "),
        (lambda data: b"nonsense" * 20, "must be a readable shard, got "),
    ],
    ids=["deleted", "cut", "empty", "other bytes"],
)
def test_a_shard_that_is_harmed_behind_our_back_is_an_error_that_names_it(local, bucket, harm, text):
    store = open_store(URL)
    name = next(key for key in bucket.objects if key.endswith("1.safetensors"))
    data = harm(bucket.objects.pop(name))
    if data is not None:
        bucket.objects[name] = data
    dense, ragged = store["h.0", "mean"], store["h.0", "full"]
    for read in (lambda: dense[-1], lambda: dense[:], lambda: dense[[4, 0]], lambda: ragged[:], ragged.flat):
        with pytest.raises(StoreError, match=text) as caught:
            read()
        assert str(caught.value.path) == f"s3://bucket/{name}"
    assert store["h.0", "mean"][0].shape == (2, 3)  # the other shard is well


def test_an_object_that_is_cut_or_gone_after_its_header_was_read_is_an_error(local, bucket):
    store = open_store(URL)
    column, name = store["h.0", "mean"], next(key for key in bucket.objects if key.endswith("1.safetensors"))
    assert torch.equal(column[:], local["h.0", "mean"][:])
    bucket.objects[name] = bucket.objects[name][:500]
    for read in (lambda: column[4], lambda: column[:], lambda: column[[0, 4]]):
        with pytest.raises(StoreError, match="must be a readable shard"):
            read()
    del bucket.objects[name]
    with pytest.raises(StoreError, match="must be a readable shard, got no such object"):
        column[4]


def test_a_place_without_a_store_and_a_server_that_is_not_there_are_sentences(bucket, monkeypatch):
    with pytest.raises(StoreError, match=r"^'s3://bucket/none' must be a store, got no manifest.json there"):
        open_store("s3://bucket/none")
    with pytest.raises(StoreError, match=r"^'s3://bucket/none' must be a store"):
        verify_store("s3://bucket/none")
    bucket.objects["bad/manifest.json"] = b"{"
    with pytest.raises(StoreError, match=r"^'s3://bucket/bad/manifest.json' must be a readable manifest"):
        open_store("s3://bucket/bad")


def test_urls_of_other_kinds_are_sentences(monkeypatch):
    for url in ("http://a/b", "ftp://a/b", "hf://a", Path("https://a/b"), Path("hf://a")):
        with pytest.raises(ArgumentError, match=r"^the URL of a store must begin with one of s3://, gs://, az://, mem"):
            open_store(url)
    for url in ("s3://", "memory://", "s3://a/../b"):
        with pytest.raises(ArgumentError, match=r"^the URL of a store must name a bucket"):
            open_store(url)
    monkeypatch.setattr(_storage, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"^A store in a bucket needs obstore, .*extractor\[remote\]"):
        open_store("s3://a/b")


def test_exports_are_written_to_a_disk_and_never_to_a_folder_that_is_called_like_a_bucket(local, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = sorted(os.listdir())
    for out in ("s3://bucket/x", "memory://x", Path("s3://bucket/x"), "hf://x"):
        with pytest.raises(ArgumentError, match="must be a folder on this machine, got .* copy it from or to a bucket"):
            export(local, out, "npz")
    for write in (lambda: capture(torch.nn.Linear(2, 2), "", sink="hf://x").__enter__(),):
        with pytest.raises(ArgumentError, match="must begin with one of s3://, gs://"):
            write()
    assert sorted(os.listdir()) == before


def test_a_folder_may_be_called_like_a_scheme(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "s3:").mkdir()
    make_store(tmp_path)
    (tmp_path / "store").rename(tmp_path / "s3:" / "store")
    assert open_store(Path("s3:/store")).rows == 5
    assert open_store("s3:/store").rows == 5


def test_other_formats_and_maps_are_errors_whose_advice_works(tmp_path, bucket, local):
    (tmp_path / "numpy").mkdir()
    make_store(tmp_path / "numpy", make_sink=NpzSink)
    bucket.add(tmp_path / "numpy" / "store", "numpy")
    with pytest.raises(StoreError, match=r"must hold safetensors to be read from a bucket, got shards of npz\. Copy"):
        open_store("s3://bucket/numpy")
    column = open_store(URL)["h.0", "mean"]
    with pytest.raises(StoreError, match=r"must lie on this machine to be mapped, .* Read it with column\[...\] or"):
        column.mapped()


def test_a_store_in_memory_is_the_same_for_all_of_a_process(local, bucket):
    memory = _storage.bucket_of("memory://tests")
    for name, data in bucket.objects.items():
        obstore.put(memory, name.removeprefix("my/"), data, mode="create")
    assert torch.equal(open_store("memory://tests/store")["h.0", "mean"][:], local["h.0", "mean"][:])


def read_there(pickled):
    return pickle.loads(pickled)["h.0", "mean"][:].tolist()


def test_another_process_reads_it_and_a_fork_of_a_reader_is_told_to_be_spawned(local):
    store = open_store(URL)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(read_there, [pickle.dumps(store)]) == local["h.0", "mean"][:].tolist()
    from torch.utils.data import DataLoader

    loader = DataLoader(store.dataset(("h.0", "mean")), batch_size=2, num_workers=1, multiprocessing_context="fork")
    text = "must be read by processes that are no copies of a reader, got a forked one. Start them anew"
    with pytest.raises(RuntimeError, match=text):  # torch raises it, with the error of the worker as its text
        list(loader)
