"""Folders of files of one kind."""

from __future__ import annotations

import json

import pytest
from PIL import Image
from sources import read

from activation_extractor.cli.inputs import BadRows
from activation_extractor.errors import ArgumentError


@pytest.fixture
def shards(tmp_path):
    (tmp_path / "more").mkdir()
    (tmp_path / "part-1.csv").write_text("id,text,n\n2,b,x\n")
    (tmp_path / "part-0.csv").write_text("id,text,n\n1,a,0\n")
    (tmp_path / "more" / "part-2.csv").write_text("text,n,id\nc,1,3\n")
    for name in ("_SUCCESS", ".part-0.csv.crc", "README.md", "_logs.csv"):
        (tmp_path / name).write_text("of programs")
    return tmp_path


def test_shards_are_one_data_set_in_the_order_of_their_names(shards):
    rows = read(shards, id_column="id", keep=["n"])
    assert (rows.values, rows.ids, rows.keep) == (["c", "a", "b"], ["3", "1", "2"], {"n": ["1", "0", "x"]})
    assert rows.places[1] == "line 2 (row 1) of 'part-0.csv'"
    assert "line 2 (row 1) of 'part-1.csv' holds 'x' after int values" in rows.notes[0]


def test_a_bad_row_is_named_with_its_file_and_may_be_skipped(shards):
    (shards / "part-1.csv").write_text("id,text,n\n2\n4,d,1\n")
    with pytest.raises(ArgumentError, match=r"part-1\.csv: line 2 \(row 1\) must have a cell for each"):
        read(shards)
    (shards / "part-0.csv").write_text("id,text,n\n1,,0\n4,a,0\n")
    rows = read(shards, id_column="id", bad_rows=BadRows(shards.with_suffix(".bad")))
    assert rows.values == ["c", "a"]
    places = [json.loads(line)["place"] for line in shards.with_suffix(".bad").read_text().splitlines()]
    assert sorted(places) == [
        "line 2 (row 1) of 'part-0.csv'",
        "line 2 (row 1) of 'part-1.csv'",
        "line 3 (row 2) of 'part-1.csv'",
    ]


def test_shards_may_be_packed_parquet_and_sequences(tmp_path):
    pa = pytest.importorskip("pyarrow", reason="reads and writes .parquet")
    from pyarrow import parquet

    (tmp_path / "tables").mkdir()
    for number in range(3):
        table = pa.table({"text": [f"a{number}"], "n": pa.array([number], pa.uint64() if number else pa.int64())})
        parquet.write_table(table, tmp_path / "tables" / f"{number}.parquet")
    assert read(tmp_path / "tables", keep=["n"]).keep == {"n": [0, 1, 2]}
    (tmp_path / "sequences").mkdir()
    (tmp_path / "sequences" / "a.fa").write_text(">a\nMK\n")
    (tmp_path / "sequences" / "b.fasta").write_text(">b\nML\n")
    assert read(tmp_path / "sequences").ids == ["a", "b"]


def test_files_of_several_kinds_are_an_error_until_one_is_named(shards):
    (shards / "x.fa").write_text(">a\nMK\n")
    with pytest.raises(ArgumentError, match=r"input must be a folder of files of one kind, .* It has 'csv', 'fasta'"):
        read(shards)
    assert read(shards, format="fasta").ids == ["a"]
    assert read(shards, format="csv").values == ["c", "a", "b"]


def test_images_among_other_files_make_a_folder_of_images(tmp_path):
    Image.new("RGB", (4, 3)).save(tmp_path / "a.png")
    (tmp_path / "notes.txt").write_text("mine")
    assert read(tmp_path).ids == ["a.png"]


def test_notes_of_many_files_are_few(tmp_path):
    for number in range(5):
        (tmp_path / f"{number}.txt").write_text("a\n\n")
    first, *_, last = read(tmp_path).notes
    assert first == f"1 blank line of '{tmp_path / '0.txt'}' left out."
    assert last == "The same is so of 2 other files."


def test_bad_rows_are_listed_outside_of_the_folder_that_is_read(shards):
    with pytest.raises(ArgumentError, match=r"skip_bad_rows must lie outside of the folder that is read, got '.*bad"):
        read(shards, bad_rows=BadRows(shards / "more" / "bad.jsonl"))
    assert read(shards).values == ["c", "a", "b"]
