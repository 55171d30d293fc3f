"""How large the units of a run are: the first batch decides, and what the store says goes before it."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open
from small_runs import BATCHES, batch, run

from activation_extractor.errors import ArgumentError
from activation_extractor.runs._batches import Batch
from activation_extractor.runs._items import BatchItems, RowItems

MIB = 2**20


def rows_of(count: int) -> Batch:
    return Batch({"x": torch.zeros(count, 3)}, None, None, None, {})


@pytest.mark.parametrize(
    ("rows_per_unit", "rows", "nbytes", "size"),
    [
        (7, 2, 1, 7),  # as it was asked for
        (None, 2, 16 * MIB, 8),
        (None, 2, 24 * MIB, 4),  # a power of two, whatever the batches
        (None, 3, 36 * MIB, 4),
        (None, 2, 65 * MIB, 1),
        (None, 1, 65 * MIB, 1),
        (None, 1000, 1, 4096),
        (None, 5000, 1, 4096),
    ],
)
def test_the_first_batch_decides_how_many_rows_make_a_unit(rows_per_unit, rows, nbytes, size):
    items = RowItems(rows_per_unit, None)
    assert items.places(rows_of(rows)) == range(rows)
    items.choose_size(rows, nbytes)
    assert items.size == size
    assert items.places(rows_of(3)) == range(rows, rows + 3)


@pytest.mark.parametrize(
    ("rows_per_unit", "rows", "nbytes", "size"),
    [(7, 2, 1, 4), (1, 2, 1, 1), (None, 2, 24 * MIB, 2), (None, 2, 65 * MIB, 1), (None, 1000, 1, 4)],
)
def test_where_rows_are_not_known_it_decides_how_many_batches_do(rows_per_unit, rows, nbytes, size):
    items = BatchItems(rows_per_unit)
    assert items.places(rows_of(rows)) == range(1)
    items.choose_size(rows, nbytes)
    assert items.size == size
    assert items.places(rows_of(3)) == range(1, 2)


@pytest.mark.parametrize(
    ("unit_bytes", "rows", "nbytes", "size"),
    [(MIB, 2, 2048, 1024), (1024 * MIB, 5000, 5000 * 1536, 2**19), (1, 2, 1000, 1), (2**40, 1, 1, 2**40)],
)
def test_a_number_of_bytes_that_is_given_decides_alone_whatever_the_rows(unit_bytes, rows, nbytes, size):
    items = RowItems(None, None, unit_bytes=unit_bytes)
    items.choose_size(rows, nbytes)
    assert items.size == size
    batches = items.in_batches()
    batches.choose_size(rows, nbytes)
    assert batches.size == max(1, unit_bytes // nbytes)


def test_batches_without_rows_before_the_first_one_with_rows_are_of_its_unit():
    items = BatchItems(2)
    for _ in range(3):
        items.places(rows_of(0))
    items.choose_size(2, 1)
    assert items.size == 3


def units(out) -> list[dict]:
    found = []
    for path in sorted(out.glob("shards/*")):
        with safe_open(path, "pt") as file:
            found.append(file.metadata())
    return found


def test_a_unit_of_rows_cuts_batches(tmp_path):
    run(tmp_path, rows_per_unit=4)
    assert [unit["rows"] for unit in units(tmp_path)] == ["4", "4", "4", "3"]
    assert json.loads((tmp_path / "manifest.json").read_text())["rows_per_unit"] == 4


def test_a_model_with_rows_on_another_axis_has_units_of_batches(tmp_path):
    model = torch.nn.Sequential(torch.nn.LSTM(3, 4))  # (time, batch, features)
    batches = [torch.randn(5, 2, 3) for _ in range(3)]
    options = {"layers": "0", "reduce": "mean", "ids": None, "keep": (), "rows_per_unit": 4}
    for _ in range(2):
        assert run(tmp_path, batches, model=model, **options).rows == 6
    assert [unit["batches"] for unit in units(tmp_path)] == ["2", "1"]


def test_rows_that_cannot_be_counted_make_units_of_batches(tmp_path):
    class Takes(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Identity()

        def forward(self, x, table):
            return self.layer(x)

    batches = [{"x": torch.randn(2, 4), "table": torch.zeros(3)} for _ in range(3)]
    options = {"layers": "layer", "reduce": "full", "ids": None, "keep": (), "rows_per_unit": 4}
    run(tmp_path / "batches", batches, model=Takes(), **options)
    assert [unit["batches"] for unit in units(tmp_path / "batches")] == ["2", "1"]
    named = [{**one, "id": [2 * number, 2 * number + 1]} for number, one in enumerate(batches)]
    run(tmp_path / "rows", named, model=Takes(), **options | {"ids": "id"})
    assert ["batches" in unit for unit in units(tmp_path / "rows")] == [False, False]


def test_a_data_set_that_ends_in_a_full_unit_may_go_on(tmp_path):
    run(tmp_path, BATCHES[:4])
    store = run(tmp_path, [*BATCHES, batch(slice(15, 16))])
    assert store.ids == [f"row {row}" for row in range(16)]


def test_units_of_a_number_of_bytes_may_have_more_than_4096_rows_and_a_run_goes_on_with_their_size(tmp_path):
    model, x = torch.nn.Sequential(torch.nn.Linear(1, 2)), torch.arange(10_000.0)[:, None]
    options = {"layers": "0", "reduce": "full", "ids": None, "keep": (), "rows_per_unit": None, "model": model}
    run(tmp_path, x.split(100)[:82], unit_bytes=2**16, **options)
    assert [unit["rows"] for unit in units(tmp_path)] == ["8192", "8"]
    again = run(tmp_path, x.split(250), unit_bytes=1, append=True, **options)  # goes on in units of the same size
    assert [unit["rows"] for unit in units(tmp_path)] == ["8192", "8", "1800"]
    assert again.rows == 10_000
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["rows_per_unit"] == 8192
    assert "unit_bytes" not in json.dumps(manifest)


@pytest.mark.parametrize(("given", "text"), [(0, "a positive integer"), (1.5, "integer"), (True, "integer")])
def test_a_number_of_bytes_that_is_none_is_refused_before_anything_runs(tmp_path, given, text):
    with pytest.raises((ValueError, TypeError), match=f"unit_bytes must .*{text}"):
        run(tmp_path / "out", unit_bytes=given, rows_per_unit=None)
    assert not (tmp_path / "out").exists()


def test_a_number_of_bytes_beside_a_number_of_rows_is_refused(tmp_path):
    with pytest.raises(ArgumentError, match="unit_bytes must be left out with rows_per_unit, got 5"):
        run(tmp_path / "out", unit_bytes=5, rows_per_unit=4)
