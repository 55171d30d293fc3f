"""Parquet."""

from __future__ import annotations

import datetime as dt
import decimal
import math

import numpy as np
import pytest
from sources import read

from activation_extractor.cli.inputs import BadRows
from activation_extractor.errors import ArgumentError

pa = pytest.importorskip("pyarrow", reason="reads and writes .parquet")
from pyarrow import parquet  # noqa: E402


def kept(folder, cells, kind=None):
    parquet.write_table(pa.table({"text": ["x"] * len(cells), "n": pa.array(cells, kind)}), folder / "x.parquet")
    return read(folder / "x.parquet", keep=["n"]).keep["n"]


def test_rows_are_numbered_from_one_and_have_typed_ids(tmp_path):
    parquet.write_table(pa.table({"sequence": ["MK", "AA"], "id": [7, 8]}), tmp_path / "x.parquet")
    rows = read(tmp_path / "x.parquet", id_column="id")
    assert (rows.values, rows.ids, rows.places) == (["MK", "AA"], [7, 8], ["row 1", "row 2"])


@pytest.mark.parametrize(
    ("ids", "kind", "expected"),
    [
        ([1, 2], pa.int64(), [1, 2]),
        ([1, 2], pa.uint64(), [1, 2]),
        ([1, 2**64 - 1], pa.uint64(), ["1", "18446744073709551615"]),
        (["007", "7"], pa.large_string(), ["007", "7"]),
        (["007", "7"], pa.dictionary(pa.int8(), pa.string()), ["007", "7"]),
        ([b"a", b"b"], pa.binary(), ["a", "b"]),
    ],
)
def test_ids_of_every_type_are_ids(tmp_path, ids, kind, expected):
    parquet.write_table(pa.table({"text": ["x", "y"], "id": pa.array(ids, kind)}), tmp_path / "x.parquet")
    assert read(tmp_path / "x.parquet", id_column="id").ids == expected


def test_ids_that_pandas_made_floats_are_refused(tmp_path):
    parquet.write_table(pa.table({"text": ["x", "y"], "id": [1.0, None]}), tmp_path / "x.parquet")
    with pytest.raises(ArgumentError, match=r"the id of row 1 must be text or an integer, got 1\.0\."):
        read(tmp_path / "x.parquet", id_column="id")


@pytest.mark.parametrize(
    ("cells", "kind", "expected"),
    [
        ([1, 2], pa.int8(), [1, 2]),
        ([0.5, 2], pa.float32(), [0.5, 2.0]),
        ([np.float16(0.5), np.float16(2)], pa.float16(), [0.5, 2.0]),
        ([0.5, None], pa.float64(), [0.5, math.nan]),
        ([True, False], pa.bool_(), [True, False]),
        ([1, None], pa.int64(), ["1", ""]),
        (["a", None], pa.string(), ["a", ""]),
        ([None, None], pa.null(), ["", ""]),
        (["a", "b", "a"], pa.dictionary(pa.int8(), pa.string()), ["a", "b", "a"]),
        ([b"a", b"\xc3\xb6"], pa.binary(), ["a", "ö"]),
        ([decimal.Decimal("1.10"), decimal.Decimal("2.00")], pa.decimal128(5, 2), ["1.10", "2.00"]),
        ([dt.date(2024, 1, 31)], pa.date32(), ["2024-01-31"]),
        ([dt.datetime(2024, 1, 31, 12)], pa.timestamp("s"), ["2024-01-31 12:00:00.000"]),
        ([1706702400000000001], pa.timestamp("ns"), ["2024-01-31 12:00:00.000000001"]),
        ([dt.time(12, 30)], pa.time32("s"), ["12:30:00.000"]),
        ([[1, 2], [3], None], pa.list_(pa.int64()), ["[1, 2]", "[3]", ""]),
        ([{"a": 1}], pa.struct([("a", pa.int64())]), ['{"a": 1}']),
        ([["x"]], pa.list_(pa.string()), ['["x"]']),
    ],
)
def test_cells_of_every_type_are_numbers_or_text(tmp_path, cells, kind, expected):
    np.testing.assert_equal(kept(tmp_path, cells, kind), expected)


def test_uint64_stays_uint64(tmp_path):
    from activation_extractor.cli.inputs import open_source

    for cells in ([1, 2], [1, 2**64 - 1]):
        assert kept(tmp_path, cells, pa.uint64()) == cells
        source = open_source(str(tmp_path / "x.parquet"), keep=["n"])
        assert source.entries(list(source))["n"].dtype == np.uint64


def test_only_the_columns_that_are_wanted_are_read(tmp_path, monkeypatch):
    parquet.write_table(pa.table({"text": ["a"], "id": [1], "wide": [[0.0] * 1000]}), tmp_path / "x.parquet")
    asked = []
    original = parquet.ParquetFile.iter_batches

    def iter_batches(self, *arguments, columns, **options):
        asked.append(columns)
        return original(self, *arguments, columns=columns, **options)

    monkeypatch.setattr(parquet.ParquetFile, "iter_batches", iter_batches)
    assert read(tmp_path / "x.parquet", id_column="id").values == ["a"]
    assert asked == [["id", "text"]] * len(asked)
    assert asked


def test_a_column_that_is_not_there_or_twice_there_is_an_error(tmp_path):
    parquet.write_table(pa.table([["a"], [1], [2]], names=["text", "n", "n"]), tmp_path / "x.parquet")
    assert read(tmp_path / "x.parquet").values == ["a"]
    with pytest.raises(ArgumentError, match=r"keep must name one column of '.*x\.parquet', got 'n'\."):
        read(tmp_path / "x.parquet", keep=["n"])
    with pytest.raises(ArgumentError, match=r"keep must name a column of .* got 'm'\. Its columns are 'text', 'n'"):
        read(tmp_path / "x.parquet", keep=["m"])


def test_names_with_dots_are_names(tmp_path):
    parquet.write_table(pa.table({"a.text": ["a"], "a": [{"text": "b"}]}), tmp_path / "x.parquet")
    assert read(tmp_path / "x.parquet", text_column="a.text", keep=["a"]).values == ["a"]


def test_a_null_and_an_empty_text_are_named_and_may_be_skipped(tmp_path):
    parquet.write_table(pa.table({"text": ["a", None, "", "d"]}), tmp_path / "x.parquet")
    with pytest.raises(ArgumentError, match=r"the text of row 2 must be text, got None\."):
        read(tmp_path / "x.parquet")
    assert read(tmp_path / "x.parquet", bad_rows=BadRows(tmp_path / "bad")).places == ["row 1", "row 4"]


@pytest.mark.parametrize("content", [b"", b"PAR1", b"text\na\n"])
def test_what_is_no_parquet_is_one_sentence(tmp_path, content):
    (tmp_path / "x.parquet").write_bytes(content)
    with pytest.raises(ArgumentError, match=r"input must be a file that can be read, got '.*x\.parquet'\."):
        read(tmp_path / "x.parquet")


def test_a_table_without_rows_is_an_error(tmp_path):
    parquet.write_table(pa.table({"text": pa.array([], pa.string())}), tmp_path / "x.parquet")
    with pytest.raises(ArgumentError, match="input must hold at least one row"):
        read(tmp_path / "x.parquet")
