"""A store that is none, damaged or newer is refused: by `open_store`, or when what is damaged is read."""

from __future__ import annotations

import json
import re
import shutil
import struct
from pathlib import Path

import pytest
import torch
from torch import nn

from activation_extractor import SafetensorsSink, Store, extract, open_store
from activation_extractor._format._manifest import store_name
from activation_extractor._format._safetensors import write_safetensors_shard
from activation_extractor.errors import StoreError
from activation_extractor.sinks import Step

UNIT = r"\d{8}T\d{12}-[0-9a-f]{8}-"


@pytest.fixture
def store(tmp_path: Path) -> Store:
    sink = SafetensorsSink(tmp_path / "out", rows_per_unit=2)
    for index in range(3):
        sink.write(Step(index, 2, {("h.0", "mean"): torch.randn(2, 3)}, [2 * index, 2 * index + 1], {}))
    sink.close()
    return open_store(tmp_path / "out")


def second_shard(store: Store) -> Path:
    return next((store.path / "shards").glob("*-00000001.safetensors"))


@pytest.mark.parametrize("kind", [str, Path])
def test_a_path_may_be_text_or_a_path(store, kind):
    assert open_store(kind(store.path)).ids == store.ids == [0, 1, 2, 3, 4, 5]


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
        ("[" * 100_000, r"must be a readable manifest, got RecursionError\."),
        ("[]", r"must be the manifest of a store, got something else\."),
        ('{"format": "another"}', r"must be the manifest of a store, got something else\."),
        ('{"format": "activation_extractor store", "version": 2}', r"must be of version 1, got version 2\. Update"),
        ('{"format": "activation_extractor store"}', r"must be of version 1, got version None\."),
    ],
    ids=["no_json", "no_text", "deep", "list", "another", "newer", "no_version"],
)
def test_another_manifest_is_an_error_that_names_the_file(tmp_path, content, text):
    (tmp_path / "manifest.json").write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(StoreError, match=text) as caught:
        open_store(tmp_path)
    assert caught.value.path == tmp_path / "manifest.json"


@pytest.mark.parametrize("member", ["codec", "fingerprint", "batches_per_unit", "columns", "keep", "ids"])
@pytest.mark.parametrize("is_there", [True, False])
def test_a_manifest_without_what_is_needed_is_an_error_that_names_it(store, member, is_there):
    path = store.path / "manifest.json"
    content = json.loads(path.read_text())
    content[member] = {"neither": "this"} if member != "fingerprint" else "this"
    if not is_there and member != "batches_per_unit":
        del content[member]
    path.write_text(json.dumps(content))
    with pytest.raises(StoreError, match=f"must hold a valid '{member}', got none"):
        open_store(store.path)


def test_a_file_is_no_store(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(StoreError, match=r"must be a store, got a file\."):
        open_store(tmp_path / "file")


@pytest.mark.parametrize("name", ["manifest.json", "shards", "shards/00000009.safetensors"])
def test_a_link_is_refused(store, name):
    path = store.path / name
    if path.exists():
        path.rename(store.path.parent / path.name)
    path.symlink_to(store.path.parent / path.name)
    with pytest.raises(StoreError, match="got a link"):
        open_store(store.path)


def _header(shard: bytes) -> tuple[int, dict]:
    size = struct.unpack("<Q", shard[:8])[0]
    return size, json.loads(shard[8 : 8 + size])


def _without_metadata(shard: bytes) -> bytes:
    size, header = _header(shard)
    del header["__metadata__"]
    return shard[:8] + json.dumps(header).encode().ljust(size) + shard[8 + size :]


@pytest.mark.parametrize("has_journal", [True, False])
@pytest.mark.parametrize(
    ("damage", "got"),
    [
        (lambda shard: shard[:-1], "a file that ends 1 bytes too early"),
        (lambda shard: shard[:50], r"a file that ends at byte 50 of \d+"),
        (lambda shard: b"", "a file that ends at byte 0 of 8"),
        (lambda shard: b"\xff" * len(shard), r"a header of 18446744073709551615 bytes"),
        (lambda shard: shard + b"more", "4 bytes after its last entry"),
        (lambda shard: shard.replace(b'"F32"', b'"Q32"'), r"a header of another form \(KeyError\('Q32'\)\)"),
        (lambda shard: shard.replace(b'"rows":"2"', b'"rows":"3"'), "a header that does not match its seal"),
        (_without_metadata, r"a header of another form \(KeyError\('__metadata__'\)\)"),
    ],
    ids=["short", "header_only", "empty", "garbage", "long", "unknown_dtype", "altered", "no_metadata"],
)
def test_a_damaged_shard_is_an_error_that_names_it(store, damage, got, has_journal):
    path = second_shard(store)
    path.write_bytes(damage(path.read_bytes()))
    if not has_journal:
        shutil.rmtree(store.path / "journal")
    text = rf"{UNIT}00000001\.safetensors' must be a readable shard, got {got}\. Restore it from a copy, or delete it"
    ways = [lambda: open_store(store.path)["h.0"][2], lambda: open_store(store.path)["h.0"].torch()]
    ways += [lambda: open_store(store.path).ids, lambda: open_store(store.path).row_of(2)]
    for read in ways if has_journal else [lambda: open_store(store.path)]:
        with pytest.raises(StoreError, match=text) as caught:
            read()
        assert str(caught.value.path) == str(path)


def test_rows_of_other_shards_than_the_damaged_one_can_be_read(store):
    expected = store["h.0"][[0, 1, 4, 5]]
    second_shard(store).write_bytes(b"")
    again = open_store(store.path)
    assert (again.rows, again["h.0"].shape) == (6, (6, 3))
    assert torch.equal(again["h.0"][[0, 1, 4, 5]], expected)
    with pytest.raises(StoreError):
        again["h.0"][3]


def test_a_shard_that_vanishes_later_is_an_error_when_it_is_read(store):
    column = store["h.0", "mean"]
    second_shard(store).unlink()
    assert column[0:2].shape == (2, 3)
    with pytest.raises(StoreError, match=rf"{UNIT}00000001\.safetensors' must be a readable shard, got No such file"):
        column.torch()


def test_a_shard_missing_between_others_is_an_error(store):
    second_shard(store).unlink()
    text = rf"must have all of its units, got 1 of 3 missing: '{UNIT}00000001'\. Restore it from a copy, or read what"
    with pytest.raises(StoreError, match=text):
        open_store(store.path)


def test_what_is_left_of_a_store_that_lost_a_shard_can_be_read_as_the_text_says(store):
    shard = second_shard(store)
    shard.unlink()
    with pytest.raises(StoreError, match=r"or read what is there with open_store\(path, partial=True\)"):
        open_store(store.path)
    left = open_store(store.path, partial=True)
    assert left.ids == [0, 1, 4, 5]
    assert left.missing_units == [shard.stem]
    with pytest.raises(StoreError, match="have every unit for the rows behind it to be numbered, got .*missing"):
        _ = left.row_numbers  # how many rows it had is not known


@pytest.mark.parametrize(
    ("member", "value", "key"),
    [
        ("rows", 3, ("h.0", "mean")),
        ("counts", {"h.0:mean": 1}, ("h.0", "mean")),
        ("counts", {"h.0:mean": 2, "x:mean": 2}, ("x", "mean")),
    ],
)
def test_a_journal_that_tells_otherwise_than_a_shard_is_an_error_with_a_way_out(store, member, value, key):
    (journal,) = (store.path / "journal").iterdir()
    records = [json.loads(line) for line in journal.read_text().splitlines()]
    records[1][member] = value
    journal.write_text("".join(json.dumps(record) + "\n" for record in records))
    again = open_store(store.path)
    with pytest.raises(StoreError, match=r"agree with the journal, got .*\. Remove the folder 'journal': every sha"):
        again[key][:]
    shutil.rmtree(store.path / "journal")  # as the text advises
    assert open_store(store.path)["h.0"].shape == (6, 3)


@pytest.mark.parametrize(("member", "value"), [("dtype", "int32"), ("row_shape", [4]), ("ragged", True)])
def test_a_manifest_that_tells_otherwise_than_the_shards_is_an_error_when_the_column_is_read(store, member, value):
    path = store.path / "manifest.json"
    content = json.loads(path.read_text())
    content["columns"][0][member] = value
    path.write_text(json.dumps(content))
    column = open_store(store.path)["h.0"]
    for read in (lambda: column[0], lambda: column[:], column.mapped):
        with pytest.raises(
            StoreError, match=r"must hold 'h\.0:mean' like the other shards, got torch\.float32 \(3,\) "
        ):
            read()


def with_shard(store: Store, values: dict[str, torch.Tensor]) -> Store:
    """The store with a shard of four rows more, sealed by somebody else."""
    unit = "20990101T000000000000-00000000-00000000"
    about = {"unit": unit, "rows": "4", "store": store_name(store.manifest["fingerprint"])}
    entries = {name: [value] for name, value in {**values, "#ids": torch.arange(10, 14)}.items()}
    write_safetensors_shard(store.path / "shards" / f"{unit}.safetensors", entries, about)
    return open_store(store.path)


@pytest.mark.parametrize("rows", [[1, 0], [0, 4], [-1, 2], [2, 2]], ids=str)
def test_rows_of_a_short_column_that_do_not_rise_within_the_shard_are_an_error(store, rows):
    again = with_shard(store, {"h.0:mean": torch.zeros(2, 3), "h.0:mean#rows": torch.tensor(rows)})
    assert again["h.0"].shape == (8, 3)
    text = r"must hold rising row numbers of 'h\.0:mean', got other numbers\. Restore it from a copy"
    with pytest.raises(StoreError, match=text):
        _ = again["h.0"].rows
    (damage,) = again.verify()
    assert damage.kind == "unreadable"
    assert re.search(text, damage.detail)


def test_offsets_of_a_ragged_column_that_do_not_rise_are_an_error(store):
    offsets = torch.tensor([0, 2, 1, 3, 4])
    again = with_shard(store, {"h.1:mean": torch.zeros(4, 3), "h.1:mean#offsets": offsets})
    text = r"must hold rising offsets of 'h\.1:mean', got other numbers\. Restore it from a copy"
    for read in (again["h.1"].lengths, lambda: again["h.1"][:], lambda: again["h.1"][1]):
        with pytest.raises(StoreError, match=text):
            read()
    (damage,) = again.verify()
    assert damage.kind == "unreadable"
    assert re.search(text, damage.detail)


def test_ids_are_not_read_past_a_journal_that_miscounts_rows(store):
    (journal,) = (store.path / "journal").iterdir()
    journal.write_text(journal.read_text().replace('"rows": 2', '"rows": 3', 1))
    with pytest.raises(StoreError, match=r"agree with the journal, got .*\. Remove the folder 'journal'"):
        _ = open_store(store.path).ids


def test_a_manifest_that_tells_of_ids_that_no_shard_has_is_an_error_when_they_are_read(tmp_path):
    sink = SafetensorsSink(tmp_path / "out")
    sink.write(Step(0, 2, {("h.0", "mean"): torch.randn(2, 3)}))
    sink.close()
    path = tmp_path / "out/manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "ids": "int"}))
    again = open_store(tmp_path / "out")
    assert again["h.0"].shape == (2, 3)
    with pytest.raises(StoreError, match=r"must hold ids of the manifest's kind, int, got none\. "):
        again.row_of(0)


@pytest.mark.parametrize("advice", ["delete it and extract again"])
def test_a_damaged_shard_may_be_deleted_and_the_data_extracted_again(tmp_path, advice):
    model, batches = nn.Sequential(nn.Linear(2, 2)), [torch.randn(2, 2) for _ in range(3)]
    before = extract(model, batches, "0", out=tmp_path / "out", rows_per_unit=2, progress=False)["0"].torch()
    shard = tmp_path / "out/shards/00000001.safetensors"
    data = shard.read_bytes()
    shard.write_bytes(b"")
    with pytest.raises(StoreError, match=advice):
        open_store(tmp_path / "out")["0"].torch()
    shard.unlink()
    with pytest.raises(StoreError, match="Run extract again with the same arguments, which makes it anew"):
        open_store(tmp_path / "out")
    again = extract(model, batches, "0", out=tmp_path / "out", rows_per_unit=2, progress=False)
    assert torch.equal(again["0"].torch(), before)
    assert shard.read_bytes() == data
    assert again.verify() == []
