"""What kept columns are."""

from __future__ import annotations

import datetime as dt
import decimal
import json
import math

import numpy as np
import pytest
import torch
from sources import read, source_of

from activation_extractor.cli.inputs._columns import as_numbers
from activation_extractor.errors import ArgumentError


def csv_column(folder, cells):
    (folder / "x.csv").write_text("text,n\n" + "".join(f"a,{cell}\n" for cell in cells), encoding="utf-8")
    return read(folder / "x.csv", keep=["n"])


def json_column(folder, cells):
    (folder / "x.jsonl").write_text("".join(f'{{"text": "a", "n": {cell}}}\n' for cell in cells))
    return read(folder / "x.jsonl", keep=["n"])


@pytest.mark.parametrize(
    ("cells", "expected"),
    [
        (["1", "-20", "0"], [1, -20, 0]),
        (["0.5", "-1.25", "1e-07"], [0.5, -1.25, 1e-7]),
        (["0.5", "1"], [0.5, 1.0]),
        (["9223372036854775807", "-9223372036854775808"], [2**63 - 1, -(2**63)]),
        (["9223372036854775808", "1"], [2**63, 1]),
        (["18446744073709551615"], [2**64 - 1]),
        (["nan", "0.5", "inf"], [math.nan, 0.5, math.inf]),
    ],
)
def test_written_numbers_are_numbers_where_each_prints_back_as_it_stood(tmp_path, cells, expected):
    np.testing.assert_equal(csv_column(tmp_path, cells).keep["n"], expected)


@pytest.mark.parametrize(
    "cells",
    [
        ["00501", "10001"],
        ["10001", "00501"],
        ["007"],
        ["1_2"],
        ["1E5", "2"],
        ["1e5"],
        ["+1"],
        [" 1"],
        ["1 "],
        ["-0"],
        ["1.10", "1.2"],
        [".5"],
        ["5."],
        ["0x10"],
        ["٣"],
        ["12345678901234567890123"],
        ["18446744073709551616"],
        ["-1", "18446744073709551615"],
        ["9007199254740993", "0.5"],
        ["0.1000000000000000055511151231257827"],
        ["1e400"],
        ["infinity"],
        ["NaN", "1"],
        ["1", "2", "n/a"],
        ["1", '""', "2"],
        ["true", "false"],
        ["2024-01-31"],
        ["12:30"],
        ["1,5".join(['"', '"'])],
        ["Größe", "1"],
    ],
)
def test_all_other_written_cells_are_text_as_it_stood(tmp_path, cells):
    kept = csv_column(tmp_path, cells).keep["n"]
    assert kept == [cell.strip('"') for cell in cells]


def test_a_column_is_decided_over_all_rows_before_the_first(tmp_path):
    rows = csv_column(tmp_path, [*map(str, range(1900)), "unknown", "1"])
    assert rows.keep["n"] == [*map(str, range(1900)), "unknown", "1"]
    assert rows.notes == ("The column 'n' is kept as text: line 1902 (row 1901) holds 'unknown' after int values.",)


@pytest.mark.parametrize(
    ("cells", "expected"),
    [
        (["1", "2"], [1, 2]),
        (["1", "2.5"], [1.0, 2.5]),
        (["1.0", "1e5"], [1.0, 100000.0]),
        (["true", "false"], [True, False]),
        (["18446744073709551615", "1"], [2**64 - 1, 1]),
        (["0.5", "null", "NaN"], [0.5, math.nan, math.nan]),
        (['"a"', '"b"'], ["a", "b"]),
        (['"00501"', '"1"'], ["00501", "1"]),
        (['"a"', "null"], ["a", ""]),
        (["null", "null"], ["", ""]),
        (["1", "null", "2"], ["1", "", "2"]),
        (["true", "null"], ["true", ""]),
        (['"a"', "1", "2.5", "true"], ["a", "1", "2.5", "true"]),
        (["1", "true"], ["1", "true"]),
        (["[1, 2]", '{"a": "ö"}', "[]"], ["[1, 2]", '{"a": "ö"}', "[]"]),
        (["18446744073709551616", "1"], ["18446744073709551616", "1"]),
        (["9007199254740993", "0.5"], ["9007199254740993", "0.5"]),
        (["1e400", "1.5"], ["1E+400", "1.5"]),
    ],
)
def test_values_with_types_of_their_own_are_kept_or_are_text(tmp_path, cells, expected):
    kept = json_column(tmp_path, cells).keep["n"]
    np.testing.assert_equal(kept, expected)
    assert list(map(type, kept)) == list(map(type, expected))


def test_what_becomes_of_nulls_is_told(tmp_path):
    assert json_column(tmp_path, ["1", "null"]).notes == ("The column 'n' has no value in 1 row: it is kept as text.",)
    note = "The column 'n' has no value in 2 rows: it is kept as NaN."
    assert json_column(tmp_path, ["null", "0.5", "null"]).notes == (note,)


@pytest.mark.parametrize(
    ("cells", "dtype"),
    [([1, 2], "int64"), ([2**63, 1], "uint64"), ([0.5, 1], "float64"), ([True, False], "bool"), (["a", "b"], None)],
)
def test_every_batch_has_the_dtype_of_the_whole_column(cells, dtype):
    source = source_of("text", ["x", "y"], keep={"n": cells})
    for row in source:
        entry = source.entries([row])["n"]
        assert entry == [row.kept[0]]
        assert (None if isinstance(entry, list) else entry.dtype.name) == dtype
        if dtype is not None:
            assert torch.from_numpy(entry).tolist() == [row.kept[0]]


def test_dates_and_decimals_are_text_without_loss():
    cells = [dt.date(2024, 1, 31), dt.datetime(2024, 1, 31, 12, 30), decimal.Decimal("1.10")]
    source = source_of("text", ["x", "y", "z"], keep={"n": cells})
    assert [row.kept[0] for row in source] == ["2024-01-31", "2024-01-31T12:30:00", "1.10"]


def test_bytes_that_are_no_text_are_named_with_their_row_and_column():
    with pytest.raises(ArgumentError, match=r"'n' of row 2 must be text or a number, got b'\\xff'\."):
        source_of("text", ["x", "y"], keep={"n": [b"a", b"\xff"]})


def test_a_cell_in_another_encoding_is_named_with_its_row_and_column(tmp_path):
    (tmp_path / "x.csv").write_bytes(b"text,n\na,b\nc,Gr\xf6\xdfe\n")
    with pytest.raises(ArgumentError, match=r"'n' of line 3 \(row 2\) must be text in the encoding"):
        read(tmp_path / "x.csv", keep=["n"])
    assert read(tmp_path / "x.csv").values == ["a", "c"]


def test_labels_of_a_plot_follow_the_same_rule():
    assert as_numbers(["1", None, "2"]) == [1, None, 2]
    assert as_numbers(["00501", "10001"]) == ["00501", "10001"]
    assert as_numbers(["0.5", "1"]) == [0.5, 1.0]
    assert as_numbers([None]) == [None]


def test_a_column_may_be_kept_twice_over_or_be_the_text_or_the_id(tmp_path):
    (tmp_path / "x.jsonl").write_text(json.dumps({"text": "a", "id": 7}))
    rows = read(tmp_path / "x.jsonl", id_column="id", keep=["id", "text"])
    assert (rows.ids, rows.keep) == ([7], {"id": [7], "text": ["a"]})
