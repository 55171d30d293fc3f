"""Parquet files, read with pyarrow itself."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from exports import DENSE, HALVES, IDS, LENGTHS, RAGGED, SHORT, make_store, simple_store

from activation_extractor.errors import ArgumentError
from activation_extractor.store import _parquet as parquet_module
from activation_extractor.store._export import export

pa = pytest.importorskip("pyarrow", reason="the extra 'parquet' is not installed")
pq = pytest.importorskip("pyarrow.parquet")

REALS = [
    *(torch.float16, torch.float32, torch.float64, torch.float8_e4m3fn, torch.bool, torch.int8, torch.uint8),
    *(torch.int16, torch.uint16, torch.int32, torch.uint32, torch.int64, torch.uint64),
]


@pytest.fixture
def store(tmp_path):
    return make_store(tmp_path)


def test_a_parquet_file_is_one_table_with_every_column(store, tmp_path):
    done = export(store, tmp_path / "out.parquet", "parquet")
    table = pq.read_table(tmp_path / "out.parquet")
    assert done.nbytes == (tmp_path / "out.parquet").stat().st_size
    assert table.column_names == ["id", "h.0:mean", "h.0:full", "h:1:mean", "x:mean", "label"]
    assert table["id"].to_pylist() == IDS
    assert table["label"].to_pylist() == [0, 1, 2, 3, 4]
    assert np.array_equal(table["h.0:mean"].combine_chunks().to_numpy_ndarray(), DENSE.view(5, 2, 3).numpy())
    assert table["h:1:mean"].to_pylist() == HALVES.float().tolist()
    assert table["h.0:full"].to_pylist() == [one.tolist() for one in torch.split(RAGGED, LENGTHS)]
    assert table["x:mean"].to_pylist() == [None, None, *SHORT.tolist()]


def test_a_parquet_file_keeps_types_and_says_shapes(store, tmp_path):
    export(store, tmp_path / "out.parquet", "parquet")
    schema = pq.read_schema(tmp_path / "out.parquet")
    assert schema.field("h.0:mean").type == pa.fixed_shape_tensor(pa.float32(), [2, 3])
    assert schema.field("h:1:mean").type.list_size == 2
    assert json.loads(schema.field("h.0:mean").metadata[b"shape"]) == [2, 3]
    assert schema.field("h:1:mean").metadata[b"dtype"] == b"bfloat16"
    assert schema.field("h.0:full").type.value_type.list_size == 2
    assert pa.types.is_list(schema.field("x:mean").type)  # null lists of a fixed size cannot be read before pyarrow 26
    assert (schema.field("label").type, schema.field("id").type) == (pa.int64(), pa.string())


@pytest.mark.parametrize("dtype", REALS)
def test_rows_of_several_axes_are_tensors_to_readers_that_know_them_and_lists_to_others(tmp_path, dtype):
    values = torch.arange(24).view(2, 3, 4).to(dtype)
    export(simple_store(tmp_path, {("a", "mean"): values}), tmp_path / "o", "parquet")
    column = pq.read_table(tmp_path / "o")["a"]
    if dtype is torch.bool:  # which no tensor of Arrow may hold
        assert column.type.list_size == 12
    else:
        assert np.array_equal(column.combine_chunks().to_numpy_ndarray().astype(float), values.double().numpy())
    assert column.to_pylist() == values.double().flatten(1).tolist()
    assert pq.ParquetFile(tmp_path / "o").metadata.schema.column(1).path == "a.list.element"


def test_a_parquet_file_is_compressed_with_its_bytes_split(store, tmp_path):
    export(store, tmp_path / "out.parquet", "parquet")
    group = pq.ParquetFile(tmp_path / "out.parquet").metadata.row_group(0)
    for name in ("h.0:mean", "h.0:full", "h:1:mean"):
        (column,) = [one for one in map(group.column, range(group.num_columns)) if one.path_in_schema.startswith(name)]
        assert column.compression == "ZSTD"
        assert "BYTE_STREAM_SPLIT" in column.encodings


@pytest.mark.parametrize("group_bytes", [1, 60, 150, 400])
def test_row_groups_of_any_size_give_the_same_table(store, tmp_path, monkeypatch, group_bytes):
    export(store, tmp_path / "whole.parquet", "parquet")
    monkeypatch.setattr(parquet_module, "_GROUP_BYTES", group_bytes)
    export(store, tmp_path / "out.parquet", "parquet")
    assert pq.read_table(tmp_path / "out.parquet").equals(pq.read_table(tmp_path / "whole.parquet"))
    groups = pq.ParquetFile(tmp_path / "out.parquet").metadata.num_row_groups
    assert groups == {1: 5, 60: 5, 150: 3, 400: 1}[group_bytes]


@pytest.mark.parametrize(
    "dtype",
    REALS,
)
def test_parquet_keeps_every_dtype_that_numpy_has(tmp_path, dtype):
    values = torch.tensor([[0, 1], [1, 1], [2, 0]]).to(dtype)
    export(simple_store(tmp_path, {("a", "mean"): values, ("b", "mean"): values[:, 0]}), tmp_path / "o", "parquet")
    table = pq.read_table(tmp_path / "o")
    kept = np.float32 if dtype is torch.float8_e4m3fn else values.numpy().dtype
    assert table["a"].type.value_type == table["b"].type == pa.from_numpy_dtype(kept)
    assert table["a"].to_pylist() == values.double().tolist()
    assert table["b"].to_pylist() == values[:, 0].double().tolist()


def test_nan_is_a_number_and_no_null(tmp_path):
    values = torch.tensor([[math.nan, 1.0], [math.inf, 2.0]])
    store = simple_store(tmp_path, {("a", "mean"): values}, {"score": values[:, 0]})
    export(store, tmp_path / "o", "parquet")
    table = pq.read_table(tmp_path / "o")
    assert table["score"].null_count == 0
    assert math.isnan(table["score"][0].as_py())
    assert math.isnan(table["a"][0].as_py()[0])


def test_what_parquet_cannot_hold_is_an_error_before_anything_is_written(tmp_path):
    complex_store = simple_store(tmp_path / "a", {("a", "mean"): torch.ones(2, 2, dtype=torch.complex64)})
    with pytest.raises(ArgumentError, match=r"^column 'a' of a Parquet file must hold real numbers, .*Export to npz"):
        export(complex_store, tmp_path / "o", "parquet")
    empty_store = simple_store(tmp_path / "b", {("a", "mean"): torch.ones(2, 0)})
    with pytest.raises(ArgumentError, match=r"must have at least one number in a row, got \(0,\)"):
        export(empty_store, tmp_path / "o", "parquet")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]
    for one, name in ((complex_store, "c"), (empty_store, "e")):  # the advice
        export(one, tmp_path / name, "npz")
        assert np.array_equal(np.load(tmp_path / name)["a"], one["a"].numpy())
