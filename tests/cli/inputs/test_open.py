"""Rows as they come in files."""

from __future__ import annotations

import gzip
import io
import json

import numpy as np
import pytest
from PIL import Image
from sources import read

from activation_extractor.cli.inputs import _files, _images, _parquet, _sequences, open_source
from activation_extractor.errors import ArgumentError, MissingExtraError

FASTA = ">a|1 first protein\nMPTI\nKQL\n\n>b\nMK*\n"


def written(folder, name, content) -> str:
    (folder / name).write_text(content, encoding="utf-8")
    return str(folder / name)


def test_lines_of_text_are_rows(tmp_path):
    rows = read(written(tmp_path, "x.txt", "eins\r\nzwei ß\ndrei"))
    assert (rows.values, rows.ids) == (["eins", "zwei ß", "drei"], None)


def test_a_dash_is_standard_input(monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("eins\nzwei\n"))
    assert read("-").values == ["eins", "zwei"]


def test_objects_have_text_ids_and_further_columns(tmp_path):
    lines = [{"text": "a", "name": "x", "book": "Genesis", "n": 1}, {"text": "b", "name": "y", "book": "", "n": 2}]
    source = written(tmp_path, "x.jsonl", "\n".join(map(json.dumps, lines)))
    rows = read(source, id_column="name", keep=["book", "n"])
    assert (rows.values, rows.ids) == (["a", "b"], ["x", "y"])
    assert rows.keep == {"book": ["Genesis", ""], "n": [1, 2]}


def test_a_table_tells_its_columns_and_numbers_are_numbers(tmp_path):
    source = written(tmp_path, "x.csv", 'id,body,score,place\n1,"a, b",0.5,3\n2,"c\nd",1,4\n')
    rows = read(source, text_column="body", id_column="id", keep=["score", "place", "body"])
    assert rows.values == ["a, b", "c\nd"]
    assert rows.ids == ["1", "2"]
    assert rows.keep == {"score": [0.5, 1.0], "place": [3, 4], "body": ["a, b", "c\nd"]}


@pytest.mark.parametrize("suffix", [".fasta", ".fa", ".faa", ".fna"])
def test_sequences_have_the_ids_of_their_headers(tmp_path, suffix):
    rows = read(written(tmp_path, f"x{suffix}", FASTA), keep=["description"])
    assert rows.values == ["MPTIKQL", "MK"]
    assert rows.ids == ["a|1", "b"]
    assert rows.keep == {"description": ["first protein", ""]}


def test_text_may_be_compressed(tmp_path):
    (tmp_path / "x.fasta.gz").write_bytes(gzip.compress(FASTA.encode()))
    assert read(str(tmp_path / "x.fasta.gz")).ids == ["a|1", "b"]


def test_parquet_is_a_table(tmp_path):
    pa = pytest.importorskip("pyarrow", reason="reads and writes .parquet")
    from pyarrow import parquet

    parquet.write_table(pa.table({"sequence": ["MK", "AA"], "id": [7, 8]}), tmp_path / "x.parquet")
    rows = read(str(tmp_path / "x.parquet"), id_column="id")
    assert (rows.values, rows.ids) == (["MK", "AA"], [7, 8])


def test_arrays_are_mapped(tmp_path):
    np.save(tmp_path / "x.npy", np.arange(6.0).reshape(3, 2))
    rows = read(tmp_path / "x.npy")
    assert (len(rows.values), rows.ids) == (3, None)
    assert isinstance(rows.values[0], np.memmap)


def test_images_are_files_with_their_paths_as_ids(tmp_path):
    (tmp_path / "cats").mkdir()
    for name in ("cats/b.png", "a.JPG", "c.webp", "d.ppm"):
        Image.new("RGB", (4, 3)).save(tmp_path / name)
    for name in ("notes.txt", "labels.h5", "paper.pdf"):  # Pillow registers the last two, and cannot decode them
        (tmp_path / name).write_text("mine")
    rows = read(str(tmp_path))
    assert rows.ids == sorted(rows.ids)
    assert set(rows.ids) == {"cats/b.png", "a.JPG", "c.webp", "d.ppm"}
    assert rows.notes == (f"3 other files in {str(tmp_path)!r} left out.",)


@pytest.mark.parametrize(
    ("name", "content", "options", "text"),
    [
        ("x.txt", "", {}, r"input must hold at least one row, got '.*x\.txt'\."),
        (
            "x.doc",
            "a",
            {},
            r"input must be \.txt, \.jsonl, \.json, .*\.fastq, \.npy or a folder, got .* Say input_format=text",
        ),
        ("x.jsonl", '{"text": "a"}\n{"text"', {}, r"line 2 must hold a JSON object, got '\{\"text\"'\."),
        ("x.jsonl", "[1]", {}, r"line 1 must hold a JSON object, got \[1\]\."),
        ("x.jsonl", '{"text": 3}', {}, r"the text of line 1 must be text, got 3\."),
        (
            "x.jsonl",
            '{"body": "a", "n": 1}',
            {},
            r"text_column must name a column of '.*', got 'text'\. Its columns are 'body', 'n' \(line 1\)\.",
        ),
        (
            "x.jsonl",
            '{"text": "a"}',
            {"id_column": "name"},
            r"id_column must name a column of .* got 'name'\. Its columns are 'text' \(line 1\)\.",
        ),
        ("x.jsonl", '{"text": "a"}', {"keep": ["book"]}, r"got 'book'\."),
        (
            "x.jsonl",
            '{"text": "a", "id": null}',
            {"id_column": "id"},
            r"the id of line 1 must be text or an integer",
        ),
        (
            "x.csv",
            "id,text\n1,a\n1,b\n",
            {"id_column": "id"},
            r"the id of line 3 \(row 2\) must be its own, got '1'\. An earlier row has it: line 2 \(row 1\)\.",
        ),
        ("x.csv", "id,text\n1\n", {}, r"line 2 \(row 1\) must have a cell for each of the 2 columns, got"),
        ("x.csv", 'id,text\n1,"a', {}, r"the quote that is opened behind line 1 must be closed, got"),
        ("x.csv", "", {}, r"input must hold at least one row"),
        ("x.fasta", "MKL\n>a\nMK\n", {}, r"line 1 must come after a header that begins with '>', got 'MKL'\."),
        ("x.fasta", ">a\n>b\nMK", {}, r"record 'a' at line 1 must hold residues, got ''\."),
        (
            "x.fasta",
            ">a\nM\n>a\nK",
            {},
            r"the id of record 'a' at line 3 must be its own, got 'a'\. An earlier row has it: record 'a' at line 1\.",
        ),
        ("x.npy", "text", {}, r"input must be a \.npy file of numbers, got"),
        ("x.parquet", "PAR1", {}, r"input must be a file that can be read"),
    ],
)
def test_a_file_that_cannot_be_used_is_one_sentence(tmp_path, name, content, options, text):
    if name.endswith("parquet"):
        pytest.importorskip("pyarrow", reason="reads and writes .parquet")
    with pytest.raises(ArgumentError, match=text):
        open_source(written(tmp_path, name, content), **options)


def test_what_is_not_there_is_one_sentence(tmp_path):
    with pytest.raises(ArgumentError, match=r"input must be an existing file or folder, got '.*nowhere'\."):
        open_source(str(tmp_path / "nowhere"))


def test_an_array_that_is_pickled_or_a_single_number_is_refused(tmp_path):
    np.save(tmp_path / "o.npy", np.array([{}], dtype=object))
    with pytest.raises(ArgumentError, match="must be a .npy file of numbers"):
        open_source(str(tmp_path / "o.npy"))
    np.save(tmp_path / "s.npy", np.float32(1))
    with pytest.raises(ArgumentError, match="must hold an array with a row for each sample"):
        open_source(str(tmp_path / "s.npy"))
    np.save(tmp_path / "x.npy", np.zeros((2, 2)))
    with pytest.raises(ArgumentError, match=r"a column must be of a file that has columns, got 'label'\."):
        open_source(str(tmp_path / "x.npy"), keep=["label"])


def test_a_folder_without_images_and_an_unreadable_image_are_named(tmp_path):
    with pytest.raises(ArgumentError, match="input must be a folder of images"):
        open_source(str(tmp_path))
    (tmp_path / "broken.png").write_bytes(b"\x89PNG nothing")
    with pytest.raises(ArgumentError, match=r"an image must be a file that can be read, got '.*broken\.png'\. Remove"):
        open_source(str(tmp_path))


@pytest.mark.parametrize(
    ("name", "extra"), [("x.parquet", "tables"), ("pictures", "images"), ("x.fq", "sequences"), ("x.txt.gz", "cli")]
)
def test_a_package_that_is_missing_is_named_with_its_extra(tmp_path, monkeypatch, name, extra):
    for module in (_images, _parquet, _sequences, _files):
        monkeypatch.setattr(module, "find_spec", lambda module: None)
    (tmp_path / "x.parquet").write_bytes(b"")
    (tmp_path / "x.fq").write_bytes(b"")
    (tmp_path / "x.txt.gz").write_bytes(gzip.compress(b"a"))
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "x.png").write_bytes(b"")
    with pytest.raises(MissingExtraError, match=f"pip install 'activation_extractor\\[{extra}\\]'"):
        open_source(str(tmp_path / name))
