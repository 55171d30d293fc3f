"""`verify_store`: each damage is found, told apart and named, and nothing is written."""

from __future__ import annotations

import errno
import json
import os
import pickle
import shutil
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from activation_extractor import NpySink, NpzSink, SafetensorsSink, Store, open_store
from activation_extractor._format._stored_rows import Ragged
from activation_extractor.errors import StoreError
from activation_extractor.sinks import Step
from activation_extractor.store import Damage, _verify, verify_store

SINKS = [SafetensorsSink, NpySink, NpzSink]


def step(index: int, ids: list | None) -> Step:
    ragged = Ragged(torch.arange(3.0)[:, None] + index, torch.tensor([1, 2]))
    return Step(index, 2, {("a", "mean"): torch.full((2, 3), index + 0.5), ("r", "full"): ragged}, ids, {})


def written(folder: Path, make_sink: type, first: int = 0, **about: str) -> Store:
    """A store of two shards."""
    sink = make_sink(folder, rows_per_unit=2)
    sink.begin(about)
    for index in (first, first + 1):
        sink.write(step(index, [f"x{2 * index}", f"x{2 * index + 1}"]))
    sink.close()
    return open_store(folder)


@pytest.fixture(params=SINKS)
def store(tmp_path, request) -> Store:
    return written(tmp_path / "out", request.param)


def shards(store: Store) -> list[Path]:
    return sorted((store.path / "shards").iterdir())


def part_of(shard: Path, entry: str) -> tuple[Path, int]:
    """The file and the first byte of an entry's values, found with the formats' own means."""
    if shard.is_dir():
        path = next(shard.glob(f"*-{entry.replace(':', '_')}.npy"))
        return path, path.stat().st_size - np.load(path).nbytes
    if shard.suffix == ".npz":
        with zipfile.ZipFile(shard) as archive, archive.open(entry + ".npy") as member:
            start, size = member._orig_compress_start, member._orig_file_size
            return shard, start + size - np.load(member).nbytes
    data = shard.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    return shard, 8 + length + json.loads(data[8 : 8 + length])[entry]["data_offsets"][0]


def flip(path: Path, position: int, bit: int = 0) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1 << bit
    path.write_bytes(data)


def tree(folder: Path) -> dict[str, tuple]:
    return {
        str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.is_file() and path.read_bytes())
        for path in folder.rglob("*")
    }


def test_a_fresh_store_has_no_damage(store):
    assert store.verify() == verify_store(str(store.path)) == []
    shutil.rmtree(store.path / "journal")  # which can be made anew
    assert store.verify() == []


def test_what_was_read_is_counted_whether_it_is_damaged_or_not(store):
    paths = shards(store)
    flip(*part_of(paths[0], "a:mean"), bit=0)
    (store.path / "shards" / "mine").write_bytes(b"12345")
    files = [file for path in paths for file in (path.iterdir() if path.is_dir() else [path])]
    found = store.verify()
    assert (len(found), found.shards, found.nbytes) == (2, 2, sum(file.stat().st_size for file in files))
    assert pickle.loads(pickle.dumps(found)).shards == 2


@pytest.mark.parametrize("entry", ["a:mean", "r:full", "r:full#offsets", "#ids", "#ids#offsets"])
@pytest.mark.parametrize("chunk_bytes", [5, 1 << 22])
def test_a_flipped_bit_in_the_values_is_an_altered_entry(store, entry, chunk_bytes, monkeypatch):
    monkeypatch.setattr(_verify, "_CHUNK_BYTES", chunk_bytes)
    path, start = part_of(shards(store)[1], entry.replace("#", "_") if shards(store)[1].is_dir() else entry)
    flip(path, start, bit=0)
    damages = store.verify()
    assert damages[0] == Damage(path, "altered", f"other bytes in {entry!r} than were written")
    assert {one.path for one in damages} <= {path, shards(store)[1]}


def test_a_flipped_bit_in_the_last_value_is_found_too(store):
    path, start = part_of(shards(store)[0], "a:mean")
    flip(path, start + 2 * 3 * 4 - 1, bit=7)
    assert store.verify() == [Damage(path, "altered", "other bytes in 'a:mean' than were written")]


def test_a_flipped_bit_in_a_header_is_found(store):
    shard = shards(store)[0]
    header = {".safetensors": 20, ".npz": shard.stat().st_size - 20}.get(shard.suffix, 20)
    path = shard / "about.json" if shard.is_dir() else shard
    flip(path, header)
    (damage,) = store.verify()
    assert (damage.path, damage.kind) == (shard, "unreadable")
    assert f"{shard.name}' must be a readable shard, got " in damage.detail


def _others_read(shard: Path) -> str:
    """What safetensors and numpy themselves find in a shard."""
    if shard.is_dir():
        return str([(path.name, np.load(path)) for path in sorted(shard.glob("*.npy"))])
    if shard.suffix == ".npz":
        with np.load(shard) as archive:
            return str([(name, archive[name]) for name in archive.files])
    return str(sorted((name, value.tolist()) for name, value in load_file(shard).items()))


def test_no_flipped_bit_anywhere_goes_unseen_and_changes_what_is_read(store):
    shard = shards(store)[0]
    before = _others_read(shard)
    for path in sorted(shard.iterdir()) if shard.is_dir() else [shard]:
        for position in range(0, path.stat().st_size, 13):
            flip(path, position, bit=position % 8)
            if store.verify() == []:
                again = open_store(store.path)
                assert again.ids == ["x0", "x1", "x2", "x3"], position
                assert again["a", "mean"].torch()[:, 0].tolist() == [0.5, 0.5, 1.5, 1.5], position
                assert _others_read(shard) == before, position
            flip(path, position, bit=position % 8)
    assert store.verify() == []


@pytest.mark.parametrize("size", [0, 5, 100, -1])
def test_a_shard_that_was_cut_short_is_truncated_or_unreadable(store, size):
    shard = shards(store)[1]
    path, _ = part_of(shard, "a:mean")
    os.truncate(path, size if size >= 0 else path.stat().st_size + size)
    (damage,) = store.verify()
    assert damage.path == shard
    assert damage.kind in ("truncated", "unreadable")
    if size == -1 and shard.suffix != ".npz":  # whose directory, at its end, is gone
        assert damage.kind == "truncated"
    assert "must be a readable shard, got " in damage.detail
    assert str(damage) == f"{shard}: {damage.kind}, {damage.detail}"


@pytest.mark.parametrize("name", ["notes.txt", ".DS_Store", "manifest.json.bak"])
@pytest.mark.parametrize("place", [".", "shards"])
def test_a_foreign_file_is_named(store, name, place):
    (store.path / place / name).write_text("mine")
    assert store.verify() == [Damage(store.path / place / name, "foreign", "not written by this library")]


def test_a_shard_of_another_format_is_foreign(store):
    other = {"safetensors": ".npz"}.get(store.manifest["codec"], ".safetensors")
    (store.path / "shards" / f"00000000{other}").write_text("mine")
    assert [(one.path.name, one.kind) for one in store.verify()] == [(f"00000000{other}", "foreign")]


def test_a_foreign_file_in_a_folder_of_npy_files_is_named(tmp_path):
    store = written(tmp_path / "out", NpySink)
    stray = shards(store)[0] / "0009-mine.npy"
    np.save(stray, np.ones(3))
    draft = shards(store)[1] / f".{'0' * 32}.tmp"
    draft.touch()
    assert [(one.path, one.kind) for one in store.verify()] == [(stray, "foreign"), (draft, "unfinished")]


def test_a_npy_file_that_is_gone_is_named(tmp_path):
    store = written(tmp_path / "out", NpySink)
    path, _ = part_of(shards(store)[0], "a:mean")
    path.unlink()
    (damage,) = store.verify()
    assert (damage.path, damage.kind) == (shards(store)[0], "unreadable")
    assert path.name in str(damage)


@pytest.mark.parametrize("place", [".", "shards"])
def test_a_draft_is_unfinished(store, place):
    draft = store.path / place / f".{'a' * 32}.tmp"
    draft.write_bytes(b"half")
    assert store.verify() == [Damage(draft, "unfinished", "a shard or manifest that was never published")]


def test_a_link_is_damage_and_is_not_followed(store):
    link = store.path / "shards" / ("00000007" + shards(store)[0].suffix)
    link.symlink_to(shards(store)[0])
    assert [(one.path, one.kind) for one in store.verify()] == [(link, "foreign")]


def test_a_missing_shard_that_the_journal_knows_is_missing(store):
    shard = shards(store)[0]
    shutil.rmtree(shard) if shard.is_dir() else shard.unlink()
    assert store.verify() == [Damage(shard, "missing", "the journal lists it")]


def test_a_missing_shard_that_no_journal_knows_is_missed_where_another_one_follows(store):
    shard, last = shards(store)
    shutil.rmtree(shard) if shard.is_dir() else shard.unlink()
    shutil.rmtree(store.path / "journal")
    assert store.verify() == [Damage(shard, "missing", "it comes before the last one")]
    assert open_store(store.path, partial=True).ids == ["x2", "x3"]
    shutil.rmtree(last) if last.is_dir() else last.unlink()
    assert store.verify() == []


def copy(shard: Path, goal: Path) -> None:
    shutil.copytree(shard, goal) if shard.is_dir() else shutil.copyfile(shard, goal)


@pytest.mark.parametrize("make_sink", SINKS)
def test_a_shard_of_another_store_does_not_belong_here(tmp_path, make_sink):
    store, other = (written(tmp_path / name, make_sink, first, layers=name) for name, first in (("out", 0), ("in", 5)))
    stray = store.path / "shards" / shards(other)[0].name
    copy(shards(other)[0], stray)
    (damage,) = store.verify()
    assert (damage.path, damage.kind) == (stray, "unreadable")
    assert "must belong to this store, got a shard of another one. Take it out of the folder." in damage.detail
    with pytest.raises(StoreError, match="must belong to this store"):
        open_store(store.path)
    shutil.rmtree(stray) if stray.is_dir() else stray.unlink()  # as the text advises
    assert store.verify() == []


def test_a_renamed_shard_is_missing_under_its_name_and_unreadable_under_the_new_one(store):
    old = shards(store)[0]
    new = old.with_name(old.name.replace("-00000000.", "-00000007."))
    old.rename(new)
    unit = old.name.removesuffix(old.suffix)
    missing, renamed = sorted(store.verify(), key=lambda one: one.kind)
    assert missing == Damage(old, "missing", "the journal lists it")
    assert (renamed.path, renamed.kind) == (new, "unreadable")
    assert f"got the shard of unit {unit!r}" in renamed.detail


def test_another_shard_in_place_of_one_that_the_journal_knows_is_altered(store):
    (journal,) = (store.path / "journal").iterdir()
    first, second = journal.read_text().splitlines()
    journal.write_text(first + "\n" + json.dumps({**json.loads(second), "seal": "00000000"}) + "\n")
    assert store.verify() == [Damage(shards(store)[1], "altered", "another shard than the journal lists")]


@pytest.mark.parametrize("make_sink", SINKS)
def test_an_id_that_two_writers_gave_is_repeated(tmp_path, make_sink):
    sinks = [make_sink(tmp_path / "out", append=True) for _ in range(2)]
    for sink, ids in zip(sinks, (["a", "b"], ["c", "b"]), strict=True):
        sink.write(step(0, ids))
    for sink in sinks:
        sink.close()
    store = open_store(tmp_path / "out")
    assert store.verify() == [Damage(shards(store)[1], "repeated id", "'b' is the id of another row too")]


def test_each_of_several_damages_is_reported(store):
    first, second = shards(store)
    path, start = part_of(first, "a:mean")
    flip(path, start)
    second.rename(second.with_name("00000009" + second.suffix))
    (store.path / "notes.txt").write_text("mine")
    found = [(one.path.name, one.kind) for one in store.verify()]
    there = {("notes.txt", "foreign"), (second.name, "missing"), (path.name, "altered")}
    assert set(found) == there | {("00000009" + second.suffix, "unreadable")}
    assert len(found) == 4


def test_a_manifest_of_a_newer_version_is_an_error(store):
    path = store.path / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "version": 2}))
    with pytest.raises(StoreError, match=r"must be of version 1, got version 2\. Update activation_extractor\."):
        verify_store(store.path)


def test_what_is_no_store_cannot_be_verified(tmp_path):
    with pytest.raises(StoreError, match="must be a store, got a folder without manifest"):
        verify_store(tmp_path)


def test_a_disk_that_fails_is_damage_of_the_shard_and_the_others_are_looked_at(store, monkeypatch):
    real, path = _verify.read_at, part_of(shards(store)[0], "a:mean")[0]
    broken = path.stat().st_ino

    def read_at(descriptor, start, size):
        if os.fstat(descriptor).st_ino == broken:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(descriptor, start, size)

    monkeypatch.setattr(_verify, "read_at", read_at)
    other, start = part_of(shards(store)[1], "a:mean")
    flip(other, start)
    assert [one.kind for one in store.verify()] == ["unreadable", "altered"]


def test_nothing_is_written(store):
    path, start = part_of(shards(store)[0], "a:mean")
    flip(path, start)
    (store.path / "shards" / f".{'a' * 32}.tmp").write_bytes(b"half")
    os.utime(store.path / "shards" / f".{'a' * 32}.tmp", (0, 0))
    before = tree(store.path)
    assert len(store.verify()) == 2
    assert tree(store.path) == before
