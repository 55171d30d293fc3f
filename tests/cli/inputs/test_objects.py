"""Objects of JSON."""

from __future__ import annotations

import json

import pytest
from sources import read

from activation_extractor.cli.inputs import BadRows, _objects
from activation_extractor.errors import ArgumentError

OBJECTS = [{"text": "a", "n": 1}, {"text": "b", "n": 2}, {"text": "c, ] }", "n": 3}]


@pytest.mark.parametrize("name", ["x.jsonl", "x.ndjson", "x.json"])
def test_a_line_is_an_object_and_blank_lines_are_left_out(tmp_path, name):
    (tmp_path / name).write_text("\n\n".join(map(json.dumps, OBJECTS)) + "\n\n")
    rows = read(tmp_path / name, keep=["n"])
    assert (rows.values, rows.keep, rows.places) == (
        ["a", "b", "c, ] }"],
        {"n": [1, 2, 3]},
        ["line 1", "line 3", "line 5"],
    )
    assert rows.notes == (f"3 blank lines of '{tmp_path / name}' left out.",)


@pytest.mark.parametrize("name", ["x.json", "x.jsonl"])
@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize("chunk", [1, 7, 1 << 18])
def test_an_array_of_objects_is_read_piece_by_piece(tmp_path, monkeypatch, name, indent, chunk):
    monkeypatch.setattr(_objects, "_CHUNK", chunk)
    (tmp_path / name).write_text(f" {json.dumps(OBJECTS, indent=indent)} \n")
    rows = read(tmp_path / name, keep=["n"])
    assert (rows.values, rows.keep, rows.places) == (
        ["a", "b", "c, ] }"],
        {"n": [1, 2, 3]},
        ["row 1", "row 2", "row 3"],
    )


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ('[{"text": "a"}', r"input must end with the '\]' of its array"),
        ('[{"text": "a"}, ', r"input must end with the '\]' of its array"),
        ('[{"text": "a"}] [{"text": "b"}]', r"input must end with its array"),
        ('[{"text": "a"}, {"text": ]', r"row 2 must hold a JSON object, got '\{\"text\": \]'\."),
        ('[{"text": "a"}, 3]', r"row 2 must hold a JSON object, got 3\."),
        ('{"text": {"0": "a"}}', r"the text of line 1 must be text, got \{'0': 'a'\}"),
        ('{\n "text": "a"\n}', r"line 1 must hold a JSON object, got '\{'\."),
        ("[]", "input must hold at least one row"),
        ("", "input must hold at least one row"),
    ],
)
def test_what_is_no_array_of_objects_is_one_sentence(tmp_path, content, text):
    (tmp_path / "x.json").write_text(content)
    with pytest.raises(ArgumentError, match=text):
        read(tmp_path / "x.json")


def test_a_key_that_one_object_lacks_is_told_with_its_line(tmp_path):
    (tmp_path / "x.jsonl").write_text('{"text": "a", "n": 1}\n\n{"text": "b"}\n{"n": 3, "text": "c"}\n')
    with pytest.raises(ArgumentError, match=r"^line 3 must have the key 'n', got 'none'\. It has 'text'\.$"):
        read(tmp_path / "x.jsonl", keep=["n"])
    rows = read(tmp_path / "x.jsonl", keep=["n"], bad_rows=BadRows(tmp_path / "bad"))
    assert (rows.values, rows.keep) == (["a", "c"], {"n": [1, 3]})


def test_a_key_that_no_object_has_is_a_missing_column_even_where_rows_are_skipped(tmp_path):
    (tmp_path / "x.jsonl").write_text('{"text": "a"}\n{"text": "b"}\n')
    for bad_rows in (None, BadRows(tmp_path / "bad")):
        with pytest.raises(ArgumentError, match=r"keep must name a column of '.*x\.jsonl', got 'n'\."):
            read(tmp_path / "x.jsonl", keep=["n"], bad_rows=bad_rows)


def test_a_key_that_the_first_object_lacks_may_be_skipped(tmp_path):
    (tmp_path / "x.jsonl").write_text('{"text": "a"}\n{"text": "b", "n": 1}\n')
    assert read(tmp_path / "x.jsonl", keep=["n"], bad_rows=BadRows(tmp_path / "bad")).values == ["b"]


def test_a_key_that_stands_twice_is_told(tmp_path):
    (tmp_path / "x.jsonl").write_text('{"text": "a"}\n{"text": "b", "text": "c"}\n')
    with pytest.raises(ArgumentError, match=r"line 2 must hold a JSON object, .* The key 'text' stands in it twice\."):
        read(tmp_path / "x.jsonl")


def test_bad_lines_are_skipped_one_by_one(tmp_path):
    lines = [
        '{"text": "a"}',
        '{"text": ',
        "[1]",
        '{"text": null}',
        '{"text": 3}',
        '{"text": ""}',
        '{"text": "b"}',
        "{}",
    ]
    (tmp_path / "x.jsonl").write_text("\n".join(lines))
    rows = read(tmp_path / "x.jsonl", bad_rows=BadRows(tmp_path / "bad"))
    assert (rows.values, rows.places) == (["a", "b"], ["line 1", "line 7"])
    bad = [json.loads(line)["place"] for line in (tmp_path / "bad").read_text().splitlines()]
    assert bad == [f"line {number}" for number in (2, 3, 4, 5, 6, 8)]


def test_half_of_a_surrogate_pair_is_refused_and_a_whole_one_is_a_character(tmp_path):
    (tmp_path / "x.jsonl").write_text('{"text": "\\ud83d\\ude00"}\n')
    assert read(tmp_path / "x.jsonl").values == ["😀"]
    (tmp_path / "x.jsonl").write_text('{"text": "a\\ud83d"}\n')
    with pytest.raises(ArgumentError, match=r"the text of line 1 must be Unicode without halves of surrogate pairs"):
        read(tmp_path / "x.jsonl")


def test_a_line_that_python_cannot_hold_is_told(tmp_path):
    for line in ("[" * 100_000, "9" * 5000):
        (tmp_path / "x.jsonl").write_text(f'{{"text": "a"}}\n{{"n": {line}\n')
        with pytest.raises(ArgumentError, match="line 2 must hold a JSON object"):
            read(tmp_path / "x.jsonl")
