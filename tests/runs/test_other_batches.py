"""Runs that go on with batches of another size: rows are the same, and their inputs are compared row by row."""

from __future__ import annotations

import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_runs import BATCHES, MASK, TOKENS, batch, counted, files, interrupted, run, small_model

from activation_extractor import open_store
from activation_extractor.errors import OtherRunError


def cut(size: int, rows: int = 15) -> list[dict]:
    return [batch(slice(at, min(at + size, rows))) for at in range(0, rows, size)]


def trimmed(size: int) -> list[dict]:
    """Batches as a collator makes them: cut at their longest row."""
    return [
        one | {name: one[name][:, : one["attention_mask"].sum(1).max()] for name in ("input_ids", "attention_mask")}
        for one in cut(size)
    ]


@settings(deadline=None, max_examples=30)
@given(first=st.integers(1, 8), then=st.integers(1, 8), stop=st.integers(1, 15), unit=st.integers(1, 9))
def test_batches_of_any_size_go_on_with_those_of_any_other(tmp_path_factory, first, then, stop, unit):
    out = tmp_path_factory.mktemp("out")
    with pytest.raises(KeyboardInterrupt):
        run(out, interrupted(trimmed(first), stop), rows_per_unit=unit)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*differ by rounding.*in a batch with others")
        store = run(out, trimmed(then), rows_per_unit=unit)
    whole = run(tmp_path_factory.mktemp("whole"), rows_per_unit=unit)
    assert store.ids == whole.ids
    assert store.keep["label"][:].tolist() == whole.keep["label"][:].tolist()
    assert [len(column) for column in store["h.1", "full"]] == [len(column) for column in whole["h.1", "full"]]
    for key in store.pairs:
        for row, other in zip(store[key], whole[key], strict=True):
            torch.testing.assert_close(row, other)
    assert store.verify() == []


@pytest.mark.parametrize("size", [1, 2, 5, 15])
def test_a_complete_store_proves_itself_with_batches_of_another_size(tmp_path, size):
    run(tmp_path)
    before = files(tmp_path)
    model, calls = counted(small_model())
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*differ by rounding.*in a batch with others")
        run(tmp_path, cut(size), model=model)
    assert len(calls) in (1, 3)  # the proof, and twice more where its bits are others
    assert files(tmp_path) == before


def test_rounding_that_other_batches_bring_is_said(tmp_path, monkeypatch):
    run(tmp_path)
    model = small_model()
    model.h[0].register_forward_hook(lambda _, args, out: out * (1 + 1e-6 * (len(out) == 5)))  # as kernels may do
    with pytest.warns(UserWarning, match=r"values differ by rounding \(.*its rows were in a batch with others\)"):
        run(tmp_path, cut(5), model=model)


def test_another_model_is_found_whatever_the_batches(tmp_path):
    run(tmp_path)
    model = small_model()
    model.h[0].register_forward_hook(lambda _, args, out: out * 1.01)
    with pytest.raises(OtherRunError, match=r"what the model computes \(layer 'h.0' with 'mean' differs by .*row 0 of"):
        run(tmp_path, cut(5), model=model)


@pytest.mark.parametrize("size", [2, 3, 5])
@pytest.mark.parametrize("ids", ["id", None])
def test_another_input_is_found_whatever_the_batches(tmp_path, size, ids):
    options = {"ids": ids, "keep": ["label", *["id"] * (ids is None)]}
    run(tmp_path, **options)
    tokens = TOKENS.clone()
    tokens[7, 0] += 1  # a real position
    changed = [one | {"input_ids": tokens[one["label"]]} for one in cut(size)]
    with pytest.raises(OtherRunError, match="unit '00000001': other inputs"):
        run(tmp_path, changed, **options)
    assert MASK[7, 0]
    run(tmp_path, **options)


def test_a_process_of_another_batch_size_makes_what_is_missing(tmp_path):
    run(tmp_path)
    (tmp_path / "shards/00000001.safetensors").unlink()
    model, calls = counted(small_model())
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*differ by rounding.*in a batch with others")
        run(tmp_path, cut(5), model=model)
    assert len(calls) in (3, 5)  # the proof, and the two batches that reach into the unit
    assert open_store(tmp_path).ids == [f"row {row}" for row in range(15)]


def test_places_of_the_stored_units_follow_what_they_hold(tmp_path):
    run(tmp_path, BATCHES[:2], rows_per_unit=4)  # the last unit is short
    with pytest.raises(OtherRunError, match="it goes on after the last of its 2 rows"):
        run(tmp_path, rows_per_unit=4)
