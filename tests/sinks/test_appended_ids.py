"""Adding rows to a large store of with-blocks: what is read grows with what is new, not with the store."""

from __future__ import annotations

import shutil

import pytest
import torch
from torch import nn
from wide_runs import SINKS

from activation_extractor import SafetensorsSink, capture, extract, open_store
from activation_extractor._format._reader import Reader
from activation_extractor.errors import StoreError
from activation_extractor.sinks import _store_writer

MODEL = nn.Sequential(nn.Linear(2, 3))


@pytest.fixture(autouse=True)
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_store_writer, "FEW_IDS", 100)
    monkeypatch.setattr(_store_writer, "FEW_UNITS", 8)


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The shards whose ids were read."""
    paths: list[str] = []
    ids = Reader.ids
    monkeypatch.setattr(Reader, "ids", lambda reader, path, *kind: paths.append(path) or ids(reader, path, *kind))
    return paths


def task(out, ids, sink=SafetensorsSink, *, append: bool = True, rows: int = 1, **options) -> None:
    with capture(MODEL, "0", sink=sink(out, append=append, **options)) as acts:
        for at in range(0, len(ids), rows):
            with acts.step(ids=ids[at : at + rows]):
                MODEL(torch.ones(len(ids[at : at + rows]), 2))


@pytest.mark.parametrize("kind", SINKS)
@pytest.mark.parametrize("append", [True, False])
def test_the_ids_of_a_large_store_are_not_read_again(tmp_path, read, kind, append):
    out, sink = tmp_path / "out", SINKS[kind]
    task(out, [f"row {row}" for row in range(200)], sink, append=append, rows=10, rows_per_unit=10)
    task(out, ["new"], sink)
    assert read == []
    for row in (0, 99, 199):
        with pytest.raises(StoreError, match=f"got 'row {row}', which it holds already"):
            task(out, [f"row {row}"], sink)
    with pytest.raises(StoreError, match="got 'new', which it holds already"):
        task(out, ["new"], sink)
    assert len(set(read)) == 1  # the shard of the row that is new
    store = open_store(out)
    assert store.rows == 201
    assert store.verify() == []


def test_what_is_read_at_each_of_many_small_tasks_stays_small(tmp_path, read):
    most = 0
    for number in range(60):
        task(tmp_path, [number])
        most = max(most, len(read))
        read.clear()
    assert most <= 8
    assert len(list((tmp_path / "ids").iterdir())) <= 5
    for number in (0, 30, 59):
        with pytest.raises(StoreError, match="which it holds already"):
            task(tmp_path, [number])
    assert open_store(tmp_path).ids == list(range(60))


def test_one_sink_that_is_entered_again_and_again_finds_every_id_that_came(tmp_path):
    sink = SafetensorsSink(tmp_path)
    for number in range(40):
        with capture(MODEL, "0", sink=sink) as acts, acts.step(ids=[number]):
            MODEL(torch.ones(1, 2))
    for number in (0, 20, 39):
        with pytest.raises(StoreError, match=f"must hold each id once, got {number}"):
            with capture(MODEL, "0", sink=sink) as acts, acts.step(ids=[number]):
                MODEL(torch.ones(1, 2))
    assert open_store(tmp_path).ids == list(range(40))


@pytest.mark.parametrize("loss", ["files", "a file", "a shard"])
def test_files_of_digests_are_a_cache(tmp_path, read, loss):
    task(tmp_path, list(range(200)), rows=10, rows_per_unit=10)
    if loss == "files":
        shutil.rmtree(tmp_path / "ids")
    elif loss == "a file":
        next((tmp_path / "ids").iterdir()).write_bytes(b"")
    else:
        next(iter(sorted((tmp_path / "shards").iterdir()))).unlink()
        shutil.rmtree(tmp_path / "journal")
        task(tmp_path, [3])  # its shard is gone
        assert open_store(tmp_path, partial=True).rows == 191
        return
    with pytest.raises(StoreError, match="got 7, which it holds already"):
        task(tmp_path, [7])
    assert len(read) == 20


def test_few_ids_and_rows_without_ids_and_data_sets_make_no_files(tmp_path):
    task(tmp_path / "few", [1, 2])
    with capture(MODEL, "0", sink=SafetensorsSink(tmp_path / "none", rows_per_unit=1)):
        for _ in range(200):
            MODEL(torch.ones(1, 2))
    data = [{"input": torch.ones(10, 2), "id": list(range(at, at + 10))} for at in range(0, 300, 10)]
    extract(MODEL, data, "0", out=tmp_path / "set", ids="id", rows_per_unit=10, progress=False)
    assert [name for name in ("few", "none", "set") if (tmp_path / name / "ids").exists()] == []


def test_a_disk_that_refuses_the_file_loses_no_row(tmp_path):
    (tmp_path / "out").mkdir()
    task(tmp_path / "out", [1])
    (tmp_path / "out" / "ids").touch()
    task(tmp_path / "out", list(range(100, 300)), rows=10, rows_per_unit=10)
    assert open_store(tmp_path / "out").rows == 201
    with pytest.raises(StoreError, match="got 150, which it holds already"):
        task(tmp_path / "out", [150])
