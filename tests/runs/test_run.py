"""Runs of `extract` that end midway and are gone on with: what is done stays, and nothing else is believed."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from small_runs import BATCHES, FORMATS, batch, counted, files, interrupted, run, shards, small_model

from activation_extractor import open_store
from activation_extractor.errors import StoreError


@pytest.mark.parametrize("after", range(6))
@pytest.mark.parametrize("kind", FORMATS)
def test_a_run_that_was_interrupted_ends_in_the_same_bytes_as_one_that_was_not(tmp_path, kind, after):
    run(tmp_path / "whole", format=kind)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "out", interrupted(BATCHES, after), format=kind)
    before = shards(tmp_path / "out") if after >= 2 else {}
    model, calls = counted(small_model())
    store = run(tmp_path / "out", model=model, format=kind)
    assert shards(tmp_path / "out") == shards(tmp_path / "whole")
    assert before.items() <= shards(tmp_path / "out").items()
    proof = after >= 2
    assert len(calls) == 5 - after // 2 * 2 + proof
    assert store.ids == [f"row {index}" for index in range(15)]
    assert store.verify() == []


@settings(deadline=None, max_examples=40)
@given(
    cuts=st.sets(st.integers(1, 11)),
    rows_per_unit=st.integers(1, 13) | st.none(),
    stops=st.lists(st.integers(0, 12), min_size=1, max_size=3),
    kind=st.sampled_from(FORMATS),
    ids=st.sampled_from(["id", None]),
)
def test_any_split_interrupted_anywhere_ends_in_the_same_bytes(cuts, rows_per_unit, stops, kind, ids):
    ends = [*sorted(cuts), 12]
    batches = [batch(slice(start, stop)) for start, stop in zip([0, *ends], ends, strict=False)]
    options = {"rows_per_unit": rows_per_unit, "format": kind, "ids": ids, "keep": ["label", *["id"] * (ids is None)]}
    if ids is None:
        batches = [{**one, "id": one["label"] + 7} for one in batches]
    with tempfile.TemporaryDirectory() as folder:
        whole, out = Path(folder, "whole"), Path(folder, "out")
        run(whole, batches, **options)
        for stop in stops:
            with pytest.raises(KeyboardInterrupt):
                run(out, interrupted(batches, stop), **options)
        run(out, batches, **options)
        assert shards(out) == shards(whole)
        assert (out / "manifest.json").read_bytes() == (whole / "manifest.json").read_bytes()


@pytest.mark.parametrize("ids", ["id", None, lambda one: one["label"]], ids=["key", "numbered", "callable"])
@pytest.mark.parametrize("kind", FORMATS)
def test_a_complete_store_runs_one_batch_again_and_stays_as_it_is(tmp_path, kind, ids):
    batches = BATCHES if ids == "id" else [{k: v for k, v in one.items() if k != "id"} for one in BATCHES]
    run(tmp_path, batches, ids=ids, format=kind)
    before = files(tmp_path)
    model, calls = counted(small_model().train())
    store = run(tmp_path, batches, model=model, ids=ids, format=kind)
    assert len(calls) == 1  # the proof
    assert model.training
    assert files(tmp_path) == before
    assert store.ids == ([f"row {row}" for row in range(15)] if ids == "id" else list(range(15)))


def test_a_store_that_is_gone_on_with_takes_over_its_size_of_units(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "out", interrupted(BATCHES, 4))
    run(tmp_path / "out")
    lengths = [len(load_file(path)["h.0:mean"]) for path in sorted(tmp_path.glob("out/shards/*"))]
    assert lengths == [6, 6, 3]


@pytest.mark.parametrize("unit", [0, 1, 2])
@pytest.mark.parametrize("kind", FORMATS)
def test_a_deleted_shard_is_made_anew_as_it_was(tmp_path, kind, unit):
    run(tmp_path, format=kind)
    before = shards(tmp_path)
    gone = tmp_path / "shards" / f"{unit:08d}.{kind}"
    shutil.rmtree(gone) if gone.is_dir() else gone.unlink()
    with pytest.raises(StoreError, match=rf"missing: '{gone.stem}'\. Run extract again with the same arguments, which"):
        open_store(tmp_path)
    model, calls = counted(small_model())
    run(tmp_path, model=model, format=kind)
    assert len(calls) == [2, 2, 1][unit] + 1  # the proof
    assert shards(tmp_path) == before
    assert open_store(tmp_path).verify() == []


def test_a_lost_journal_costs_nothing(tmp_path):
    run(tmp_path)
    shutil.rmtree(tmp_path / "journal")
    model, calls = counted(small_model())
    assert run(tmp_path, model=model).rows == 15
    assert len(calls) == 1  # the proof


class Sometimes(torch.nn.Module):
    """Its layer runs for rows that are not zero."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x) if x.any() else x


@pytest.mark.parametrize("idle", [0, 1, 2])
@pytest.mark.parametrize("rows", [0, 2])
def test_batches_that_give_no_rows_do_not_keep_a_run_from_going_on(tmp_path, idle, rows):
    batches = [torch.full((2, 4), float(number)) for number in range(1, 4)]
    batches.insert(idle, torch.zeros(rows, 4))
    options = {"layers": "layer", "reduce": "full", "ids": None, "keep": (), "missing": "skip", "rows_per_unit": 2}
    for _ in range(2):
        store = run(tmp_path, batches, model=Sometimes(), **options)
        assert store["layer"].torch()[:, 0].tolist() == [1, 1, 2, 2, 3, 3]
        assert store.ids == [0, 1, 2, 3, 4, 5]
