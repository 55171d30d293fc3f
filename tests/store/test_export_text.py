"""Text taken elsewhere: strings, unicode arrays, or UTF-8 bytes with offsets."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from exports import make_store
from safetensors.torch import load_file

from activation_extractor import capture, open_store
from activation_extractor.errors import ArgumentError
from activation_extractor.store import _array_files as module
from activation_extractor.store._export import export

pq = pytest.importorskip("pyarrow.parquet", reason="the extra 'parquet' is not installed")

FORMATS = ["parquet", "npy", "npz", "safetensors"]


@pytest.fixture
def store(tmp_path):
    return make_store(tmp_path)


class Texts(list):
    """A text column: it has a length, iterates and gives lists of strings for slices."""


def with_texts(store, texts, monkeypatch):
    keep = {**store.keep, "text": texts}
    monkeypatch.setattr(type(store), "keep", property(lambda self: keep))
    return store


@pytest.mark.parametrize("to", FORMATS)
def test_text_columns_stay_text(store, tmp_path, monkeypatch, to):
    texts = Texts(["", "zwölf", "a\nb", "x" * 300, "🐈"])
    monkeypatch.setattr(module, "BLOCK_BYTES", 2 * 4 * 300)
    export(with_texts(store, texts, monkeypatch), tmp_path / "out", to)
    if to == "parquet":
        found = pq.read_table(tmp_path / "out")["text"].to_pylist()
    elif to == "safetensors":
        tensors = load_file(tmp_path / "out")
        joined, starts = bytes(tensors["#keep:text"].numpy()), tensors["#keep:text#offsets"].tolist()
        found = [joined[first:last].decode() for first, last in pairwise(starts)]
    else:
        path = tmp_path / "out"
        found = (np.load(path / "text.npy") if to == "npy" else np.load(path)["#keep:text"]).tolist()
    assert found == texts


def test_text_that_numpy_would_cut_is_an_error_whose_advice_works(store, tmp_path, monkeypatch):
    texts = Texts(["a", "b\0", "c", "d", "e"])
    with_texts(store, texts, monkeypatch)
    with pytest.raises(ArgumentError, match=r"^text in '#keep:text' must end in something else than NUL, .*tensors"):
        export(store, tmp_path / "o", "npz")
    export(store, tmp_path / "o", "safetensors")
    assert bytes(load_file(tmp_path / "o")["#keep:text"].numpy()) == b"ab\0cde"


def test_kept_text_of_a_store_is_text_elsewhere(tmp_path):
    model = torch.nn.Sequential(torch.nn.Identity())
    words = ["zwölf", "", "a b"]
    with capture(model, "0", sink=tmp_path / "store") as acts, acts.step(keep={"word": words}):
        model(torch.ones(3, 2))
    store = open_store(tmp_path / "store")
    for to in FORMATS:
        export(store, tmp_path / to, to)
    assert pq.read_table(tmp_path / "parquet")["word"].to_pylist() == words
    assert np.load(tmp_path / "npy" / "word.npy").tolist() == words
    assert load_file(tmp_path / "safetensors")["#keep:word#offsets"].tolist() == [0, 6, 6, 9]
