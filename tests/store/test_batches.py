"""Batches of whole rows with their labels: `Store.batches`."""

from __future__ import annotations

import pytest
import torch
from token_stores import KEY, LENGTHS, MEAN, token_store

from activation_extractor import NpySink, NpzSink, SafetensorsSink, open_store
from activation_extractor.errors import StoreError
from activation_extractor.sinks import Step

ROWS = len(LENGTHS)


@pytest.mark.parametrize("sink", [SafetensorsSink, NpySink, NpzSink])
@pytest.mark.parametrize("shuffle", [True, False])
def test_rows_come_with_their_labels_once_an_epoch(tmp_path, sink, shuffle):
    store = token_store(tmp_path, sink=sink)
    options = {"keep": ["label", "text"], "rows": True, "batch_size": 4, "epochs": 1, "drop_last": False}
    found = []
    for values, rows, labels, texts in store.batches(
        MEAN, shuffle=shuffle, block_bytes=12, buffer_bytes=200, **options
    ):
        assert torch.equal(values, rows[:, None].expand(-1, 3).float())
        assert torch.equal(labels, 100 * rows)
        assert texts == [str(row) for row in rows.tolist()]
        found += rows.tolist()
    assert sorted(found) == list(range(ROWS))
    assert (found == sorted(found)) is not shuffle


def test_rows_are_handed_out_whole_and_several_columns_beside_each_other(tmp_path):
    sink = SafetensorsSink(tmp_path / "out")
    values = torch.arange(5 * 2 * 3).view(5, 2, 3)
    sink.write(Step(0, 5, {("a", "x"): values, ("b", "x"): -values, ("c", "x"): values[:, 0, 0]}))
    sink.close()
    store = open_store(tmp_path / "out")
    (batch, numbers), *_ = store.batches("a", "b", beside="c", batch_size=5, epochs=1)
    assert batch.shape == (5, 2, 2, 3)
    assert torch.equal(batch[:, 0], values[numbers // 6])
    assert torch.equal(batch[:, 1], -batch[:, 0])


def test_a_column_short_of_rows_has_those_it_has_with_their_own_labels(tmp_path):
    sink = SafetensorsSink(tmp_path / "out", rows_per_unit=4)
    for step in range(4):
        numbers = torch.arange(2 * step, 2 * step + 2)
        columns = {("always", "mean"): numbers[:, None].float()}
        if step % 2:
            columns["rare", "mean"] = numbers[:, None].float()
        sink.write(Step(step, 2, columns, None, {"label": 10 * numbers}))
    sink.close()
    store = open_store(tmp_path / "out")
    ((values, rows, labels),) = store.batches("rare", keep="label", rows=True, batch_size=4, epochs=1)
    assert sorted(rows.tolist()) == [2, 3, 6, 7]
    assert torch.equal(values[:, 0], rows.float())
    assert torch.equal(labels, 10 * rows)
    with pytest.raises(StoreError, match="belong to the other columns token by token"):
        store.batches("rare", "always", batch_size=2)


def test_a_ragged_column_is_refused_with_a_way_out(tmp_path):
    store = token_store(tmp_path)
    with pytest.raises(StoreError, match=r"have rows of one shape, got rows that differ in length\. Ask store\.tokens"):
        store.batches(KEY, batch_size=2)
    with pytest.raises(StoreError, match="have rows of one shape"):
        store.batches(MEAN, beside=[KEY], batch_size=2)


def test_all_columns_are_taken_when_none_is_named(tmp_path):
    sink = SafetensorsSink(tmp_path / "out")
    sink.write(Step(0, 3, {("a", "mean"): torch.ones(3, 2), ("b", "mean"): torch.zeros(3, 2)}))
    sink.close()
    assert next(open_store(tmp_path / "out").batches(batch_size=3)).tolist() == [[[1, 1], [0, 0]]] * 3
