"""Rows that cannot be used."""

from __future__ import annotations

import json

import pytest
from sources import source_of

from activation_extractor.cli.inputs import BadRows
from activation_extractor.errors import ArgumentError


def test_the_first_bad_row_is_an_error_where_none_is_skipped():
    with pytest.raises(ArgumentError, match=r"the text of row 2 must hold text, got ''\."):
        source_of("text", ["a", "", "b"])


def test_bad_rows_are_left_out_and_listed_once_however_often_the_rows_are_read(tmp_path):
    bad_rows = BadRows(tmp_path / "bad.jsonl")
    source = source_of("text", ["a", "", "b", 3], ids=["1", "2", "3", "4"], bad_rows=bad_rows)
    assert [row.value for row in source] == [row.value for row in source] == ["a", "b"]
    assert (source.rows, bad_rows.count) == (2, 2)
    first, second = map(json.loads, (tmp_path / "bad.jsonl").read_text().splitlines())
    assert first == {"place": "row 2", "id": "2", "error": "the text of row 2 must hold text, got ''. Remove that row."}
    assert (second["place"], second["id"]) == ("row 4", "4")


def test_the_file_is_there_when_no_row_is_bad_and_holds_nothing_of_an_earlier_run(tmp_path):
    (tmp_path / "bad.jsonl").write_text('{"place": "row 1", "id": null, "error": "of an earlier run"}\n')
    source_of("text", ["a"], bad_rows=BadRows(tmp_path / "bad.jsonl"))
    assert (tmp_path / "bad.jsonl").read_text() == ""


def test_a_file_that_cannot_be_written_is_refused_before_anything_is_read(tmp_path):
    with pytest.raises(ArgumentError, match=r"skip_bad_rows must be a file that can be written, got '.*nowhere.*'\."):
        BadRows(tmp_path / "nowhere" / "bad.jsonl")


def test_a_file_of_something_else_is_never_overwritten(tmp_path):
    (tmp_path / "x.csv").write_text("text\na\n")
    with pytest.raises(ArgumentError, match=r"skip_bad_rows must be a new file, or the list of an earlier run, got"):
        BadRows(tmp_path / "x.csv")
    assert (tmp_path / "x.csv").read_text() == "text\na\n"
