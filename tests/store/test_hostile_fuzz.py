"""Stores with random damage: they are read or refused; what was altered is reported."""

from __future__ import annotations

import copy
import json
import os
import shutil
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from hostile import UNITS, change_header, change_journal, change_manifest, entries_of, faults, guarded, make_store
from hypothesis import given, settings
from hypothesis import strategies as st

from activation_extractor._format._codecs import CODECS, NPY, SAFETENSORS, Codec
from activation_extractor._format._shards import read_shard, shard_path
from activation_extractor.errors import StoreError
from activation_extractor.store import verify_store

CASES = settings(deadline=None, max_examples=40)


@pytest.fixture(autouse=True)
def is_guarded():
    with guarded():
        yield


@pytest.fixture(params=CODECS.values(), ids=CODECS)
def codec(request) -> Codec:
    return request.param


def files_of(path: Path) -> list[Path]:
    return sorted(path.iterdir()) if path.is_dir() else [path]


# -- every place ------------------------------------------------------------------------------------------------------


def test_a_shard_that_is_cut_short_anywhere_is_refused(tmp_path, codec):
    path = shard_path(make_store(tmp_path / "out", codec, units=1), UNITS[0], codec)
    for file in files_of(path):
        data = file.read_bytes()
        for size in range(len(data) - 1, -1, -1):
            os.truncate(file, size)
            with pytest.raises(StoreError):
                read_shard(path, codec)
        file.write_bytes(data)
    read_shard(path, codec)


@pytest.mark.parametrize("more", [b"\0", b" ", b"\n", b"x" * 100])
def test_a_shard_with_bytes_behind_its_end_is_refused(tmp_path, codec, more):
    path = shard_path(make_store(tmp_path / "out", codec, units=1), UNITS[0], codec)
    for file in files_of(path):
        data = file.read_bytes()
        file.write_bytes(data + more)
        if file.name == "about.json" and not more.strip():
            continue  # JSON may end with a blank
        with pytest.raises(StoreError):
            read_shard(path, codec)
        file.write_bytes(data)


def test_a_bit_that_is_flipped_in_the_data_is_reported_wherever_it_is(tmp_path, codec):
    folder = make_store(tmp_path / "out", codec, units=1)
    shard = read_shard(shard_path(folder, UNITS[0], codec), codec)
    assert shard.extents.keys() == entries_of(0).keys()
    for name, extent in shard.extents.items():
        with open(extent.path, "r+b") as file:
            for place in range(extent.start, extent.stop):
                (before,) = os.pread(file.fileno(), 1, place)
                os.pwrite(file.fileno(), bytes([before ^ 1 << place * 5 % 8]), place)
                altered = [damage for damage in verify_store(folder) if damage.kind == "altered"]
                assert [damage.path for damage in altered] == [extent.path]
                assert f"other bytes in {name!r}" in altered[0].detail
                os.pwrite(file.fileno(), bytes([before]), place)
    assert verify_store(folder) == []


def test_a_bit_that_is_flipped_in_a_header_of_safetensors_is_refused_wherever_it_is(tmp_path):
    path = shard_path(make_store(tmp_path / "out", SAFETENSORS, units=1), UNITS[0], SAFETENSORS)
    data = path.read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    survivors = []
    with open(path, "r+b") as file:
        for place in range(8 + size):
            for bit in range(8):
                os.pwrite(file.fileno(), bytes([data[place] ^ 1 << bit]), place)
                try:
                    read_shard(path, SAFETENSORS)
                    survivors.append((data[max(0, place - 30) : place + 5], bit))
                except StoreError:
                    pass
            os.pwrite(file.fileno(), data[place : place + 1], place)
    assert survivors == []


# -- random bytes -----------------------------------------------------------------------------------------------------

EDITS = st.lists(st.tuples(st.sampled_from(["flip", "set", "insert", "delete", "cut", "double"]), st.integers(0, 2**16),
                           st.integers(0, 255)), min_size=1, max_size=4)  # fmt: skip


def edited(data: bytes, edits: list[tuple[str, int, int]]) -> bytes:
    for kind, place, value in edits:
        at = place % (len(data) + 1)
        head, one, rest = data[:at], data[at : at + 1], data[at + 1 :]
        if kind == "flip":
            data = head + bytes(byte ^ 1 << value % 8 for byte in one) + rest
        elif kind == "set":
            data = head + bytes([value]) + rest
        elif kind == "insert":
            data = head + bytes([value]) + one + rest
        elif kind == "delete":
            data = head + rest
        elif kind == "cut":
            data = head
        else:
            data = head + one + rest[: value + 1] + one + rest
    return data


@CASES
@given(st.sampled_from(list(CODECS.values())), st.booleans(), st.integers(0, 99), EDITS)
def test_random_bytes_in_a_shard_are_read_or_refused(codec, has_journal, number, edits):
    with brief_store(codec, has_journal) as folder:
        files = files_of(shard_path(folder, UNITS[1], codec))
        file = files[number % len(files)]
        file.write_bytes(edited(file.read_bytes(), edits))
        faults(folder)


@CASES
@given(st.sampled_from(["manifest.json", "journal/w.jsonl"]), st.sampled_from(["str", None]), EDITS)
def test_random_bytes_in_the_manifest_or_the_journal_are_read_or_refused(name, ids, edits):
    with brief_store(SAFETENSORS, ids=ids) as folder:
        (folder / name).write_bytes(edited((folder / name).read_bytes(), edits))
        faults(folder)


# -- random claims ----------------------------------------------------------------------------------------------------

NUMBERS = [-(2**63), -1, 0, 1, 3, 5, 2**31, 2**40, 2**62, 2**63 - 1, 2**63, 2**70, 10**400, 0.5, 1e308]
TEXTS = [
    "",
    "x",
    "int",
    "str",
    "npz",
    "float64",
    "bfloat16",
    "bool",
    "qint8",
    "bits8",
    "F64",
    "I64",
    "h",
    "mean",
    "label",
]
TEXTS += ["../../x", "#ids", "#rows", "%41", "%", "\0", "\ud800", "ü", "00000000", "-1", "4", "9" * 30]
PLAIN = st.none() | st.booleans() | st.sampled_from(NUMBERS) | st.sampled_from(TEXTS)
MANY = st.lists(PLAIN, max_size=3) | st.dictionaries(st.sampled_from(TEXTS), PLAIN, max_size=3)
CLAIMS = st.sampled_from(NUMBERS) | st.sampled_from(TEXTS) | PLAIN | MANY
WAYS = st.lists(st.sampled_from(range(12)), min_size=1, max_size=5)
CHANGES = st.lists(st.tuples(WAYS, CLAIMS, st.sampled_from([False, False, True])), min_size=1, max_size=2)


def changed(document: Any, changes: list[tuple[list[int], Any, bool]]) -> Any:
    """A document with members replaced, or added under another name."""
    document = json.loads(json.dumps(document))
    for way, claim, is_new in changes:
        inside, key = None, None
        member = document
        for step in way:
            if not isinstance(member, dict | list) or not member:
                break
            inside = member
            key = list(member)[step % len(member)] if isinstance(member, dict) else step % len(member)
            member = member[key]
        if isinstance(inside, dict) and is_new:
            inside[claim if isinstance(claim, str) else "x:y"] = copy.deepcopy(inside[key])
        elif inside is not None:
            inside[key] = copy.deepcopy(claim)  # a list that comes twice would end up inside of itself
    return document


@CASES
@given(CHANGES, st.integers(0, 2), st.sampled_from(["str", None]))
def test_random_claims_of_a_manifest_are_read_or_refused(changes, units, ids):
    with brief_store(SAFETENSORS, units=units, ids=ids) as folder:
        change_manifest(folder, lambda manifest: changed(manifest, changes))
        faults(folder)


@CASES
@given(CHANGES, st.sampled_from(["str", None]))
def test_random_claims_of_a_journal_are_read_or_refused(changes, ids):
    with brief_store(SAFETENSORS, ids=ids) as folder:
        change_journal(folder, lambda record: changed(record, changes))
        faults(folder)


@CASES
@given(CHANGES, st.booleans())
def test_random_claims_of_a_header_that_is_sealed_are_read_or_refused(changes, has_journal):
    with brief_store(SAFETENSORS, has_journal) as folder:
        change_header(shard_path(folder, UNITS[1], SAFETENSORS), lambda header: changed(header, changes))
        faults(folder)


@CASES
@given(st.data(), st.sampled_from(list(CODECS.values())))
def test_random_indices_are_read_or_refused(data, codec):
    number = st.integers(-2, 7) | st.sampled_from([2**31, 2**62, 2**63 - 1, -(2**63)])
    entries = entries_of(1)
    for name in data.draw(st.sets(st.sampled_from(["#ids#offsets", "h:full#offsets", "rare:max#rows"]), min_size=1)):
        size = len(entries[name][0])
        entries[name] = [torch.tensor(data.draw(st.lists(number, min_size=size, max_size=size)))]
    with brief_store(codec, has_journal=data.draw(st.booleans())) as folder:
        path = shard_path(folder, UNITS[1], codec)
        about = read_shard(path, codec).metadata
        shutil.rmtree(path) if codec is NPY else path.unlink()
        codec.write(path, entries, about)
        faults(folder)


@contextmanager
def brief_store(codec: Codec, has_journal: bool = True, **options: Any) -> Iterator[Path]:
    """A store that is gone after the block."""
    with TemporaryDirectory() as folder:
        yield make_store(Path(folder) / "out", codec, has_journal=has_journal, **options)
