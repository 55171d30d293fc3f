"""Columns of a store of many units: what is looked up is looked up once."""

from __future__ import annotations

import pickle
import random

import pytest
import torch

from activation_extractor import NpySink, NpzSink, SafetensorsSink, open_store
from activation_extractor._format import _reader
from activation_extractor._format._stored_rows import Ragged
from activation_extractor.sinks import Step

UNITS = 300  # more than headers are remembered


@pytest.fixture(scope="module", params=[SafetensorsSink, NpzSink, NpySink])
def store(request, tmp_path_factory):
    sink = request.param(tmp_path_factory.mktemp("many") / "out", rows_per_unit=2)
    for unit in range(UNITS):
        lengths = torch.tensor([1 + unit % 3, 2])
        values = {("h", "mean"): torch.full((2, 3), float(unit)) + torch.tensor([[0.0], [0.5]])}
        values["h", "full"] = Ragged(torch.full((int(lengths.sum()), 3), float(unit)), lengths)
        sink.write(Step(unit, 2, values, [f"{unit}a", f"{unit}b"]))
    sink.close()
    return open_store(sink.path)


@pytest.mark.parametrize("reducer", ["mean", "full"])
def test_a_header_is_parsed_once_however_often_rows_are_read_in_random_order(store, reducer, monkeypatch):
    parsed, read = [], _reader.read_shard
    monkeypatch.setattr(_reader, "read_shard", lambda path, *rest: parsed.append(path) or read(path, *rest))
    column, order = open_store(store.path)["h", reducer], random.Random(0)
    rows = [order.randrange(2 * UNITS) for _ in range(1500)]
    for row in rows:
        value = column[row]
        assert value.flatten()[0] == row // 2 + (row % 2 / 2 if reducer == "mean" else 0)
        assert value.shape == ((3,) if reducer == "mean" else (2 if row % 2 else 1 + row // 2 % 3, 3))
    assert len(parsed) == len({row // 2 for row in rows})


def test_a_column_that_is_asked_for_again_knows_what_the_first_one_found(store, monkeypatch):
    parsed, read = [], _reader.read_shard
    monkeypatch.setattr(_reader, "read_shard", lambda path, *rest: parsed.append(path) or read(path, *rest))
    again = open_store(store.path)
    for _ in range(2):
        for row in range(0, 2 * UNITS, 2):
            assert again["h", "mean"][row][0] == row // 2
    assert len(parsed) == UNITS


def test_a_column_goes_to_another_process_without_its_journal(store):
    column = store["h", "mean"]
    packed = pickle.dumps(column)
    assert len(packed) < 10_000
    assert torch.equal(pickle.loads(packed)[:], column[:])
    assert torch.equal(pickle.loads(pickle.dumps(store["h", "full"])).flat(), store["h", "full"].flat())
