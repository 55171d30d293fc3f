"""Lines of text, as files of people have them."""

from __future__ import annotations

import pytest
from sources import read

from activation_extractor.cli.inputs import BadRows
from activation_extractor.errors import ArgumentError


@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\r"])
def test_line_ends_are_those_of_unix_windows_and_old_macs(tmp_path, end):
    (tmp_path / "x.txt").write_bytes(end.join([b"eins", b"zwei", b"drei"]))
    assert read(tmp_path / "x.txt").values == ["eins", "zwei", "drei"]
    (tmp_path / "x.txt").write_bytes(b"eins" + end)
    assert read(tmp_path / "x.txt").values == ["eins"]


def test_what_is_no_line_end_of_a_file_ends_no_row(tmp_path):
    line = "a\x0bb\x0cc\x1cd\x85e\u2028f\u2029g"
    (tmp_path / "x.txt").write_text(f"{line}\nz", encoding="utf-8")
    assert read(tmp_path / "x.txt").values == [line, "z"]


def test_blank_lines_are_left_out_and_counted_and_lines_are_numbered_as_an_editor_does(tmp_path):
    (tmp_path / "x.txt").write_text("\na\n  \t\nb \n\n")
    rows = read(tmp_path / "x.txt")
    assert (rows.values, rows.places) == (["a", "b "], ["line 2", "line 4"])
    assert rows.notes == (f"3 blank lines of '{tmp_path / 'x.txt'}' left out.",)


def test_a_file_without_a_row_is_an_error(tmp_path):
    for content in ("", "\n", " \n\r\n"):
        (tmp_path / "x.txt").write_text(content)
        with pytest.raises(ArgumentError, match="input must hold at least one row"):
            read(tmp_path / "x.txt")


def test_a_line_may_be_very_long(tmp_path):
    (tmp_path / "x.txt").write_text("a" * 3_000_000 + "\nb")
    assert list(map(len, read(tmp_path / "x.txt").values)) == [3_000_000, 1]


def test_a_line_that_is_no_text_is_named_and_may_be_skipped(tmp_path):
    (tmp_path / "x.txt").write_bytes(b"gut\nGr\xf6\xdfe\nso\n")
    text = (
        r"the text of line 2 must be text in the encoding that it is read in, got 'the byte 0xf6 behind 2 characters'\."
    )
    with pytest.raises(ArgumentError, match=text):
        read(tmp_path / "x.txt")
    rows = read(tmp_path / "x.txt", bad_rows=BadRows(tmp_path / "bad"))
    assert (rows.values, rows.places) == (["gut", "so"], ["line 1", "line 3"])


def test_lines_have_no_columns(tmp_path):
    (tmp_path / "x.txt").write_text("a\n")
    for options in ({"text_column": "body"}, {"id_column": "id"}, {"keep": ["label"]}):
        with pytest.raises(ArgumentError, match=r"must name a column of '.*x\.txt', got '(body|id|label)'\."):
            read(tmp_path / "x.txt", **options)
    assert read(tmp_path / "x.txt", text_column="text").values == ["a"]
