"""Shards: complete or not there, never rewritten, and checked number by number when they are read."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from activation_extractor._format._codecs import CODECS, SAFETENSORS, Codec
from activation_extractor._format._fields import Field
from activation_extractor._format._headers import Extent
from activation_extractor._format._journal import JournalRecord
from activation_extractor._format._shards import (
    Shard,
    is_shard,
    list_units,
    read_shard,
    shard_path,
    size_of,
    unit_name,
    write_shard,
)
from activation_extractor.errors import ArgumentError, StoreError

UNIT = "00000007"
WRITER = "20260102T030405678901-0123abcd"
ENTRIES = {
    "#ids": [torch.frombuffer(bytearray(b"abcde"), dtype=torch.uint8)],
    "#ids#offsets": [torch.tensor([0, 1, 3, 5])],
    "h.0:mean": [torch.arange(4.0).reshape(2, 2), torch.ones(1, 2)],
    "h.0:full": [torch.randn(2, 3), torch.randn(3, 3)],
    "h.0:full#offsets": [torch.tensor([0, 1, 1, 5])],
    "rare:max": [torch.ones(1, 4, dtype=torch.int8)],
    "rare:max#rows": [torch.tensor([2])],
    "#keep:label": [torch.arange(3)],
    "#keep:none": [torch.zeros(3, 0)],
}
ABOUT = {"rows": "3", "store": "0123abcd", "inputs": "größe"}
COLUMNS = ["h.0:mean", "h.0:full", "rare:max", "#keep:label", "#keep:none"]


@pytest.fixture(params=CODECS.values(), ids=CODECS)
def codec(request) -> Codec:
    return request.param


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "shards").mkdir()
    return tmp_path


def load(path: Path, codec: Codec) -> dict[str, np.ndarray]:
    """What safetensors or numpy read of a shard."""
    if codec is SAFETENSORS:
        return {name: tensor.numpy() for name, tensor in load_file(path).items()}
    if path.is_file():
        with np.load(path, allow_pickle=False) as archive:
            return dict(archive)
    names = json.loads((path / "about.json").read_bytes())["crc32"]
    return {name: np.load(file) for name, file in zip(names, sorted(path.glob("*.npy")), strict=True)}


def tree(folder: Path) -> dict[str, tuple[bytes, int]]:
    return {str(one): (one.read_bytes(), one.stat().st_mtime_ns) for one in folder.rglob("*") if one.is_file()}


# -- writing and reading ----------------------------------------------------------------------------------------------


def test_a_shard_holds_what_it_was_given_and_lies_where_its_unit_says(folder, codec):
    shard, nbytes = write_shard(folder, codec, UNIT, ENTRIES, ABOUT)
    assert shard == read_shard(shard_path(folder, UNIT, codec), codec)
    path = folder / "shards" / (UNIT + codec.suffix)
    assert shard_path(folder, UNIT, codec) == path
    assert list((folder / "shards").iterdir()) == [path]
    files = [path] if path.is_file() else list(path.iterdir())
    assert nbytes == size_of(path) == sum(one.stat().st_size for one in files)
    read = load(path, codec)
    assert read.keys() == ENTRIES.keys()
    for name, chunks in ENTRIES.items():
        whole = torch.cat(chunks).numpy()
        assert (read[name].dtype, read[name].shape) == (whole.dtype, whole.shape)
        assert np.array_equal(read[name], whole)


def test_a_shard_tells_its_rows_its_notes_and_where_its_values_lie(folder, codec):
    write_shard(folder, codec, UNIT, ENTRIES, ABOUT)
    shard = read_shard(shard_path(folder, UNIT, codec), codec)
    assert shard.rows == 3
    assert {name: value for name, value in shard.metadata.items() if name != "seal"} == {"unit": UNIT, **ABOUT}
    assert re.fullmatch("[0-9a-f]{8}", shard.metadata["seal"])
    assert sorted(shard.columns) == sorted(COLUMNS)
    assert {entry: shard.count(entry) for entry in shard.columns} == dict(zip(COLUMNS, (3, 3, 1, 3, 3), strict=True))
    for name, chunks in ENTRIES.items():
        extent = shard.extents[name]
        assert extent.path.read_bytes()[extent.start : extent.stop] == torch.cat(chunks).numpy().tobytes()


@pytest.mark.parametrize("entries", [{}, {"a:b": [torch.zeros(0, 3)]}], ids=["no_column", "no_row"])
def test_a_unit_without_rows_can_be_a_shard(folder, codec, entries):
    write_shard(folder, codec, UNIT, entries, {"rows": "0", "store": "x"})
    shard = read_shard(shard_path(folder, UNIT, codec), codec)
    assert (shard.rows, shard.columns) == (0, list(entries))


def test_one_number_for_a_single_row_out_of_a_wider_tensor_is_written(folder, codec):
    given = codec.convert(torch.arange(5.0).reshape(1, 5)[:, 2])
    write_shard(folder, codec, UNIT, {"a:b": [given]}, {"rows": "1", "store": "x"})
    assert load(shard_path(folder, UNIT, codec), codec)["a:b"].tolist() == [2.0]


def test_complex128_is_kept_by_numpys_formats_and_refused_by_safetensors(folder, codec):
    given = torch.tensor([1 + 2j, -1j], dtype=torch.complex128)
    if codec is SAFETENSORS:
        with pytest.raises(ArgumentError, match=r"got torch\.complex128\. .* use NpySink or NpzSink if numpy has it\."):
            codec.convert(given)
        return
    write_shard(folder, codec, UNIT, {"a:b": [codec.convert(given)]}, {"rows": "2", "store": "x"})
    assert load(shard_path(folder, UNIT, codec), codec)["a:b"].tolist() == [1 + 2j, -1j]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn])
def test_a_dtype_that_numpy_lacks_is_kept_by_safetensors_alone(codec, dtype):
    converted = codec.convert(torch.ones(2, dtype=dtype))
    assert converted.dtype == (dtype if codec is SAFETENSORS else torch.float32)


def test_the_same_unit_has_the_same_bytes(tmp_path, codec):
    trees = []
    for name in "ab":
        (tmp_path / name / "shards").mkdir(parents=True)
        write_shard(tmp_path / name, codec, UNIT, ENTRIES, ABOUT)
        trees.append(
            {path.removeprefix(str(tmp_path / name)): data for path, (data, _) in tree(tmp_path / name).items()}
        )
    assert trees[0] == trees[1]


def test_a_name_that_has_the_same_rows_already_stays_untouched(folder, codec):
    write_shard(folder, codec, UNIT, ENTRIES, ABOUT)
    before = tree(folder)
    assert write_shard(folder, codec, UNIT, {name: [torch.cat(ENTRIES[name])] for name in ENTRIES}, ABOUT) is None
    assert tree(folder) == before


@pytest.mark.parametrize("other", ["values", "notes", "columns"])
def test_a_name_that_has_other_rows_is_an_error_and_stays_untouched(folder, codec, other):
    write_shard(folder, codec, UNIT, ENTRIES, ABOUT)
    before = tree(folder)
    entries, about = dict(ENTRIES), dict(ABOUT)
    if other == "values":
        entries["#keep:label"] = [torch.tensor([0, 1, 3])]
    elif other == "notes":
        about["inputs"] = "other"
    else:
        del entries["#keep:none"]
    text = r"' must hold what this run computed, got other values from another writer\. Give each run a folder"
    with pytest.raises(StoreError, match=text) as caught:
        write_shard(folder, codec, UNIT, entries, about)
    assert caught.value.path == shard_path(folder, UNIT, codec)
    assert tree(folder) == before


def test_a_name_that_something_damaged_has_is_an_error_and_stays_untouched(folder, codec):
    shard_path(folder, UNIT, codec).write_bytes(b"mine")
    before = tree(folder)
    with pytest.raises(StoreError, match="must be a readable shard"):
        write_shard(folder, codec, UNIT, ENTRIES, ABOUT)
    assert tree(folder) == before
    assert len(list((folder / "shards").iterdir())) == 1


def test_a_writer_that_dies_half_way_leaves_no_shard(folder, codec, monkeypatch):
    monkeypatch.setattr("os.fsync", lambda descriptor: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        write_shard(folder, codec, UNIT, ENTRIES, ABOUT)
    assert list((folder / "shards").iterdir()) == []


# -- names ------------------------------------------------------------------------------------------------------------


def test_units_are_named_by_number_and_writer():
    assert unit_name(7) == UNIT
    assert unit_name(7, WRITER) == f"{WRITER}-{UNIT}"


@pytest.mark.parametrize("writer", [None, WRITER])
def test_a_unit_whose_number_has_nine_digits_is_an_error_since_readers_would_pass_over_it(writer):
    assert unit_name(99_999_999, writer).endswith("99999999")
    with pytest.raises(
        StoreError, match="must have at most 100,000,000 units, got number 100,000,000. Make units larger"
    ):
        unit_name(100_000_000, writer)


UNITS = [unit_name(2), unit_name(10), unit_name(99999999)]
WITH_BLOCKS = [unit_name(9, WRITER), unit_name(10, WRITER), unit_name(0, WRITER.replace("2026", "2027"))]


@pytest.mark.parametrize("units", [UNITS, WITH_BLOCKS], ids=["data_set", "with_blocks"])
def test_units_are_listed_by_writer_and_number(folder, codec, units):
    for unit in reversed(units):
        (folder / "shards" / (unit + codec.suffix)).touch()
    assert list_units(folder, codec) == units


FOREIGN = ["0000000", "000000000", "0000000a", " 00000000", "00000000 ", "00000000\n", "-00000000", "x-00000000"]
FOREIGN += [WRITER, f"{WRITER}-0", f"{WRITER.upper()}-{UNIT}", f"../{UNIT}", "٠٠٠٠٠٠٠٠", f".{UNIT}", f"{UNIT}.{UNIT}"]


@pytest.mark.parametrize("name", FOREIGN)
def test_a_foreign_name_is_passed_over(folder, codec, name):
    assert is_shard("00000000" + codec.suffix, codec)
    assert not is_shard(name + codec.suffix, codec)
    if "/" not in name:
        (folder / "shards" / (name + codec.suffix)).touch()
        assert list_units(folder, codec) == []


def test_shards_of_another_format_and_drafts_are_passed_over(folder, codec):
    for suffix in ("", ".tmp", *(other.suffix for other in CODECS.values() if other is not codec)):
        (folder / "shards" / (UNIT + suffix)).touch()
    (folder / "shards" / ("." + "0" * 32 + ".tmp")).touch()
    assert list_units(folder, codec) == []


def test_a_store_without_shards_has_no_units(tmp_path, codec):
    assert list_units(tmp_path, codec) == []
    (tmp_path / "shards").write_text("mine")
    with pytest.raises(StoreError, match=r"shards' must be a folder, got Not a directory\. Give the folder of a store"):
        list_units(tmp_path, codec)


# -- links ------------------------------------------------------------------------------------------------------------


def test_a_link_in_place_of_the_folder_of_shards_is_refused(tmp_path, codec):
    (tmp_path / "elsewhere" / "shards").mkdir(parents=True)
    (tmp_path / "shards").symlink_to(tmp_path / "elsewhere" / "shards")
    with pytest.raises(StoreError, match=r"shards' must be a folder of the store's own, got a link\. Copy what it"):
        list_units(tmp_path, codec)


@pytest.mark.parametrize("name", [UNIT, "foreign"])
def test_a_link_among_the_shards_is_refused(folder, codec, name):
    write_shard(folder, codec, "00000001", ENTRIES, ABOUT)
    link = folder / "shards" / (name + codec.suffix)
    link.symlink_to(shard_path(folder, "00000001", codec))
    with pytest.raises(StoreError, match=r"must be a file of the store's own, got a link\. Copy what it") as caught:
        list_units(folder, codec)
    assert str(caught.value.path) == str(link)


def test_a_shard_that_is_a_link_is_not_read(folder, codec):
    write_shard(folder, codec, UNIT, ENTRIES, ABOUT)
    path = shard_path(folder, UNIT, codec)
    path.rename(folder / "away")
    path.symlink_to(folder / "away")
    with pytest.raises(StoreError, match=r"must be a readable shard, got a link\."):
        read_shard(path, codec)


@pytest.mark.parametrize("name", ["about.json", "0002-h.0_mean.npy"])
def test_a_link_inside_a_folder_of_arrays_is_not_read(folder, name):
    write_shard(folder, CODECS["npy"], UNIT, ENTRIES, ABOUT)
    path = shard_path(folder, UNIT, CODECS["npy"])
    (path / name).rename(folder / "away")
    (path / name).symlink_to(folder / "away")
    with pytest.raises(StoreError, match=r"must be a readable shard, got a link\."):
        read_shard(path, CODECS["npy"])


# -- records ----------------------------------------------------------------------------------------------------------


def shard_of(columns: dict[str, int], rows: int) -> Shard:
    extents = {name: Extent(Path("x"), 0, torch.float32, (count, 2), 0, 0) for name, count in columns.items()}
    return Shard(Path("x"), rows, {"unit": UNIT, "seal": "0123abcd"}, extents)


def test_a_record_of_a_regular_shard_has_no_counts():
    record = JournalRecord(UNIT, 3, 99, "0123abcd")
    assert shard_of({"a:b": 3, "#keep:x": 3, "#ids": 3}, 3).record(99, frozenset({"a:b", "#keep:x"})) == record


@pytest.mark.parametrize(("columns", "regular"), [("ab:3 cd:2", "ab cd"), ("ab:3", "ab cd"), ("ab:3 cd:3", "ab")])
def test_a_record_of_another_shard_counts_the_rows_of_each_column(columns, regular):
    counts = {f"{one[0]}:{one[1]}": int(one[3]) for one in columns.split()}
    record = shard_of({**counts, "#ids": 3}, 3).record(99, frozenset(f"{one[0]}:{one[1]}" for one in regular.split()))
    assert record.counts == counts


def test_a_record_counts_ragged_and_short_columns_by_their_rows(folder, codec):
    write_shard(folder, codec, UNIT, ENTRIES, ABOUT)
    record = read_shard(shard_path(folder, UNIT, codec), codec).record(5, frozenset(COLUMNS))
    assert record.counts == dict(zip(COLUMNS, (3, 3, 1, 3, 3), strict=True))
    assert JournalRecord.from_json(json.loads(json.dumps(record.to_json()))) == record


@pytest.mark.parametrize("key", [("a", "b"), ("a:b/#", "%"), "label", "x#offsets", ""])
def test_a_shard_says_what_a_column_is_whatever_its_name(key):
    field = Field(key, torch.float32, (2,), is_ragged=False)
    assert shard_of({field.entry: 3}, 3).field(field.entry) == field
