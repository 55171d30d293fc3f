"""Columns as views of their files: nothing is copied, and no write reaches a file."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from releases import needs_copy_argument

from activation_extractor import NpySink, NpzSink, SafetensorsSink, Store, open_store
from activation_extractor._format._stored_rows import Ragged
from activation_extractor.errors import StoreError
from activation_extractor.sinks import Step

SINKS = [SafetensorsSink, NpySink, NpzSink]
MANY = 150
MOST_OPEN = 70


def written(folder: Path, make_sink: type, shards: int, rows: int = 4) -> Store:
    """A store whose row `i` is `[i, i, i]` in "dense", and `1 + i % 3` times `[i, i]` in "ragged"."""
    sink = make_sink(folder / "out", rows_per_unit=rows)
    for index in range(shards):
        numbers = torch.arange(index * rows, (index + 1) * rows)
        lengths = 1 + numbers % 3
        ragged = Ragged(numbers.repeat_interleave(lengths)[:, None].expand(-1, 2).float(), lengths)
        values = {("dense", "a"): numbers[:, None].expand(-1, 3).float(), ("ragged", "a"): ragged}
        sink.write(Step(index, rows, values))
    sink.close()
    return open_store(folder / "out")


@pytest.fixture(scope="module", params=SINKS)
def store(request):
    with tempfile.TemporaryDirectory() as folder:
        yield written(Path(folder), request.param, shards=3)


@contextlib.contextmanager
def _single(make_sink: type, values: torch.Tensor) -> Iterator[Store]:
    with tempfile.TemporaryDirectory() as folder:
        sink = make_sink(Path(folder) / "out")
        sink.write(Step(0, len(values), {("a", "a"): values}))
        sink.close()
        yield open_store(Path(folder) / "out")


def _resident(folder: Path) -> int:
    """How many bytes of the files in a folder are mapped and have been touched."""
    total, is_ours = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first = line.split()[0]
        if not first.endswith(":"):
            is_ours = str(folder) in line
        elif is_ours and first == "Rss:":
            total += int(line.split()[1]) * 1024
    return total


def test_a_mapped_column_is_every_shard_as_it_lies_there(store, reads):
    assert [part[:, 0].tolist() for part in store["dense"].mapped()] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
    ragged = store["ragged"].mapped()
    assert [part.shape for part in ragged] == [(7, 2), (8, 2), (9, 2)]
    assert torch.equal(torch.cat(ragged), store["ragged"].flat())
    assert sum(reads) == 24 * 8  # of flat() alone


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="the system does not tell what is resident")
@pytest.mark.parametrize("make_sink", SINKS)
def test_a_mapped_column_is_not_read_before_it_is_touched(make_sink):
    with _single(make_sink, torch.zeros(1024, 4096)) as store:
        (mapped,) = store["a"].mapped()
        view = np.array(store["a"], copy=False)
        assert _resident(store.path) == 0
        assert mapped[500, 3] == view[500, 3] == 0
        assert 0 < _resident(store.path) <= mapped.nbytes // 2


def test_a_write_to_a_mapped_column_reaches_neither_the_file_nor_another(store):
    dense = store["dense"]
    files = {path: path.read_bytes() for path in store.path.rglob("*") if path.is_file()}
    first, second = dense.mapped()[1], dense.mapped()[1]
    first.fill_(-1)
    assert second[:, 0].tolist() == [4, 5, 6, 7]
    assert dense[4:8].tolist() == dense.mapped()[1].tolist() == second.tolist()
    assert {path: path.read_bytes() for path in files} == files


@pytest.mark.parametrize("make_sink", SINKS)
def test_a_mapped_column_outlives_its_store(make_sink):
    with _single(make_sink, torch.arange(6.0).reshape(2, 3)) as store:
        (mapped,) = store["a"].mapped()
    del store
    assert mapped.tolist() == [[0, 1, 2], [3, 4, 5]]


@needs_copy_argument
@pytest.mark.parametrize("make_sink", SINKS)
def test_an_array_without_a_copy_is_a_view_of_the_only_shard(make_sink, reads):
    with _single(make_sink, torch.arange(6, dtype=torch.int32).reshape(2, 3)) as store:
        view = np.array(store["a"], copy=False)
        assert reads == []
        assert view.dtype == np.int32
        assert view.tolist() == [[0, 1, 2], [3, 4, 5]]
        view[0] = 9
        assert store["a"][0].tolist() == [0, 1, 2]
        assert np.asarray(store["a"], dtype=np.int32, copy=False).tolist() == [[0, 1, 2], [3, 4, 5]]
        with pytest.raises(ValueError, match=r"must keep its dtype, got dtype=float64\. Leave copy=False out\."):
            np.asarray(store["a"], dtype=np.float64, copy=False)
        assert np.asarray(store["a"], dtype=np.float64).dtype == np.float64  # as the text advises


@needs_copy_argument
def test_an_array_without_a_copy_cannot_be_had_of_several_shards_or_ragged_rows(store):
    for name in ("dense", "ragged"):
        with pytest.raises(
            ValueError, match=r"A view must be of one shard .*got Column\(.*\. Use column\.mapped\(\)\."
        ):
            np.array(store[name], copy=False)
        assert len(store[name].mapped()) == 3  # as the text advises


@needs_copy_argument
def test_an_array_without_a_copy_cannot_be_had_of_ragged_rows_of_a_single_shard(tmp_path):
    ragged = written(tmp_path, SafetensorsSink, shards=1)["ragged"]
    with pytest.raises(ValueError, match=r"Use column\.mapped\(\)\."):
        np.array(ragged, copy=False)
    assert torch.equal(ragged.mapped()[0], ragged.flat())


@needs_copy_argument
def test_an_array_without_a_copy_cannot_be_had_of_a_dtype_that_numpy_lacks():
    with _single(SafetensorsSink, torch.ones(2, 3, dtype=torch.bfloat16)) as store:
        with pytest.raises(ValueError, match=r"dtype of numpy, got Column\(.*bfloat16\)\. Use column\.mapped\(\)\."):
            np.array(store["a"], copy=False)
        assert store["a"].mapped()[0].dtype == torch.bfloat16
        assert np.array(store["a"]).dtype == np.float32


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="the system does not tell what is open")
@pytest.mark.parametrize("make_sink", SINKS)
def test_a_mapped_column_of_many_shards_holds_few_files_open(tmp_path, monkeypatch, make_sink):
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # as a power cut is not tested here
    store = written(tmp_path, make_sink, MANY, rows=1)
    before = len(os.listdir("/proc/self/fd"))
    mapped = store["dense"].mapped()
    assert [part[0, 0].item() for part in mapped] == list(range(MANY))
    assert len(os.listdir("/proc/self/fd")) - before <= MOST_OPEN


@pytest.mark.parametrize("make_sink", SINKS)
def test_a_file_that_is_cut_short_under_a_view_of_it_is_seen_when_it_is_mapped_again(tmp_path, make_sink):
    store = written(tmp_path, make_sink, shards=1)
    store["dense"].mapped()
    (shard,) = (store.path / "shards").iterdir()
    os.truncate(next(shard.glob("*-dense_a.npy")) if shard.is_dir() else shard, 0)
    with pytest.raises(StoreError, match="must be a readable shard, got "):
        store["dense"].mapped()
