"""Two processes in one folder, of which one overtakes the other: with batches of other sizes, or adding rows."""

from __future__ import annotations

import warnings

import pytest
import torch
from small_runs import BATCHES, batch, run, small_model

from activation_extractor import open_store
from activation_extractor.errors import OtherRunError, StoreError

pytestmark = pytest.mark.filterwarnings("ignore:.*differ by rounding.*in a batch with others", "ignore:No row that")


def cut(size: int, rows: int = 15) -> list[dict]:
    return [batch(slice(at, min(at + size, rows))) for at in range(0, rows, size)]


def meanwhile(batches, after: int, act):
    """Batches, after some of which something else happens."""
    yield from batches[:after]
    act()
    yield from batches[after:]


def names(*ranges: range) -> list[str]:
    return [f"row {number}" for numbers in ranges for number in numbers]


@pytest.mark.parametrize("after", range(3))
@pytest.mark.parametrize("rows_per_unit", [6, 4, None])
@pytest.mark.parametrize("kind", ["safetensors", "npz"])
def test_a_run_that_one_of_another_batch_size_overtakes_ends_with_the_same_rows(tmp_path, after, rows_per_unit, kind):
    options = {"rows_per_unit": rows_per_unit, "format": kind}
    store = run(tmp_path / "out", meanwhile(cut(5), after, lambda: run(tmp_path / "out", **options)), **options)
    whole = run(tmp_path / "whole", [batch(slice(0, 15))])
    assert store.ids == whole.ids
    for key in whole.pairs:
        for row, other in zip(store[key], whole[key], strict=True):
            torch.testing.assert_close(row, other)
    assert store.verify() == []


def test_a_run_whose_model_computes_other_values_does_not_share_a_unit_unseen(tmp_path):
    model = small_model()
    model.h[0].register_forward_hook(lambda _, args, out: out * 1.01)
    found = "other values from another writer.*call again to go on|what the model computes"  # written, or read, first
    with pytest.raises((StoreError, OtherRunError), match=found):
        run(tmp_path, meanwhile(cut(5), 2, lambda: run(tmp_path)), model=model)


@pytest.mark.parametrize("after", [2, 3, 4])
def test_two_processes_that_add_the_same_rows_share_the_work(tmp_path, after):
    run(tmp_path, BATCHES[:2])
    store = run(tmp_path, meanwhile(BATCHES, after, lambda: run(tmp_path, append=True)), append=True)
    assert store.ids == names(range(15))


def test_two_processes_that_add_other_rows_add_all_of_them(tmp_path):
    run(tmp_path, BATCHES[:2])
    store = run(
        tmp_path, meanwhile(BATCHES, 3, lambda: run(tmp_path, [batch(slice(20, 40))], append=True)), append=True
    )
    assert store.ids == names(range(6), range(20, 40), range(6, 15))
    assert store.verify() == []


def test_a_process_that_adds_rows_in_other_units_than_another_is_told_to_go_on(tmp_path):
    run(tmp_path, BATCHES[:2])
    with pytest.raises(StoreError, match=r"must get a row from one process, got 'row \d+' from two. Call again"):
        run(tmp_path, meanwhile(cut(5), 2, lambda: run(tmp_path, BATCHES[:4], append=True)), append=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run(tmp_path, cut(5), append=True)
    assert open_store(tmp_path).ids == names(range(15))


def test_runs_of_different_batch_sizes_choose_units_of_one_size(tmp_path):
    tokens = torch.arange(1000).remainder(50)[:, None]

    def batches(size):
        return [
            {"input_ids": tokens[at : at + size], "id": list(range(1000))[at : at + size]}
            for at in range(0, 1000, size)
        ]

    options = {"keep": (), "reduce": "mean", "rows_per_unit": None}
    store = run(tmp_path, meanwhile(batches(70), 2, lambda: run(tmp_path, batches(48), **options)), **options)
    assert store.ids == list(range(1000))


def test_rows_are_not_added_to_a_store_that_lost_a_shard(tmp_path):
    run(tmp_path)
    (tmp_path / "shards/00000001.safetensors").unlink()
    with pytest.raises(StoreError, match="1 unit missing: '00000001'. Call extract without append"):
        run(tmp_path, [batch(slice(0, 20))], append=True)
    run(tmp_path)
    assert run(tmp_path, [batch(slice(0, 20))], append=True).ids == names(range(20))
