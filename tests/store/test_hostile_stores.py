"""Hostile values and files in a store: a `StoreError` says so, or `verify` does."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch
from hostile import UNITS, change_manifest, entries_of, faults, guarded, make_store, replace_shard

from activation_extractor import open_store
from activation_extractor._format._codecs import CODECS, NPY, SAFETENSORS, Codec
from activation_extractor._format._shards import shard_path
from activation_extractor.errors import StoreError
from activation_extractor.store import verify_store


@pytest.fixture(autouse=True)
def is_guarded():
    with guarded():
        yield


@pytest.fixture(params=CODECS.values(), ids=CODECS)
def codec(request) -> Codec:
    return request.param


# -- values that lead elsewhere ---------------------------------------------------------------------------------------

FAR = 2**63 - 1
INDICES = {
    "negative": [-1, 2, 2, 4, 5],
    "falling": [0, 4, 2, 4, 5],
    "beyond": [0, 2, 2, 4, 6],
    "far_beyond": [0, 2, 2, 4, FAR],
    "backwards": [5, 4, 2, 2, 0],
    "far_between": [0, FAR, 2, 4, 5],
    "wrapping_around": [0, FAR, -2, 4, 5],
    "late": [1, 2, 2, 4, 5],
    "early": [0, 2, 2, 4, 4],
}


@pytest.mark.parametrize("offsets", INDICES.values(), ids=INDICES)
def test_offsets_that_do_not_rise_from_one_end_to_the_other_are_refused(tmp_path, codec, offsets):
    folder = make_store(tmp_path / "out", codec)
    replace_shard(folder, codec, {"h:full#offsets": [torch.tensor(offsets)]})
    column = open_store(folder)["h", "full"]
    for question in (column.lengths, lambda: [column[row] for row in range(8)], lambda: column[:]):
        with pytest.raises(StoreError):
            question()
    assert any(damage.kind == "unreadable" for damage in verify_store(folder))


ROWS = [[-1, 1, 3], [0, 1, 4], [3, 1, 0], [0, 0, 1], [0, FAR, -2], [0, 1, FAR]]


@pytest.mark.parametrize("rows", ROWS, ids=str)
def test_rows_of_a_short_column_that_do_not_rise_are_refused(tmp_path, codec, rows):
    folder = make_store(tmp_path / "out", codec)
    replace_shard(folder, codec, {"rare:max#rows": [torch.tensor(rows)]})
    with pytest.raises(StoreError):
        _ = open_store(folder)["rare", "max"].rows


@pytest.mark.parametrize("rows", ROWS, ids=str)
def test_rows_of_a_short_column_that_do_not_rise_are_reported(tmp_path, codec, rows):
    folder = make_store(tmp_path / "out", codec, has_journal=False)
    replace_shard(folder, codec, {"rare:max#rows": [torch.tensor(rows)]})
    assert [damage.kind for damage in verify_store(folder)] == ["unreadable"]


ENTRIES = {
    "no_ids": {"#ids": None, "#ids#offsets": None},
    "ids_not_text": {"#ids": [torch.full((6,), 255, dtype=torch.uint8)]},
    "ids_cut_in_a_letter": {"#ids#offsets": [torch.tensor([0, 1, 3, 4, 6])]},
    "ids_beyond": {"#ids#offsets": [torch.tensor([0, 2, 3, 4, 7])]},
    "ids_falling": {"#ids#offsets": [torch.tensor([0, 4, 3, 4, 6])]},
    "ids_wrapping_around": {"#ids#offsets": [torch.tensor([0, FAR, -2, 4, 6])]},
    "ids_twice": {"#ids#offsets": [torch.tensor([0, 6, 6, 6, 6])]},
    "ids_wide": {"#ids": [torch.arange(6)]},
    "ids_float": {"#ids": [torch.rand(6)]},
    "ids_fraction": {"#ids": [torch.rand(4)], "#ids#offsets": None},
    "ids_complex": {"#ids": [torch.zeros(4, dtype=torch.complex64)], "#ids#offsets": None},
    "ids_lists": {"#ids": [torch.arange(8).reshape(4, 2)], "#ids#offsets": None},
    "ids_numbers": {"#ids": [torch.arange(4)], "#ids#offsets": None},
    "ids_short": {"#ids#offsets": [torch.tensor([0, 2, 6])], "#ids#rows": [torch.tensor([0, 1])]},
    "too_few_offsets": {"h:full#offsets": [torch.tensor([0, 2, 5])]},
    "no_offsets": {"h:full#offsets": None},
    "empty_offsets": {"h:full#offsets": [torch.zeros(0, dtype=torch.int64)]},
    "float_offsets": {"h:full#offsets": [torch.tensor([0.0, 2, 2, 4, 5])]},
    "narrow_offsets": {"h:full#offsets": [torch.tensor([0, 2, 2, 4, 5], dtype=torch.int32)]},
    "offsets_in_a_table": {"h:full#offsets": [torch.zeros(5, 1, dtype=torch.int64)]},
    "offsets_of_nothing": {"x:y#offsets": [torch.zeros(5, dtype=torch.int64)]},
    "rows_of_nothing": {"x:y#rows": [torch.zeros(5, dtype=torch.int64)]},
    "too_few_rows": {"rare:max#rows": [torch.tensor([0, 1])]},
    "no_rows": {"rare:max#rows": None},
    "one_row_too_many": {"h:mean": [torch.randn(5, 3)]},
    "other_shape": {"h:mean": [torch.randn(4, 4)]},
    "other_dtype": {"h:mean": [torch.randn(4, 3).double()]},
    "ragged_now": {"h:mean#offsets": [torch.arange(5)]},
    "no_column": {"h:mean": None},
    "no_kept_column": {"#keep:label": None},
    "scalar": {"x:y": [torch.tensor(1.0)]},
    "other_name": {"x": [torch.zeros(4)]},
    "three_names": {"x:y:z": [torch.zeros(4)]},
    "bad_escape": {"x%zz:y": [torch.zeros(4)]},
    "other_spelling": {"%68:full": [torch.zeros(4)]},
    "path": {"../../x:y": [torch.zeros(4)]},
}


@pytest.mark.parametrize("entries", ENTRIES.values(), ids=ENTRIES)
def test_entries_that_no_writer_makes_are_refused_or_reported(tmp_path, codec, entries):
    folder = make_store(tmp_path / "out", codec, has_journal=False)
    replace_shard(folder, codec, entries)
    lacks_a_column = entries in ({"h:mean": None}, {"#keep:label": None})  # as a layer that runs conditionally may
    assert bool(faults(folder)) != lacks_a_column


@pytest.mark.parametrize("entries", ENTRIES.values(), ids=ENTRIES)
def test_a_shard_that_the_journal_does_not_know_is_reported(tmp_path, entries):
    folder = make_store(tmp_path / "out", SAFETENSORS)
    replace_shard(folder, SAFETENSORS, entries)
    assert faults(folder)


def test_ids_in_a_dtype_that_numpy_lacks_are_refused(tmp_path):
    folder = make_store(tmp_path / "out", SAFETENSORS, has_journal=False)
    replace_shard(folder, SAFETENSORS, {"#ids": [torch.zeros(6, dtype=torch.bfloat16)]})
    assert faults(folder)


@pytest.mark.parametrize("ids", [torch.arange(4), None], ids=["int", "none"])
def test_ids_of_another_kind_than_the_manifest_says_are_refused(tmp_path, codec, ids):
    folder = make_store(tmp_path / "out", codec, has_journal=False)
    replace_shard(folder, codec, {"#ids": None if ids is None else [ids], "#ids#offsets": None})
    store = open_store(folder)
    for question in (lambda: store.ids, lambda: list(store.iter_ids()), lambda: store.row_of("b")):
        with pytest.raises(StoreError, match="must hold ids of the manifest's kind, str, got (int|none)"):
            question()
    assert any(damage.kind == "unreadable" for damage in verify_store(folder))


def test_ids_that_are_text_where_the_manifest_says_numbers_are_refused(tmp_path, codec):
    folder = make_store(tmp_path / "out", codec, has_journal=False)
    change_manifest(folder, lambda content: {**content, "ids": "int"})
    with pytest.raises(StoreError, match="must hold ids of the manifest's kind, int, got str"):
        _ = open_store(folder).ids
    assert any(damage.kind == "unreadable" for damage in verify_store(folder))


NOTES = [{"rows": text} for text in ("-1", "5", "3", "", "x", "4.0", "1e0", "9" * 30, "9" * 5000, "0x4", "None")]
NOTES += [{"unit": unit} for unit in ("00000000", "../00000001", "", "x")] + [{"store": ""}, {"store": "00000000"}]


@pytest.mark.parametrize("notes", NOTES, ids=lambda notes: str(notes)[:20])
def test_notes_that_do_not_fit_are_refused(tmp_path, codec, notes):
    folder = make_store(tmp_path / "out", codec, has_journal=False)
    replace_shard(folder, codec, {}, notes)
    assert faults(folder)


def test_a_count_below_zero_is_refused(tmp_path, codec):
    folder = make_store(tmp_path / "out", codec, has_journal=False)
    empty = {"h:full": [torch.zeros(0, 2)], "h:full#offsets": [torch.zeros(0, dtype=torch.int64)]}
    replace_shard(folder, codec, {**dict.fromkeys(entries_of(1)), **empty}, {"rows": "-1"})
    assert faults(folder)


# -- files that are none ----------------------------------------------------------------------------------------------


def put(path: Path, kind: str, elsewhere: Path) -> None:
    """Put something else in the place of a file or folder."""
    path.rename(elsewhere)
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "file":
        path.write_bytes(b"x")
    elif kind == "link":
        path.symlink_to(elsewhere)
    elif kind == "dangling":
        path.symlink_to(elsewhere / "missing")


KINDS = ["pipe", "folder", "file", "link", "dangling", "nothing"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("place", ["manifest.json", "shards", "shards/00000001"])
def test_something_else_in_the_place_of_a_file_is_refused(tmp_path, codec, place, kind):
    folder = make_store(tmp_path / "out", codec)
    put(folder / place.replace("00000001", "00000001" + codec.suffix), kind, tmp_path / "elsewhere")
    assert faults(folder)
    is_lost = place == "shards" and kind in ("folder", "nothing")
    shutil.rmtree(folder / "journal")
    assert faults(folder) or is_lost or kind == "nothing"  # what nobody knows any more


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["about.json", "0002-h_mean.npy"])
def test_something_else_in_the_place_of_an_array_is_refused(tmp_path, name, kind):
    folder = make_store(tmp_path / "out", NPY, has_journal=kind != "link")
    put(shard_path(folder, UNITS[1], NPY) / name, kind, tmp_path / "elsewhere")
    assert "must be a readable shard" in faults(folder)[0]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("place", ["journal", "journal/w.jsonl"])
def test_a_journal_that_is_something_else_is_done_without(tmp_path, codec, place, kind):
    folder = make_store(tmp_path / "out", codec)
    secret = f'{{"unit": "00000009", "rows": 4, "bytes": 1, "seal": "0", "from": "{kind}"}}\n'
    (folder / "journal" / "w.jsonl").write_text(secret)  # a unit that is not there: whoever reads it refuses the store
    put(folder / place, kind, tmp_path / "elsewhere")
    assert faults(folder) == []


@pytest.mark.parametrize("kind", ["pipe", "folder", "file", "dangling"])
@pytest.mark.parametrize("has_journal", [True, False], ids=["journal", "no_journal"])
def test_something_foreign_beside_arrays_is_reported_and_not_read(tmp_path, kind, has_journal):
    folder = make_store(tmp_path / "out", NPY, has_journal=has_journal)
    path = shard_path(folder, UNITS[1], NPY) / "x"
    path.touch()
    put(path, kind, tmp_path / "elsewhere")
    assert len(faults(folder)) == 1
    assert open_store(folder)["h", "mean"].torch().shape == (8, 3)
