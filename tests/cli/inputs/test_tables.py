"""Tables as text."""

from __future__ import annotations

import json

import pytest
from sources import read

from activation_extractor.cli.inputs import BadRows
from activation_extractor.errors import ArgumentError

ROWS = [["id", "text", "n"], ["007", "a", "1"], ["1e5", "b c", "2"]]


def written(folder, name, content) -> str:
    (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)
    return str(folder / name)


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize(
    ("name", "separator", "options"),
    [
        ("x.csv", ",", {}),
        ("x.CSV", ",", {}),
        ("x.csv", ";", {}),
        ("x.csv", "\t", {}),
        ("x.csv", "|", {}),
        ("x.csv", ":", {"separator": ":"}),
        ("x.tsv", "\t", {}),
        ("x.tab", "\t", {}),
        ("x.txt", "\t", {"format": "tsv"}),
        ("x.dat", "\t", {"format": "csv", "separator": "\\t"}),
        ("x.csv", " ", {"separator": " "}),
    ],
)
def test_cells_stand_between_separators(tmp_path, name, separator, options, end):
    rows = [[cell.replace(" ", "_") for cell in row] for row in ROWS]
    source = written(tmp_path, name, end.join(separator.join(row) for row in rows))
    columns = read(source, id_column="id", keep=["n"], **options)
    assert (columns.values, columns.ids, columns.keep) == (["a", "b_c"], ["007", "1e5"], {"n": [1, 2]})
    assert columns.places == ["line 2 (row 1)", "line 3 (row 2)"]


def test_a_comma_separates_where_a_header_could_be_read_both_ways(tmp_path):
    assert read(written(tmp_path, "x.csv", "text,a;b\nx;y,1\n"), keep=["a;b"]).values == ["x;y"]
    assert read(written(tmp_path, "x.csv", "a;text\nx;y\n"), text_column="a;text").values == ["x;y"]


def test_excel_may_say_what_the_separator_is(tmp_path):
    rows = read(written(tmp_path, "x.csv", "sep=;\r\nid;text\r\n1;a,b\r\n"))
    assert (rows.values, rows.places) == (["a,b"], ["line 3 (row 1)"])


def test_a_separator_is_one_character_of_a_table(tmp_path):
    for separator in ("", "::", '"'):
        with pytest.raises(ArgumentError, match=r"separator must be one character"):
            read(written(tmp_path, "x.csv", "text\na\n"), separator=separator or "\n")
    with pytest.raises(ArgumentError, match=r"separator must be left out where the input is no \.csv or \.tsv"):
        read(written(tmp_path, "x.jsonl", '{"text": "a"}\n'), separator=",")


def test_quoted_cells_hold_separators_quotes_and_line_ends(tmp_path):
    rows = read(written(tmp_path, "x.csv", 'n,text\r\n1,"a, ""b""\r\nc"\r\n2,d\n'), keep=["n"])
    assert (rows.values, rows.places) == (['a, "b"\r\nc', "d"], ["line 2 (row 1)", "line 4 (row 2)"])


def test_a_cell_may_be_of_any_length(tmp_path):
    long = "ab, " * 500_000
    assert read(written(tmp_path, "x.csv", f'text,n\n"{long}",1\nc,2\n'), keep=["n"]).values == [long, "c"]


def test_blank_lines_and_lines_of_empty_cells_are_left_out(tmp_path):
    rows = read(written(tmp_path, "x.csv", "\nid,text\n\n1,a\n,\n \n2,b\n\n"), id_column="id")
    assert (rows.values, rows.places) == (["a", "b"], ["line 4 (row 1)", "line 7 (row 2)"])
    assert rows.notes == (f"4 blank lines of '{tmp_path / 'x.csv'}' left out.",)


@pytest.mark.parametrize("content", ["", "\n", "text\n", "id,text", "\ufeffid,text\r\n"])
def test_a_table_without_a_row_is_an_error(tmp_path, content):
    with pytest.raises(ArgumentError, match="input must hold at least one row"):
        read(written(tmp_path, "x.csv", content))


def test_a_column_that_stands_twice_is_an_error_only_where_it_is_wanted(tmp_path):
    source = written(tmp_path, "x.csv", "id,text,x,x\n1,a,3,4\n")
    assert read(source).values == ["a"]
    with pytest.raises(ArgumentError, match=r"keep must name one column of '.*x\.csv', got 'x'\. It stands there more"):
        read(source, keep=["x"])
    with pytest.raises(ArgumentError, match=r"text_column must name one column of '.*x\.csv', got 'text'\."):
        read(written(tmp_path, "x.csv", "text,text\na,b\n"))


def test_a_separator_at_the_end_of_each_line_is_a_column_without_a_name(tmp_path):
    assert read(written(tmp_path, "x.csv", "id,text,\n1,a,\n2,b,\n"), id_column="id").values == ["a", "b"]


@pytest.mark.parametrize("line", ["1", "1,b,3", "1,b,"])
def test_a_row_with_more_or_fewer_cells_is_named(tmp_path, line):
    source = written(tmp_path, "x.csv", f"n,text\n0,a\n{line}\n2,c\n")
    with pytest.raises(ArgumentError, match=r"line 3 \(row 2\) must have a cell for each of the 2 columns, got \['1'"):
        read(source)
    rows = read(source, bad_rows=BadRows(tmp_path / "bad"))
    assert (rows.values, rows.places) == (["a", "c"], ["line 2 (row 1)", "line 4 (row 3)"])


def test_a_quote_within_a_cell_is_told_with_its_line(tmp_path):
    source = written(tmp_path, "x.csv", 'n,text\n1,"a" b\n2,c\n3,5" long\n')
    with pytest.raises(ArgumentError, match=r"line 2 must be cells of a table, got '.* expected after"):
        read(source)
    assert read(source, bad_rows=BadRows(tmp_path / "bad")).values == ["c", '5" long']


def test_a_quote_that_is_never_closed_is_an_error_even_where_rows_are_skipped(tmp_path):
    source = written(tmp_path, "x.csv", 'n,text\n1,a\n2,"b\n3,c\n')
    for bad_rows in (None, BadRows(tmp_path / "bad")):
        with pytest.raises(ArgumentError, match=r"the quote that is opened behind line 2 must be closed"):
            read(source, bad_rows=bad_rows)


def test_an_empty_text_and_an_empty_id_are_named_and_may_be_skipped(tmp_path):
    source = written(tmp_path, "x.csv", "id,text\n1,a\n,b\n3,\n4,d\n")
    with pytest.raises(ArgumentError, match=r"the id of line 3 \(row 2\) must hold text, got ''\. Give that row"):
        read(source, id_column="id")
    with pytest.raises(ArgumentError, match=r"the text of line 4 \(row 3\) must hold text, got ''\. Remove that row\."):
        read(source)
    assert read(source, id_column="id", bad_rows=BadRows(tmp_path / "bad")).ids == ["1", "4"]
    first, second = map(json.loads, (tmp_path / "bad").read_text().splitlines())
    assert (first["place"], second["place"], second["id"]) == ("line 3 (row 2)", "line 4 (row 3)", "3")


def test_names_of_columns_are_taken_as_they_stand(tmp_path):
    source = written(tmp_path, "x.csv", '\ufeff"text",Größe, n\na,b,c\n')
    rows = read(source, keep=["Größe", " n"])
    assert (rows.values, rows.keep) == (["a"], {"Größe": ["b"], " n": ["c"]})
    with pytest.raises(ArgumentError, match=r"keep must name a column .* got 'n'\. Its columns are 'text', 'Größe'"):
        read(source, keep=["n"])
