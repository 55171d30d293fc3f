"""A store taken elsewhere, checked with numpy, safetensors and pyarrow themselves."""

from __future__ import annotations

import os
import resource
import shutil
import tracemalloc
from itertools import pairwise

import numpy as np
import pytest
import safetensors
import torch
from exports import DENSE, HALVES, IDS, LABEL, RAGGED, SHORT, STARTS, make_store, simple_store
from safetensors.torch import load_file

from activation_extractor import NpzSink, SafetensorsSink, open_store
from activation_extractor._format._stored_rows import Ragged
from activation_extractor.errors import ArgumentError, MissingExtraError, StoreError
from activation_extractor.sinks import Step
from activation_extractor.store import _export as module
from activation_extractor.store import _parquet as parquet_module
from activation_extractor.store import export as public_export

pq = pytest.importorskip("pyarrow.parquet", reason="the extra 'parquet' is not installed")

FORMATS = ["parquet", "npy", "npz", "safetensors", "datasets", "h5ad"]
EXTRAS = {"datasets": "datasets", "h5ad": "h5py"}


def export(store, out, to):
    """All of the store, but for the ragged columns where the format has none."""
    if to in EXTRAS:
        pytest.importorskip(EXTRAS[to], reason=f"the extra {to!r} is not installed")
    keys = [key for key in store.pairs if not store[key].is_ragged] if to == "h5ad" else None
    return public_export(store, out, to, keys=keys)


def h5py_ids(path):
    import h5py

    with h5py.File(path) as file:
        return file["obs/_index"][:]


@pytest.fixture
def store(tmp_path):
    return make_store(tmp_path)


def test_a_folder_of_npy_files_has_one_for_each_column(store, tmp_path):
    done = export(store, tmp_path / "out", "npy")
    arrays = {path.name: np.load(path) for path in (tmp_path / "out").iterdir()}
    assert done.nbytes == sum(path.stat().st_size for path in (tmp_path / "out").iterdir())
    assert sorted(arrays) == [
        "h%3A1%3Amean.npy",
        "h.0%3Afull#offsets.npy",
        "h.0%3Afull.npy",
        "h.0%3Amean.npy",
        "ids.npy",
        "label.npy",
        "x%3Amean#rows.npy",
        "x%3Amean.npy",
    ]
    assert arrays["ids.npy"].tolist() == IDS
    assert np.array_equal(arrays["h.0%3Amean.npy"], DENSE.view(5, 2, 3).numpy())
    assert np.array_equal(arrays["h.0%3Afull.npy"], RAGGED.numpy())
    assert arrays["h.0%3Afull#offsets.npy"].tolist() == STARTS
    assert np.array_equal(arrays["h%3A1%3Amean.npy"], HALVES.float().numpy())
    assert arrays["x%3Amean#rows.npy"].tolist() == [2, 3, 4]
    assert np.array_equal(arrays["x%3Amean.npy"], SHORT.numpy())
    assert np.array_equal(np.load(tmp_path / "out/h.0%3Amean.npy", mmap_mode="r"), DENSE.view(5, 2, 3).numpy())


def test_an_npz_file_has_every_column_by_its_entry(store, tmp_path):
    export(store, tmp_path / "out.npz", "npz")
    with np.load(tmp_path / "out.npz") as arrays:
        assert sorted(arrays.files) == sorted(
            ["#ids", "h.0:mean", "h.0:full", "h.0:full#offsets", "h%3A1:mean", "x:mean", "x:mean#rows", "#keep:label"]
        )
        assert arrays["#ids"].tolist() == IDS
        assert np.array_equal(arrays["h.0:mean"], DENSE.view(5, 2, 3).numpy())
        assert np.array_equal(arrays["h.0:full"], RAGGED.numpy())
        assert arrays["#keep:label"].tolist() == LABEL.tolist()


def test_a_safetensors_file_has_every_column_by_its_entry_and_in_its_dtype(store, tmp_path):
    export(store, tmp_path / "out.safetensors", "safetensors")
    tensors = load_file(tmp_path / "out.safetensors")
    assert torch.equal(tensors["h%3A1:mean"], HALVES)
    assert torch.equal(tensors["h.0:mean"], DENSE.view(5, 2, 3))
    assert torch.equal(tensors["h.0:full"], RAGGED)
    assert tensors["h.0:full#offsets"].tolist() == STARTS
    assert tensors["x:mean#rows"].tolist() == [2, 3, 4]
    assert torch.equal(tensors["#keep:label"], LABEL)
    joined, starts = bytes(tensors["#ids"].numpy()), tensors["#ids#offsets"].tolist()
    assert [joined[first:last].decode() for first, last in pairwise(starts)] == IDS


def test_names_are_those_that_saved_activations_have(tmp_path):
    store = simple_store(tmp_path, {("h:0/x", "mean"): torch.ones(2, 3)})
    export(store, tmp_path / "out.safetensors", "safetensors")
    assert sorted(load_file(tmp_path / "out.safetensors")) == ["#ids", "h%3A0%2Fx"]


@pytest.mark.parametrize("to", FORMATS)
def test_integer_ids_and_row_numbers_stay_integers(tmp_path, to):
    for name, ids in (("given", [7, -1, 2**40, 3, 4]), ("none", None)):
        (tmp_path / name).mkdir()
        out = tmp_path / f"{name}.out"
        export(make_store(tmp_path / name, ids), out, to)
        found = {
            "parquet": lambda path: pq.read_table(path)["id"].to_numpy(),
            "npy": lambda path: np.load(path / "ids.npy"),
            "npz": lambda path: np.load(path)["#ids"],
            "safetensors": lambda path: load_file(path)["#ids"].numpy(),
            "datasets": lambda path: __import__("datasets").load_from_disk(path).with_format("numpy")["id"][:],
            "h5ad": lambda path: h5py_ids(path),
        }[to](out)
        if to == "h5ad":  # whose ids are text
            assert found.tolist() == [str(row_id).encode() for row_id in ids or [0, 1, 2, 3, 4]]
            continue
        assert found.dtype == np.int64
        assert found.tolist() == (ids or [0, 1, 2, 3, 4])


def test_names_that_meet_are_told_apart(tmp_path):
    values = {(name, "mean"): torch.full((2, 1), float(index)) for index, name in enumerate(["id", "ids", "a"])}
    keep = {"a": torch.tensor([5, 6]), "id": torch.tensor([7, 8])}
    store = simple_store(tmp_path, values, keep, ["p", "q"])
    export(store, tmp_path / "o.parquet", "parquet")
    table = pq.read_table(tmp_path / "o.parquet")
    assert table.column_names == ["id", "id:mean", "ids", "a", "keep:a", "keep:id"]
    assert (table["id"].to_pylist(), table["id:mean"].to_pylist()) == (["p", "q"], [[0.0], [0.0]])
    assert (table["keep:a"].to_pylist(), table["keep:id"].to_pylist()) == ([5, 6], [7, 8])
    export(store, tmp_path / "o", "npy")
    assert np.load(tmp_path / "o/ids.npy").tolist() == ["p", "q"]
    assert np.load(tmp_path / "o/ids%3Amean.npy").tolist() == [[1.0], [1.0]]


def test_names_that_cannot_be_told_apart_are_an_error_whose_advice_works(tmp_path):
    keys = [("a:b", "c"), ("a", "b:c")]
    store = simple_store(tmp_path, {key: torch.full((2, 1), float(index)) for index, key in enumerate(keys)})
    with pytest.raises(ArgumentError, match=r"two columns called 'a:b:c' apart, .* Use npz"):
        export(store, tmp_path / "o", "parquet")
    export(store, tmp_path / "o", "npz")
    assert np.load(tmp_path / "o")["a:b%3Ac"].tolist() == [[1.0], [1.0]]


def test_no_name_leads_out_of_the_folder(tmp_path):
    values = {(name, "mean"): torch.ones(1, 1) for name in ("../../up", "..", "/abs", "", "a\\b")}
    export(simple_store(tmp_path, values), tmp_path / "o", "npy")
    names = [path.name for path in (tmp_path / "o").iterdir()]
    assert len(names) == 6
    assert "..%2F..%2Fup.npy" in names
    assert sorted(path.name for path in tmp_path.iterdir()) == ["o", "store"]


@pytest.mark.parametrize("to", FORMATS)
def test_the_line_that_opens_it_does(store, tmp_path, to):
    if to == "h5ad":
        pytest.importorskip("anndata", reason="the extra 'h5ad' is not installed")
    done = export(store, tmp_path / "it's out", to)
    scope: dict = {}
    exec(done.opened_with, scope)
    found = {
        "parquet": lambda: scope["table"]["label"].to_pylist(),
        "npy": lambda: scope["arrays"]["label"].tolist(),
        "npz": lambda: scope["arrays"]["#keep:label"].tolist(),
        "safetensors": lambda: scope["tensors"].get_tensor("#keep:label").tolist(),
        "datasets": lambda: list(scope["dataset"]["label"]),
        "h5ad": lambda: scope["data"].obs["label"].tolist(),
    }[to]()
    assert found == [0, 1, 2, 3, 4]
    if to == "npz":
        scope["arrays"].close()


@pytest.mark.parametrize("to", FORMATS)
@pytest.mark.parametrize("there", ["file", "folder", "link"])
def test_what_is_there_is_never_overwritten(store, tmp_path, to, there):
    out = tmp_path / "out"
    {"file": out.touch, "folder": out.mkdir, "link": lambda: out.symlink_to("nowhere")}[there]()
    kind = "folder" if to in ("npy", "datasets") else "file"
    with pytest.raises(StoreError, match=rf"out' must be a new {kind}, got one that exists already\. Choose another"):
        export(store, out, to)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "store"]
    assert there != "file" or out.read_bytes() == b""


@pytest.mark.parametrize("to", FORMATS)
def test_what_appears_meanwhile_is_never_overwritten(store, tmp_path, monkeypatch, to):
    out = tmp_path / "out"
    write, _ = module._FORMATS[to]

    def write_slowly(*arguments):
        write(*arguments)
        out.mkdir()
        (out / "mine").write_text("mine")

    monkeypatch.setitem(module._FORMATS, to, (write_slowly, ""))
    with pytest.raises(StoreError, match="must be a new"):
        export(store, out, to)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "store"]
    assert (out / "mine").read_text() == "mine"


def test_a_store_takes_no_export_into_itself(store, tmp_path):
    with pytest.raises(StoreError, match="must be outside the store, got a path inside it"):
        export(store, tmp_path / "store" / "out.npz", "npz")
    assert store.verify() == []


@pytest.mark.parametrize("to", FORMATS)
def test_a_disk_that_fills_up_leaves_nothing(tmp_path, to):
    store = simple_store(tmp_path, {("a", "mean"): torch.rand(1 << 12, 64)})  # 1 MiB
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 19, hard))
    try:
        with pytest.raises(StoreError, match=r"out' must be writable, got File too large\. Check the folder"):
            export(store, tmp_path / "out", to)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [path.name for path in tmp_path.iterdir()] == ["store"]


@pytest.mark.parametrize("to", FORMATS)
def test_a_damaged_store_leaves_nothing(store, tmp_path, to):
    shard = sorted((tmp_path / "store" / "shards").iterdir())[1]
    os.truncate(shard, shard.stat().st_size - 8)
    with pytest.raises(StoreError, match="must be a readable shard"):
        export(store, tmp_path / "out", to)
    assert [path.name for path in tmp_path.iterdir()] == ["store"]


def test_a_missing_folder_is_one_sentence(store, tmp_path):
    with pytest.raises(StoreError, match=r"must be writable, got No such file or directory\. Check the folder"):
        export(store, tmp_path / "not" / "there", "npz")


def test_an_unknown_format_and_a_missing_pyarrow_are_sentences(store, tmp_path, monkeypatch):
    with pytest.raises(
        ArgumentError, match=r"^to must be one of parquet, npy, npz, safetensors, datasets, h5ad, got 'csv'"
    ):
        export(store, tmp_path / "out", "csv")
    monkeypatch.setattr(parquet_module, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"^Exporting to parquet needs pyarrow, which is not inst"):
        export(store, tmp_path / "out", "parquet")
    assert [path.name for path in tmp_path.iterdir()] == ["store"]


@pytest.mark.parametrize("to", FORMATS)
def test_a_store_of_numpy_files_is_exported_too(tmp_path, to):
    export(make_store(tmp_path, make_sink=NpzSink), tmp_path / "out", to)
    if to == "safetensors":
        assert torch.equal(load_file(tmp_path / "out")["h%3A1:mean"], HALVES.float())


@pytest.mark.parametrize("to", FORMATS)
def test_a_large_store_is_written_in_bounded_memory(tmp_path, monkeypatch, to):
    monkeypatch.setattr(parquet_module, "_GROUP_BYTES", 1 << 20)
    sink = SafetensorsSink(tmp_path / "store", rows_per_unit=1024)
    for index in range(8):  # 32 MiB
        ragged = Ragged(torch.rand(4096, 128), torch.full((1024,), 4))
        values = {("a", "mean"): torch.rand(1024, 512), ("b", "mean"): ragged}
        sink.write(Step(index, 1024, values))
    sink.close()
    store = open_store(tmp_path / "store")
    export(store, tmp_path / "first", to)  # which imports what the format needs
    tracemalloc.start()
    export(store, tmp_path / "out", to)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 8 << 20
    if to == "parquet":
        about = pq.ParquetFile(tmp_path / "out").metadata  # what pyarrow has in memory is not traced
        assert max(about.row_group(index).total_byte_size for index in range(about.num_row_groups)) < 2 << 20


def test_a_safetensors_export_opens_as_it_is_read_by_others(store, tmp_path):
    export(store, tmp_path / "o", "safetensors")
    with safetensors.safe_open(tmp_path / "o", "np") as file:
        assert np.array_equal(file.get_tensor("h.0:mean"), DENSE.view(5, 2, 3).numpy())


@pytest.mark.parametrize("to", FORMATS)
def test_a_store_without_a_complete_unit_gives_columns_without_rows(store, tmp_path, to):
    for part in ("shards", "journal"):
        shutil.rmtree(tmp_path / "store" / part)
    if to == "h5ad":
        pytest.importorskip("anndata", reason="the extra 'h5ad' is not installed")
    done = export(open_store(tmp_path / "store"), tmp_path / "out", to)
    scope: dict = {}
    exec(done.opened_with, scope)
    if to == "parquet":
        assert scope["table"].num_rows == 0
        assert scope["table"].column_names == ["id", "h.0:mean", "h.0:full", "h:1:mean", "label"]
    elif to == "datasets":
        assert len(scope["dataset"]) == 0
        assert scope["dataset"].column_names == ["id", "h.0:mean", "h.0", "h:1:mean", "label"]
    elif to == "h5ad":
        assert (scope["data"].n_obs, scope["data"].obsm["h.0"].shape) == (0, (0, 2, 3))
    elif to == "safetensors":
        assert scope["tensors"].get_tensor("h.0:mean").shape == (0, 2, 3)
    else:
        assert scope["arrays"]["h.0:mean" if to == "npz" else "h.0%3Amean"].shape == (0, 2, 3)
        assert to == "npy" or scope["arrays"].close() is None
