"""Kept columns of text."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from models import BlockStack
from safetensors.torch import load_file
from torch.utils.data import DataLoader

from activation_extractor import NpySink, NpzSink, SafetensorsSink, capture, open_store
from activation_extractor.errors import ArgumentError, ArgumentTypeError, StoreError
from activation_extractor.sinks._step import check_keep
from activation_extractor.store import TextColumn

SINKS = [SafetensorsSink, NpySink, NpzSink]


def write(folder, texts, sink=SafetensorsSink):
    """A store of three rows a step, two steps a unit."""
    model = BlockStack()
    with capture(model, "h.0", reduce="mean", sink=sink(folder, rows_per_unit=6)) as acts:
        for start in range(0, len(texts), 3):
            part = texts[start : start + 3]
            with acts.step(keep={"label": part}):
                model(torch.ones(len(part), 3, dtype=torch.long))
    return open_store(folder)


TEXTS = ["Genesis", "", "a\nb", "Überfluß", "🌱", "x" * 1000, "nul\0", "last"]


@pytest.mark.parametrize("sink", SINKS)
def test_text_comes_back_as_it_was_given(tmp_path, sink):
    column = write(tmp_path, TEXTS, sink).keep["label"]
    assert isinstance(column, TextColumn)
    assert len(column) == len(TEXTS)
    assert list(column) == TEXTS
    assert [column[row] for row in range(-1, len(TEXTS))] == ["last", *TEXTS]
    assert column[2:7] == TEXTS[2:7]
    assert column[[7, 0]] == ["last", "Genesis"]
    assert column.numpy()[3] == "Überfluß"
    assert column.rows.tolist() == list(range(8))
    assert repr(column) == "TextColumn('label', (8,), str)"


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.text(st.characters(exclude_categories=["Cs"])), min_size=1, max_size=9))
def test_any_text_comes_back(tmp_path_factory, texts):
    assert list(write(tmp_path_factory.mktemp("texts") / "out", texts).keep["label"]) == texts


def test_on_disk_it_is_utf8_with_offsets(tmp_path):
    write(tmp_path, TEXTS)
    entries = load_file(tmp_path / "shards" / sorted(path.name for path in (tmp_path / "shards").iterdir())[0])
    assert bytes(entries["#keep:label"].numpy()) == "".join(TEXTS[:6]).encode()
    assert entries["#keep:label#offsets"].tolist()[:3] == [0, 7, 7]


def test_a_loader_hands_text_out_beside_rows(tmp_path):
    store = write(tmp_path, TEXTS)
    batches = list(DataLoader(store.dataset("h.0", keep="label"), batch_size=5))
    assert [list(label) for _, label in batches] == [TEXTS[:5], TEXTS[5:]]
    assert batches[0][0].shape == (5, 8)


def test_a_column_of_text_can_be_handed_to_another_process(tmp_path):
    column = pickle.loads(pickle.dumps(write(tmp_path, TEXTS).keep["label"]))
    assert list(column) == TEXTS


def test_other_bytes_than_text_are_an_error(tmp_path):
    store = write(tmp_path, ["äöü"] * 3)
    shard = next((tmp_path / "shards").iterdir())
    shard.write_bytes(shard.read_bytes().replace("äöü".encode(), b"\xff" * 6))
    with pytest.raises(StoreError, match=r"'label' must hold text in UTF-8, got other bytes\."):
        list(store.keep["label"])


def test_a_column_is_text_or_numbers_in_all_of_a_store(tmp_path):
    model = BlockStack()
    with pytest.raises(StoreError, match="keep one dtype"), capture(model, "h.0", sink=tmp_path, reduce="mean") as acts:
        for labels in (["a"], [1]):
            with acts.step(keep={"label": labels}):
                model(torch.ones(1, 3, dtype=torch.long))


@pytest.mark.parametrize("values", [["a", "b"], ("a", "b"), np.array(["a", "b"]), np.array(["a", "b"], dtype=object)])
def test_text_comes_in_any_sequence(values):
    assert check_keep({"label": values}) == {"label": ["a", "b"]}


@pytest.mark.parametrize("values", [["a", 1], [None], np.array(["a", None], dtype=object), "abc", [["a"], ["b"]]])
def test_what_is_neither_text_nor_numbers_is_an_error(values):
    with pytest.raises(ArgumentTypeError, match="keep must hold numbers or text in column 'label', got "):
        check_keep({"label": values})


def test_half_of_a_surrogate_pair_is_an_error():
    with pytest.raises(ArgumentError, match="keep must be UTF-8 text in column 'label', got"):
        check_keep({"label": ["\ud800"]})
