"""Pictures and sounds in folders, and in tables that name them."""

from __future__ import annotations

import io
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile
from media import RATE, picture, save_sound, sound
from sources import read

from activation_extractor.cli.inputs import BadRows, open_source
from activation_extractor.cli.inputs._images import load_image
from activation_extractor.errors import ArgumentError


@pytest.fixture
def folder(tmp_path):
    for number, name in enumerate(["cats/a.png", "cats/b.jpg", "dogs/small/c.png", "d.png"]):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        picture(number).save(tmp_path / name)
    (tmp_path / "cats" / "._b.jpg").write_bytes(b"what macOS leaves")
    (tmp_path / "notes.md").write_text("about these")
    for name in (".ipynb_checkpoints", "__MACOSX"):
        (tmp_path / name).mkdir()
        picture().save(tmp_path / name / "a.png")
    return tmp_path


def test_a_row_is_a_file_and_the_folder_that_holds_it_can_be_kept(folder):
    source = open_source(str(folder), keep=["folder"])
    rows = list(source)
    assert [row.id for row in rows] == ["cats/a.png", "cats/b.jpg", "d.png", "dogs/small/c.png"]
    assert [row.kept for row in rows] == [("cats",), ("cats",), (".",), ("dogs/small",)]
    assert source.notes == (f"4 other files in {str(folder)!r} left out.",)
    with pytest.raises(ArgumentError, match="keep must be 'folder' where rows are files, the folder that holds them"):
        open_source(str(folder), keep=["label"])


def test_sounds_are_read_as_pictures_are_but_not_beside_them(tmp_path):
    save_sound(tmp_path / "a.flac", 0.1)
    save_sound(tmp_path / "b.ogg", 0.1)
    source = open_source(str(tmp_path))
    assert (source.kind, [row.id for row in source]) == ("audio", ["a.flac", "b.ogg"])
    picture().save(tmp_path / "cover.jpg")
    with pytest.raises(ArgumentError, match=r"images or sounds, and not both, got .*Pass input_format=image or"):
        open_source(str(tmp_path))
    assert [row.id for row in open_source(str(tmp_path), format="image")] == ["cover.jpg"]
    assert [row.id for row in open_source(str(tmp_path), format="audio")] == ["a.flac", "b.ogg"]


def test_one_file_is_one_row(folder):
    (row,) = open_source(str(folder / "cats" / "a.png"))
    assert row.id == "a.png"
    assert load_image(row.value).size == (40, 24)


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
def test_a_table_names_files_from_where_it_lies_and_has_their_labels(folder, suffix):
    records = [{"file": "dogs/small/c.png", "animal": "dog"}, {"file": str(folder / "cats/a.png"), "animal": "cat"}]
    path = folder / f"animals.{suffix}"
    if suffix == "parquet":
        pq.write_table(pa.Table.from_pylist(records), path)
    elif suffix == "jsonl":
        path.write_text("".join(f"{json.dumps(record)}\n" for record in records))
    else:
        path.write_text("file,animal\n" + "".join(f"{record['file']},{record['animal']}\n" for record in records))
    source = open_source(str(path), path_column="file", keep=["animal"])
    assert (source.kind, source.has_ids) == ("image", False)
    assert [(row.value.path, row.kept) for row in source] == [
        (folder / "dogs/small/c.png", ("dog",)),
        (folder / "cats/a.png", ("cat",)),
    ]
    with pytest.raises(ArgumentError, match="path_column must be left out with text_column"):
        open_source(str(path), path_column="file", text_column="animal")


@pytest.mark.parametrize("is_sound", [False, True])
def test_a_table_may_hold_the_bytes_of_files_as_those_of_the_hub_do(tmp_path, is_sound):
    content = io.BytesIO()
    if is_sound:
        soundfile.write(content, sound(0.1), RATE, format="FLAC")
    else:
        picture().save(content, "PNG")
    table = pa.Table.from_pylist([{"media": {"bytes": content.getvalue(), "path": None}, "label": 3}])
    pq.write_table(table, tmp_path / "x.parquet")
    source = open_source(str(tmp_path / "x.parquet"), path_column="media", keep=["label"])
    (row,) = source
    assert (source.kind, row.kept, row.value.content) == ("audio" if is_sound else "image", (3,), content.getvalue())


def test_files_that_are_missing_or_damaged_are_named_or_listed(folder):
    (folder / "cats" / "b.jpg").write_bytes(b"nothing")
    table = folder / "animals.csv"
    table.write_text("file\ncats/a.png\ncats/gone.png\ncats/b.jpg\n")
    with pytest.raises(ArgumentError, match=r"the file of .*2.* must exist, got .*"):
        open_source(str(table), path_column="file")
    bad = BadRows(folder / "bad.jsonl")
    assert len(list(open_source(str(table), path_column="file", bad_rows=bad))) == 1
    errors = [json.loads(line)["error"] for line in (folder / "bad.jsonl").read_text().splitlines()]
    assert ["exist" in errors[0], "cats/b.jpg" in errors[1]] == [True, True]
    bad = BadRows(folder / "bad.jsonl")
    assert [row.id for row in open_source(str(folder / "cats"), bad_rows=bad)] == ["a.png"]


def test_a_column_without_files_is_an_error(folder):
    (folder / "x.csv").write_text("file\nnotes.md\n")
    with pytest.raises(ArgumentError, match="the column 'file' must name files of images or sounds, got 'notes.md'"):
        open_source(str(folder / "x.csv"), path_column="file")


def test_a_folder_without_either_says_what_it_may_hold(tmp_path):
    (tmp_path / "notes.md").write_text("nothing")
    with pytest.raises(ArgumentError, match=r"a folder of images, such as .* or of sounds, such as"):
        read(str(tmp_path))
