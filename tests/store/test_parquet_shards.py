"""A folder of Parquet files, opened with pyarrow, and with polars, DuckDB and LanceDB where these are installed."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from exports import DENSE, IDS, make_store, simple_store

from activation_extractor import export
from activation_extractor.errors import ArgumentError, StoreError

pq = pytest.importorskip("pyarrow.parquet", reason="the extra 'parquet' is not installed")


@pytest.fixture
def store(tmp_path):
    return make_store(tmp_path)


@pytest.fixture
def parts(tmp_path):
    """100 rows of 8 float32 and of a tensor, in files of 10 rows."""
    values = {("a", "mean"): torch.arange(800.0).view(100, 8), ("b", "mean"): torch.arange(600.0).view(100, 2, 3)}
    store = simple_store(tmp_path, values, {"book": [f"book {row // 10}" for row in range(100)]})
    done = export(store, tmp_path / "parts", "parquet", shard_bytes=10 * (8 * 4 + 6 * 4 + 1024))
    assert done.nbytes == sum(path.stat().st_size for path in (tmp_path / "parts").iterdir())
    return tmp_path / "parts"


def test_files_have_the_bytes_that_were_asked_for_and_all_rows(parts):
    assert sorted(path.name for path in parts.iterdir()) == [f"data-{n:05d}-of-00010.parquet" for n in range(10)]
    assert {pq.read_metadata(path).num_rows for path in parts.iterdir()} == {10}
    table = pq.read_table(parts)
    assert table["id"].to_pylist() == list(range(100))
    assert np.array_equal(table["b"].combine_chunks().to_numpy_ndarray(), np.arange(600.0).reshape(100, 2, 3))


@pytest.mark.parametrize("shard_bytes", [1, 100, 10**9])
def test_a_folder_is_the_same_table_as_a_file(store, tmp_path, shard_bytes):
    export(store, tmp_path / "one.parquet", "parquet")
    export(store, tmp_path / "parts", "parquet", shard_bytes=shard_bytes)
    whole, parts = pq.read_table(tmp_path / "one.parquet"), pq.read_table(tmp_path / "parts")
    assert parts.equals(whole)
    assert parts.schema.equals(whole.schema, check_metadata=True)
    assert len(list((tmp_path / "parts").iterdir())) == (1 if shard_bytes == 10**9 else 5)


def test_a_store_without_rows_is_one_file_without_rows(tmp_path):
    import shutil

    make_store(tmp_path)
    for part in ("shards", "journal"):
        shutil.rmtree(tmp_path / "store" / part)
    from activation_extractor import open_store

    export(open_store(tmp_path / "store"), tmp_path / "parts", "parquet", shard_bytes=100)
    assert [path.name for path in (tmp_path / "parts").iterdir()] == ["data-00000-of-00001.parquet"]
    assert pq.read_table(tmp_path / "parts").num_rows == 0


def test_only_tables_have_files_of_a_size(store, tmp_path):
    with pytest.raises(ArgumentError, match=r"^shard_bytes must be None for npz, got 5\. Choose parquet or datasets\."):
        export(store, tmp_path / "out", "npz", shard_bytes=5)
    for size in (0, -1, 1.5, True, "1"):
        with pytest.raises(ArgumentError, match="^shard_bytes must be a positive integer"):
            export(store, tmp_path / "out", "parquet", shard_bytes=size)
    (tmp_path / "out").mkdir()
    with pytest.raises(StoreError, match=r"out' must be a new folder, got one that exists already"):
        export(store, tmp_path / "out", "parquet", shard_bytes=5)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "store"]


def test_polars_opens_it(parts):
    polars = pytest.importorskip("polars", reason="polars is not installed")
    frame = polars.read_parquet(parts)
    assert (frame.shape, frame["a"].dtype) == ((100, 4), polars.Array(polars.Float32, 8))
    assert np.array_equal(frame["a"].to_numpy(), np.arange(800.0).reshape(100, 8))
    assert frame.filter(polars.col("book") == "book 3")["id"].to_list() == list(range(30, 40))


def test_duckdb_opens_it(parts):
    duckdb = pytest.importorskip("duckdb", reason="DuckDB is not installed")
    found = duckdb.sql(f"select book, a[1], len(a) from '{parts}/*.parquet' where id = 42").fetchall()
    assert found == [("book 4", 336.0, 8)]


def test_lancedb_opens_and_searches_it(parts, tmp_path):
    lancedb = pytest.importorskip("lancedb", reason="LanceDB is not installed")
    table = lancedb.connect(tmp_path / "lance").create_table("rows", pq.read_table(parts, columns=["id", "a", "book"]))
    nearest = table.search(np.arange(336.0, 344.0, dtype=np.float32), vector_column_name="a").limit(1).to_list()
    assert (nearest[0]["id"], nearest[0]["book"]) == (42, "book 4")


def test_rows_come_back_where_ids_are_text(store, tmp_path):
    export(store, tmp_path / "parts", "parquet", shard_bytes=1, keys=[("h.0", "mean")])
    table = pq.read_table(tmp_path / "parts")
    assert (table.column_names, table["id"].to_pylist()) == (["id", "h.0", "label"], IDS)
    assert np.array_equal(table["h.0"].combine_chunks().to_numpy_ndarray(), DENSE.view(5, 2, 3).numpy())
