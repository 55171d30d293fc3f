"""`open_store` refuses what is no store, damaged or newer."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
import torch
from torch import nn

from activation_extractor import SafetensorsSink, Store, extract, open_store
from activation_extractor._steps import Step
from activation_extractor.errors import StoreError


@pytest.fixture
def store(tmp_path: Path) -> Store:
    sink = SafetensorsSink(tmp_path / "out", rows_per_unit=2)
    for index in range(3):
        sink.write(Step(index, 2, {("h.0", "mean"): torch.randn(2, 3)}, [2 * index, 2 * index + 1], {}))
    sink.close()
    return open_store(tmp_path / "out")


@pytest.mark.parametrize("kind", [str, Path])
def test_a_path_may_be_text_or_a_path(store, kind):
    assert open_store(kind(store.path)).ids == store.ids


def test_what_is_no_store_is_an_error(tmp_path):
    with pytest.raises(
        StoreError, match=r"must be a store, got no such folder\. Give the folder that was given as out="
    ):
        open_store(tmp_path / "missing")
    with pytest.raises(StoreError, match=r"must be a store, got a folder without manifest\.json\.") as caught:
        open_store(tmp_path)
    assert caught.value.path == tmp_path
    assert isinstance(caught.value, OSError)


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("{not json", r"must be a readable manifest, got JSONDecodeError\. Restore it from a copy\."),
        ("\udcff", r"must be a readable manifest, got UnicodeDecodeError\."),
        ("[]", r"must be the manifest of a store, got something else\."),
        ('{"format": "another"}', r"must be the manifest of a store, got something else\."),
        ('{"format": "activation_extractor store", "version": 2}', r"must be of version 1, got version 2\. Update"),
        ('{"format": "activation_extractor store"}', r"must be of version 1, got version None\."),
    ],
)
def test_another_manifest_is_an_error_that_names_the_file(tmp_path, content, text):
    (tmp_path / "manifest.json").write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(StoreError, match=text) as caught:
        open_store(tmp_path)
    assert caught.value.path == tmp_path / "manifest.json"


def test_a_manifest_without_columns_is_an_error(tmp_path):
    (tmp_path / "manifest.json").write_text(json.dumps({"format": "activation_extractor store", "version": 1}))
    with pytest.raises(StoreError):
        open_store(tmp_path)


def test_a_file_is_no_store(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(StoreError, match="must be a store"):
        open_store(tmp_path / "file")


def _header(shard: bytes) -> tuple[int, dict]:
    size = struct.unpack("<Q", shard[:8])[0]
    return size, json.loads(shard[8 : 8 + size])


def _without_metadata(shard: bytes) -> bytes:
    size, header = _header(shard)
    del header["__metadata__"]
    return shard[:8] + json.dumps(header).encode().ljust(size) + shard[8 + size :]


@pytest.mark.parametrize(
    "damage",
    [
        lambda shard: shard[:-1],
        lambda shard: shard[:50],
        lambda shard: b"",
        lambda shard: b"\xff" * len(shard),
        lambda shard: shard + b"more",
        lambda shard: shard.replace(b'"F32"', b'"Q32"'),
        _without_metadata,
    ],
    ids=["short", "header_only", "empty", "garbage", "long", "unknown_dtype", "no_metadata"],
)
def test_a_damaged_shard_is_an_error_that_names_it(store, damage):
    path = store.path / "shards/00000001.safetensors"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(
        StoreError, match=r"00000001\.safetensors' must be a readable shard, got .*\. Restore it"
    ) as caught:
        open_store(store.path)
    assert caught.value.path == path


def test_a_shard_that_vanishes_later_is_an_error_when_it_is_read(store):
    column = store["h.0", "mean"]
    (store.path / "shards/00000001.safetensors").unlink()
    assert column[0:2].shape == (2, 3)
    with pytest.raises(StoreError, match=r"00000001\.safetensors' must be a readable shard, got "):
        column.torch()


def test_a_shard_missing_between_others_is_an_error(store):
    (store.path / "shards/00000001.safetensors").unlink()
    with pytest.raises(StoreError):
        open_store(store.path)


@pytest.mark.parametrize("advice", ["delete it and extract again"])
def test_a_damaged_shard_may_be_deleted_and_the_data_extracted_again(tmp_path, advice):
    model, batches = nn.Sequential(nn.Linear(2, 2)), [torch.randn(2, 2)]
    extract(model, batches, "0", out=tmp_path / "out", progress=False)
    shard = tmp_path / "out/shards/00000000.safetensors"
    shard.write_bytes(b"")
    with pytest.raises(StoreError, match=advice):
        open_store(tmp_path / "out")
    shard.unlink()
    assert open_store(tmp_path / "out").rows == 0
    extract(model, batches, "0", out=tmp_path / "again", progress=False)
