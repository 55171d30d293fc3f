"""Columns of a store in a DataLoader: `Store.dataset`."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
import torch
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Dataset

from activation_extractor import NpySink, NpzSink, SafetensorsSink, Store, open_store
from activation_extractor._format._stored_rows import Ragged
from activation_extractor.errors import ActivationNotFoundError, StoreError
from activation_extractor.sinks import Step
from activation_extractor.store import StoreDataset

SINKS = [SafetensorsSink, NpySink, NpzSink]
ROWS = 10
VALUES = torch.arange(ROWS * 3).reshape(ROWS, 3).float()
LABELS = torch.arange(ROWS) * 10
LENGTHS = torch.tensor([1, 2, 0, 3, 1, 1, 4, 2, 1, 1])
TOKENS = torch.split(torch.arange(int(LENGTHS.sum()) * 2).reshape(-1, 2).float(), LENGTHS.tolist())


@pytest.fixture(scope="module", params=SINKS)
def store(request):
    """Two dense columns, a ragged one, one that is short of rows, and two kept ones; in three shards."""
    with tempfile.TemporaryDirectory() as folder:
        sink = request.param(Path(folder) / "out", rows_per_unit=4)
        for index in range(ROWS // 2):
            part = slice(2 * index, 2 * index + 2)
            values = {("dense", "mean"): VALUES[part], ("more", "mean"): VALUES[part, :1] + 0.5}
            values["ragged", "mean"] = Ragged(torch.cat(TOKENS[part]), LENGTHS[part])
            if index != 1:
                values["rare", "mean"] = VALUES[part]
            sink.write(Step(index, 2, values, None, {"label": LABELS[part], "weight": VALUES[part] / 2}))
        sink.close()
        yield open_store(Path(folder) / "out")


def test_a_data_set_gives_tuples_of_rows(store):
    data = store.dataset("dense", ("more", "mean"), keep="label")
    assert isinstance(data, Dataset)
    assert isinstance(data, StoreDataset)
    assert len(data) == ROWS
    row = data[3]
    assert isinstance(row, tuple)
    assert [part.tolist() for part in row] == [VALUES[3].tolist(), [9.5], 30]
    assert [part.tolist() for part in data[-1]] == [VALUES[9].tolist(), [27.5], 90]
    with pytest.raises(IndexError):
        data[ROWS]


@pytest.mark.parametrize("batch_size", [1, 3, 10, 64])
def test_a_loader_gives_the_rows_in_order(store, batch_size):
    batches = list(DataLoader(store.dataset("dense", "more", keep=["label", "weight"]), batch_size=batch_size))
    assert [len(batch) for batch in batches] == [4] * len(batches)
    assert [len(batch[0]) for batch in batches] == [len(one) for one in torch.split(VALUES, batch_size)]
    dense, more, label, weight = (torch.cat(parts) for parts in zip(*batches, strict=True))
    assert torch.equal(dense, VALUES)
    assert torch.equal(dense, store["dense"].torch())
    assert torch.equal(more, VALUES[:, :1] + 0.5)
    assert torch.equal(label, LABELS)
    assert torch.equal(weight, VALUES / 2)


def test_a_shuffled_loader_keeps_rows_and_labels_together(store):
    torch.manual_seed(0)
    loader = DataLoader(store.dataset("dense", keep="label"), batch_size=4, shuffle=True)
    labels = []
    for values, label in loader:
        assert torch.equal(values, VALUES[label // 10])
        labels += label.tolist()
    assert sorted(labels) == LABELS.tolist() != labels


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")  # of Python 3.12 on, about fork itself
@pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")  # on a machine with one core
def test_workers_that_are_forked_read_the_same(store):
    data = store.dataset("dense", keep="label")
    data[0]  # a file is open that the workers inherit
    batches = list(DataLoader(data, batch_size=3, num_workers=2, multiprocessing_context="fork"))
    assert torch.equal(torch.cat([values for values, _ in batches]), VALUES)
    assert torch.equal(torch.cat([label for _, label in batches]), LABELS)
    assert torch.equal(data[0][0], VALUES[0])


def test_a_worker_that_is_spawned_reads_the_same(tmp_path):
    data = _small(tmp_path, SafetensorsSink).dataset(("a", "mean"), keep="label")
    data[0]
    ((values, labels),) = DataLoader(data, batch_size=2, num_workers=1, multiprocessing_context="spawn")
    assert values.tolist() == [[0, 0], [1, 1]]
    assert labels.tolist() == [5, 6]


def test_a_loader_asks_for_the_rows_of_a_batch_at_once(store, monkeypatch):
    asked = []
    real = StoreDataset.__getitems__

    def getitems(data, indices):
        asked.append(list(indices))
        return real(data, indices)

    monkeypatch.setattr(StoreDataset, "__getitems__", getitems)
    monkeypatch.setattr(StoreDataset, "__getitem__", lambda data, index: pytest.fail("a row was asked for by itself"))
    list(DataLoader(store.dataset("dense", keep="label"), batch_size=4))
    assert asked == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]


def test_rows_asked_for_at_once_are_those_asked_for_one_by_one(store):
    data = store.dataset("dense", "ragged", keep=("label",))
    rows = data.__getitems__([7, 0, 7, 2])
    assert [type(row) for row in rows] == [tuple] * 4
    for row, index in zip(rows, [7, 0, 7, 2], strict=True):
        assert all(torch.equal(*parts) for parts in zip(row, data[index], strict=True))
    assert data.__getitems__([]) == []


def test_ragged_rows_are_collated_by_the_user(store):
    def collate(rows):
        return pad_sequence([row for row, _ in rows], batch_first=True), torch.stack([label for _, label in rows])

    loader = DataLoader(store.dataset("ragged", keep="label"), batch_size=5, collate_fn=collate)
    (first, first_labels), (second, _) = loader
    assert (first.shape, second.shape) == ((5, 3, 2), (5, 4, 2))
    assert torch.equal(first[3], TOKENS[3])
    assert torch.equal(second[1], TOKENS[6])
    assert torch.equal(first[0, :1], TOKENS[0])
    assert not first[2].any()  # the row without positions
    assert first_labels.tolist() == [0, 10, 20, 30, 40]


def test_a_column_short_of_rows_is_refused_with_a_way_out(store):
    text = r"Column\(\('rare', 'mean'\).* must have all 10 rows of its store, got 8\. Read it with column\[\.\.\.\] and"
    for keys in (["rare"], ["dense", "rare"]):
        with pytest.raises(StoreError, match=text):
            store.dataset(*keys)
    assert torch.equal(store["rare"][:], VALUES[store["rare"].rows])  # as the text advises


def test_a_column_that_is_not_there_is_an_error_with_close_matches(store):
    with pytest.raises(ActivationNotFoundError, match=r"Nothing is recorded under 'dens'\. Close matches: 'dense'\."):
        store.dataset("dens")
    text = r"A kept column must be one of 'label', 'weight', got 'lable'\."
    for keep in ("lable", ["label", "lable"]):
        with pytest.raises(ActivationNotFoundError, match=text) as caught:
            store.dataset("dense", keep=keep)
        assert caught.value.key == "lable"


@pytest.mark.parametrize("make_sink", SINKS)
def test_all_columns_are_taken_when_none_is_named(tmp_path, make_sink):
    store = _small(tmp_path, make_sink)
    row = store.dataset()[1]
    assert [part.tolist() for part in row] == [[1, 1], [-1, -1], [2, 2], [-2, -2]]
    assert [part.tolist() for part in store.dataset(keep="label")[1]] == [*(part.tolist() for part in row), 6]
    assert list(store) == [("a", "mean"), ("a", "max"), ("b", "mean"), ("b", "max")]  # in this order


def _small(folder: Path, make_sink: type) -> Store:
    sink = make_sink(folder / "out")
    ones = torch.tensor([[0.0, 0.0], [1.0, 1.0]])
    columns = {("a", "mean"): ones, ("a", "max"): -ones, ("b", "mean"): 2 * ones, ("b", "max"): -2 * ones}
    sink.write(Step(0, 2, columns, None, {"label": torch.tensor([5, 6])}))
    sink.close()
    return open_store(folder / "out")


def test_a_key_that_does_not_say_its_reducer_is_an_error(tmp_path):
    store = _small(tmp_path, SafetensorsSink)
    with pytest.raises(ActivationNotFoundError, match=r"must say which reducer is meant .* Write \['a', 'mean'\]\."):
        store.dataset("a")
    assert len(store.dataset(("a", "mean"))) == 2  # as the text advises


def test_a_store_without_kept_columns_says_so(tmp_path):
    sink = SafetensorsSink(tmp_path / "out")
    sink.write(Step(0, 2, {("a", "mean"): torch.ones(2, 2)}))
    sink.close()
    with pytest.raises(ActivationNotFoundError, match=r"A kept column must be one of none, got 'label'\.") as caught:
        open_store(tmp_path / "out").dataset(keep="label")
    assert isinstance(caught.value, KeyError)


def test_a_damaged_shard_is_an_error_of_the_loader(tmp_path):
    store = _small(tmp_path, NpySink)
    loader = DataLoader(store.dataset(), batch_size=2)
    (shard,) = (tmp_path / "out/shards").iterdir()
    (shard / "0000-a_mean.npy").write_bytes(b"")
    with pytest.raises(StoreError, match="must be a readable shard"):
        next(iter(loader))
