"""h5ad files, read with h5py, and with anndata where it is installed."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from exports import DENSE, HALVES, IDS, SHORT, make_store, simple_store

from activation_extractor import export
from activation_extractor.errors import ArgumentError, MissingExtraError
from activation_extractor.store import _h5ad as module

h5py = pytest.importorskip("h5py", reason="the extra 'h5ad' is not installed")

DENSE_KEYS = [("h.0", "mean"), ("h:1", "mean"), ("x", "mean")]


@pytest.fixture
def store(tmp_path):
    return make_store(tmp_path)


def test_rows_are_in_obsm_and_kept_columns_in_obs(store, tmp_path):
    export(store, tmp_path / "out.h5ad", "h5ad", keys=DENSE_KEYS)
    with h5py.File(tmp_path / "out.h5ad") as file:
        assert (file.attrs["encoding-type"], file["obsm"].attrs["encoding-type"]) == ("anndata", "dict")
        assert [text.decode() for text in file["obs/_index"][:]] == IDS
        assert list(file["obs"].attrs["column-order"]) == ["label"]
        assert file["obs/label"][:].tolist() == [0, 1, 2, 3, 4]
        assert np.array_equal(file["obsm/h.0"][:], DENSE.view(5, 2, 3).numpy())
        assert np.array_equal(file["obsm/h:1"][:], HALVES.float().numpy())
        assert np.array_equal(file["obsm/x"][2:], SHORT.numpy())
        assert np.isnan(file["obsm/x"][:2]).all()


def test_anndata_opens_it(tmp_path):
    anndata = pytest.importorskip("anndata", reason="anndata is not installed")
    keep = {"book": ["Genesis", "", "ünï"], "year": torch.tensor([1, 2, 3]), "old": torch.tensor([True, False, True])}
    values = {("h.0", "mean"): torch.rand(3, 4), ("h.0", "norm"): torch.rand(3)}
    store = simple_store(tmp_path, values, keep, ["a", "b", "c"])
    export(store, tmp_path / "out.h5ad", "h5ad")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The 'future.infer_string' option")  # anndata 0.12, beside pandas 3
        data = anndata.read_h5ad(tmp_path / "out.h5ad")
        data.write_h5ad(tmp_path / "again.h5ad")  # what was read is what anndata can write
        again = anndata.read_h5ad(tmp_path / "again.h5ad")
    assert list(data.obs_names) == ["a", "b", "c"]
    assert list(data.obs.columns) == ["h.0:norm", "book", "year", "old"]
    assert data.obs["book"].tolist() == keep["book"]
    assert data.obs["old"].tolist() == [True, False, True]
    assert np.array_equal(data.obsm["h.0:mean"], values["h.0", "mean"].numpy())
    assert np.array_equal(data.obs["h.0:norm"], values["h.0", "norm"].numpy())
    assert np.array_equal(again.obsm["h.0:mean"], data.obsm["h.0:mean"])


@pytest.mark.parametrize("name", ["a/b", "/", ".", "", "..", "_index", "%", "%2F", "a\0b", "ünï"])
def test_no_name_leads_to_another_group_or_is_lost(tmp_path, name):
    names = {"/": "%2F", "a/b": "a%2Fb", "%": "%25", "%2F": "%252F", "a\0b": "a%00b"}
    names |= {special: f"{special}:mean" for special in ("", ".", "_index")}
    for number, (row, place) in enumerate([(torch.ones(2, 1), "obsm"), (torch.ones(2), "obs")]):
        (tmp_path / str(number)).mkdir()
        store = simple_store(tmp_path / str(number), {(name, "mean"): row})
        export(store, tmp_path / f"{number}.h5ad", "h5ad")
        with h5py.File(tmp_path / f"{number}.h5ad") as file:
            assert set(file[place]) - {"_index"} == {names.get(name, name)}
            assert file[place][names.get(name, name)][:].sum() == 2


def test_ragged_columns_have_no_place_and_the_advice_works(store, tmp_path):
    text = r"^column 'h.0:full' of an h5ad file must have rows of one shape, got \(5, None, 2\)\. Choose other"
    with pytest.raises(ArgumentError, match=text):
        export(store, tmp_path / "out", "h5ad")
    assert [path.name for path in tmp_path.iterdir()] == ["store"]
    export(store, tmp_path / "out", "h5ad", keys=DENSE_KEYS)


def test_numbers_that_cannot_be_missing_or_are_not_real_are_an_error(tmp_path):
    store = simple_store(tmp_path, {("a", "mean"): torch.ones(2, 1, dtype=torch.complex64)})
    with pytest.raises(ArgumentError, match="column 'a' of an h5ad file must hold real numbers"):
        export(store, tmp_path / "out", "h5ad")
    from activation_extractor import SafetensorsSink, open_store
    from activation_extractor.sinks import Step

    sink = SafetensorsSink(tmp_path / "short", rows_per_unit=1)
    for index in range(2):
        more = {("n", "x"): torch.tensor([7])} if index else {}
        sink.write(Step(index, 1, {("a", "x"): torch.ones(1, 1), **more}))
    sink.close()
    with pytest.raises(ArgumentError, match="column 'n' of an h5ad file must have all rows, or hold numbers that can"):
        export(open_store(tmp_path / "short"), tmp_path / "out", "h5ad")


def test_text_that_hdf5_would_cut_is_an_error(tmp_path):
    for number, (keep, ids) in enumerate([({"t": ["a\0b", "c"]}, None), ({}, ["a\0", "b"])]):
        (tmp_path / str(number)).mkdir()
        store = simple_store(tmp_path / str(number), {("a", "mean"): torch.ones(2, 1)}, keep, ids)
        with pytest.raises(ArgumentError, match=r"must be without NUL in an h5ad file, .* export to safetensors"):
            export(store, tmp_path / "out", "h5ad")
    assert not (tmp_path / "out").exists()


def test_many_texts_and_rows_are_written_in_blocks(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_TEXTS", 3)
    monkeypatch.setattr(module, "BLOCK_BYTES", 20)
    values, texts = torch.rand(10, 4), [f"text {number}" for number in range(10)]
    export(simple_store(tmp_path, {("a", "mean"): values}, {"t": texts}), tmp_path / "out", "h5ad")
    with h5py.File(tmp_path / "out") as file:
        assert np.array_equal(file["obsm/a"][:], values.numpy())
        assert [text.decode() for text in file["obs/t"][:]] == texts


def test_without_h5py_the_error_names_the_extra(store, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"^Exporting to h5ad needs h5py, .*activation_extractor\[h5ad\]"):
        export(store, tmp_path / "out", "h5ad", keys=DENSE_KEYS)
