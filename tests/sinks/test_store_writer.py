"""The store's writer: what lies in the folder at each moment, read back with safetensors, numpy and json themselves."""

from __future__ import annotations

import errno
import json
import os
import threading
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from unit_by_unit import UnitByUnit

from activation_extractor._format._codecs import CODECS, SAFETENSORS
from activation_extractor._format._journal import Journal
from activation_extractor._format._shards import unit_name
from activation_extractor.errors import ArgumentError, StoreError
from activation_extractor.sinks import Step, _store_writer
from activation_extractor.sinks._resume import check_free

NAMES = ["20260101T000000000000-00000000", "20260101T000000000001-0000abcd"]
RUN = {"fingerprint": {"model": "Tiny"}, "batches_per_unit": None, "model": "Tiny"}  # as the manifest has it


def writer(folder: Path, number: int = 0, codec=SAFETENSORS, *, shares_store=False) -> UnitByUnit:
    made = UnitByUnit(folder, codec, queue_bytes=1 << 20, shares_store=shares_store)
    made.journal = Journal(made.folder, NAMES[number])
    made.begin(RUN["fingerprint"])
    return made


def step(ids: list | None, value: float = 0.0, layers=("h.0",), rows: int | None = None, **kinds) -> Step:
    rows = len(ids) if ids else rows or 1
    return Step(0, rows, {(layer, "mean"): torch.full((rows, 3), value, **kinds) for layer in layers}, ids, {})


def tree(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def journal(folder: Path, number: int = 0) -> list[dict]:
    return [json.loads(line) for line in (folder / "journal" / f"{NAMES[number]}.jsonl").read_text().splitlines()]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "deep" / "store"


def test_folders_are_made_at_the_first_step_and_files_at_the_first_unit(folder):
    made = writer(folder)
    assert not folder.parent.exists()
    made.add(step(["a"]))
    made.finish()
    assert tree(folder) == ["shards"]
    made.commit(unit_name(0))
    made.finish()
    assert tree(folder) == [
        "journal",
        f"journal/{NAMES[0]}.jsonl",
        "manifest.json",
        "shards",
        "shards/00000000.safetensors",
    ]


def test_units_are_read_back_with_safetensors(folder):
    made = writer(folder)
    assert made.add(step(["a", "é"], 1.0)) == 2 * 3 * 4
    made.add(step(["c"], 2.0))
    assert made.unit.rows == 3
    made.commit(unit_name(0), {"batches": "2"})
    assert made.unit.rows == 0
    made.add(step(["d"], 3.0))
    made.commit(unit_name(1))
    made.finish()
    assert (made.rows, made.nbytes) == (4, 4 * 3 * 4)
    paths = [folder / "shards" / f"0000000{number}.safetensors" for number in range(2)]
    entries = [load_file(path) for path in paths]
    assert entries[0]["h.0:mean"].tolist() == [[1.0] * 3, [1.0] * 3, [2.0] * 3]
    assert bytes(entries[0]["#ids"].tolist()).decode() == "aéc"
    assert entries[0]["#ids#offsets"].tolist() == [0, 1, 3, 4]
    assert entries[1]["h.0:mean"].tolist() == [[3.0] * 3]
    with safe_open(paths[0], framework="pt") as file:
        about = file.metadata()
    crcs = {f"crc32:{name}": f"{zlib.crc32(tensor.numpy().tobytes()):08x}" for name, tensor in entries[0].items()}
    store, seal = about.pop("store"), about.pop("seal")
    assert about == {"unit": "00000000", "rows": "3", "batches": "2", **crcs}
    assert [(one["unit"], one["rows"], one["bytes"]) for one in journal(folder)] == [
        ("00000000", 3, paths[0].stat().st_size),
        ("00000001", 1, paths[1].stat().st_size),
    ]
    assert journal(folder)[0]["seal"] == seal
    with safe_open(paths[1], framework="pt") as file:
        assert file.metadata()["store"] == store


@pytest.mark.parametrize("name", ["npz", "npy"])
def test_units_are_read_back_with_numpy(folder, name):
    made = writer(folder, codec=CODECS[name])
    made.add(step([1, 2], 1.5, dtype=torch.bfloat16))
    made.commit(unit_name(0))
    made.finish()
    shard = folder / "shards" / f"00000000.{name}"
    arrays = list(np.load(shard).values()) if name == "npz" else [np.load(one) for one in shard.glob("*.npy")]
    assert sorted(array.tolist() for array in arrays if array.dtype == np.float32) == [[[1.5] * 3] * 2]
    assert [array.tolist() for array in arrays if array.dtype == np.int64] == [[1, 2]]
    (column,) = json.loads((folder / "manifest.json").read_text())["columns"]
    assert (column["dtype"], column["converted_from"]) == ("float32", "bfloat16")


def test_the_manifest_says_what_the_first_unit_held(folder):
    made = writer(folder)
    made.unit_size = {"rows_per_unit": 4}
    made.add(step([1], layers=("h.0", "h.1")))
    made.commit(unit_name(0))
    made.add(step([2], layers=("h.0", "h.2")))
    made.commit(unit_name(1))
    made.finish()
    manifest = json.loads((folder / "manifest.json").read_text())
    assert {name: manifest[name] for name in RUN} == RUN
    assert manifest["rows_per_unit"] == 4
    assert [column["layer"] for column in manifest["columns"]] == ["h.0", "h.1"]
    assert (manifest["ids"], manifest["codec"], manifest["keep"]) == ("int", "safetensors", [])
    assert "counts" not in journal(folder)[0]
    assert journal(folder)[1]["counts"] == {"h.0:mean": 1, "h.2:mean": 1}


def test_the_manifest_is_there_before_the_first_shard_and_the_shard_before_its_line(folder, monkeypatch):
    published, link = [], os.link

    def noted(source, path) -> None:
        published.append((Path(path).name, (folder / "journal").exists()))
        link(source, path)

    monkeypatch.setattr(os, "link", noted)
    made = writer(folder)
    for number in range(2):
        made.add(step([number]))
        made.commit(unit_name(number))
    made.finish()
    assert published == [("manifest.json", False), ("00000000.safetensors", False), ("00000001.safetensors", True)]


def test_writing_is_done_on_another_thread(folder, monkeypatch):
    names, fsync = set(), os.fsync
    monkeypatch.setattr(os, "fsync", lambda one: names.add(threading.current_thread().name) or fsync(one))
    made = writer(folder)
    made.add(step([1]))
    made.commit(unit_name(0))
    made.finish()
    assert names == {"activation_extractor writer"}


def test_a_folder_that_cannot_be_written_to_is_noticed_at_the_first_step(folder, monkeypatch):
    open_file, made = os.open, writer(folder)

    def read_only(path, flags, *rest, **more) -> int:
        if flags & os.O_CREAT:
            raise OSError(errno.EROFS, "Read-only file system", str(path))
        return open_file(path, flags, *rest, **more)

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", read_only)
        with pytest.raises(
            StoreError,
            match="shards' must be a folder that can be written to, got Read-only file system. Choose another",
        ):
            made.add(step(["a"]))
    assert made.rows == made.unit.rows == 0
    made.add(step(["a"]))  # once it can be
    with monkeypatch.context() as patch:
        patch.setattr(os, "open", read_only)
        made.add(step(["b"]))  # looked at once
    assert made.rows == 2


def test_a_file_in_the_way_is_noticed_at_the_first_step(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(StoreError, match="must be a folder that can be written to, got Not a directory. Choose"):
        writer(tmp_path / "file").add(step(["a"]))
    assert (tmp_path / "file").read_text() == "mine"


def test_old_drafts_are_swept_and_nothing_else(folder):
    names = [f".{'a' * 32}.tmp", f".{'b' * 32}.tmp", "mine.tmp"]
    (folder / "shards").mkdir(parents=True)
    for name in names:
        (folder / "shards" / name).touch()
    for name in (names[0], names[2]):
        os.utime(folder / "shards" / name, (time.time() - 9999,) * 2)
    writer(folder).add(step(["a"]))
    assert sorted(os.listdir(folder / "shards")) == sorted(names[1:])


@pytest.mark.parametrize("ids", [["a", "b"], [3, 4]])
def test_an_id_that_comes_again_is_an_error_also_in_a_later_unit(folder, ids):
    made = writer(folder)
    made.add(step(ids))
    made.commit(unit_name(0))
    text = rf"store' must hold each id once, got {ids[1]!r} again\. Give every row an id of its own\."
    with pytest.raises(StoreError, match=text):
        made.add(step([ids[1]]))
    made.remember_ids([type(ids[0])(5)])
    made.remember_ids(None)
    with pytest.raises(StoreError, match="must hold each id once"):
        made.add(step([type(ids[0])(5)]))
    made.finish()
    assert (made.rows, made.unit.rows) == (2, 0)


@pytest.mark.parametrize(
    "refused", [step(["x", "x"], layers=("h.0", "new")), step(["x"], layers=("new", "h.0"), dtype=torch.complex128)]
)
def test_a_step_that_is_refused_changes_nothing(folder, refused):
    made = writer(folder)
    with pytest.raises((StoreError, ArgumentError)):
        made.add(refused)
    assert (made.rows, made.nbytes, made.unit.rows, made.unit.nbytes) == (0, 0, 0, 0)
    check_free(folder)
    made.add(step([1], layers=("h.0",)))
    made.add(step([2], layers=("h.0", "new"), dtype=torch.float32))
    made.commit(unit_name(0))
    made.finish()
    assert load_file(folder / "shards" / "00000000.safetensors")["#ids"].tolist() == [1, 2]
    assert json.loads((folder / "manifest.json").read_text())["ids"] == "int"


def test_a_full_disk_is_an_error_at_the_next_step_and_complete_shards_stay(folder, monkeypatch):
    made, fsync = writer(folder), os.fsync
    made.add(step([0], 5.0))
    made.commit(unit_name(0))
    made.finish()
    before = {name: (folder / name).read_bytes() for name in tree(folder) if (folder / name).is_file()}

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    text = r"00000001.safetensors' must be writable, got No space left on device\. Check the folder, its permissions"
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        made.add(step([1]))
        made.commit(unit_name(1))
        with pytest.raises(StoreError, match=text):
            for number in range(2, 10_000):
                made.add(step([number]))
        with pytest.raises(StoreError, match=text):
            made.commit(unit_name(2))
        with pytest.raises(StoreError, match=text):
            made.finish()
    assert os.fsync is fsync
    assert {name: (folder / name).read_bytes() for name in tree(folder) if (folder / name).is_file()} == before
    made.add(step([-1], 6.0))
    made.commit(unit_name(3))
    made.finish()
    assert load_file(folder / "shards" / "00000003.safetensors")["h.0:mean"].tolist() == [[6.0] * 3]


def test_a_disk_that_is_full_from_the_beginning_leaves_a_folder_that_is_free(folder, monkeypatch):
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    made = writer(folder)
    made.add(step([0]))
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        made.commit(unit_name(0))
        with pytest.raises(StoreError, match="manifest.json' must be writable, got No space left on device"):
            made.finish()
    assert tree(folder) == ["shards"]
    check_free(folder)


def test_the_unit_that_is_gathered_counts_beside_those_that_wait_to_be_written(folder, monkeypatch):
    gate, write = threading.Event(), _store_writer.write_shard
    monkeypatch.setattr(_store_writer, "write_shard", lambda *arguments: gate.wait(10) and write(*arguments))
    made = UnitByUnit(folder, SAFETENSORS, queue_bytes=1, shares_store=False)
    made.add(step([9]))
    held_bytes = made.unit.held_bytes
    made = UnitByUnit(folder, SAFETENSORS, queue_bytes=3 * held_bytes, shares_store=False)
    made.journal = Journal(made.folder, NAMES[0])
    made.begin(RUN["fingerprint"])
    waits = []
    for number in range(3):
        made.add(step([number]))  # 12 bytes
        thread = threading.Thread(target=made.commit, args=(unit_name(number),))
        thread.start()
        thread.join(0.05)
        waits.append(thread.is_alive())
    gate.set()
    thread.join()
    made.finish()
    assert waits == [False, False, True]
    assert len(journal(folder)) == 3
