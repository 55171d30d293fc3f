"""Stores that know whether they are whole: a hole is an error, and what is left can be read with its true numbers."""

from __future__ import annotations

import json
import pickle
import re
import shutil
from pathlib import Path

import pytest
import torch
from small_runs import BATCHES, FORMATS, batch, interrupted, run, small_model

from activation_extractor import NpySink, NpzSink, SafetensorsSink, capture, extract, open_store
from activation_extractor.errors import ArgumentTypeError, StoreError
from activation_extractor.store import verify_store

NUMBERED = [{name: value for name, value in one.items() if name != "id"} for one in BATCHES]


def lose(folder: Path, *units: int, journal: bool = True) -> None:
    """Delete shards, and the journal that would tell of them."""
    for unit in units:
        (path,) = folder.glob(f"shards/*{unit:08d}.*")
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    if journal:
        shutil.rmtree(folder / "journal")


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("journal", [True, False], ids=["no journal", "journal"])
@pytest.mark.parametrize("gone", [(0,), (1,), (2,), (0, 1), (1, 2)], ids=str)
def test_a_unit_that_is_missing_is_an_error_that_names_it_and_partial_reads_the_rest(tmp_path, kind, journal, gone):
    whole = run(tmp_path, format=kind)
    assert whole.is_complete
    assert whole.missing_units == []
    assert whole.row_numbers.tolist() == [*range(15)]
    values = whole["h.0", "mean"].torch()
    lose(tmp_path, *gone, journal=journal)
    names = [f"{unit:08d}" for unit in gone]
    listed = re.escape(f"{len(gone)} of 3 missing: {', '.join(map(repr, names))}. Run extract again with the same")
    with pytest.raises(StoreError, match=listed + r".*open_store\(path, partial=True\)"):
        open_store(tmp_path)
    left = open_store(tmp_path, partial=True)
    assert (left.is_complete, left.missing_units) == (False, names)
    kept = [row for row in range(15) if row // 6 not in gone]
    assert left.row_numbers.tolist() == kept
    assert left.ids == [f"row {row}" for row in kept]
    assert torch.equal(left["h.0", "mean"].torch(), values[kept])
    assert [(damage.path.stem, damage.kind) for damage in left.verify()] == [(name, "missing") for name in names]
    assert run(tmp_path, format=kind).is_complete
    assert open_store(tmp_path).verify() == []


def test_a_run_that_was_interrupted_opens_without_being_complete(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, interrupted(BATCHES, 4))
    store = open_store(tmp_path)
    assert (store.rows, store.is_complete, store.missing_units, store.verify()) == (12, False, [], [])
    assert run(tmp_path).is_complete


def test_the_last_units_of_a_store_that_was_complete_are_missed(tmp_path):
    run(tmp_path)
    lose(tmp_path, 1, 2)
    with pytest.raises(StoreError, match="2 of 3 missing: '00000001', '00000002'"):
        open_store(tmp_path)
    lose(tmp_path, 0, journal=False)
    left = open_store(tmp_path, partial=True)
    assert (left.rows, left.ids, left.row_numbers.tolist(), len(left.missing_units)) == (0, [], [], 3)
    (tmp_path / "end.json").unlink()  # nobody knows more than that nothing is there
    assert open_store(tmp_path).rows == 0


def test_rows_without_ids_keep_their_numbers(tmp_path):
    run(tmp_path, NUMBERED, ids=None)
    lose(tmp_path, 1)
    left = open_store(tmp_path, partial=True)
    numbers = [*range(6), *range(12, 15)]
    assert left.ids == list(left.iter_ids()) == left.row_numbers.tolist() == numbers
    assert [left.row_of(number) for number in numbers] == [*range(9)]
    assert left.keep["label"][:].tolist() == numbers


def test_a_partial_store_stays_one_in_another_process(tmp_path):
    run(tmp_path)
    lose(tmp_path, 1)
    left = pickle.loads(pickle.dumps(open_store(tmp_path, partial=True)))
    assert left.missing_units == ["00000001"]
    assert left.rows == 9
    with pytest.raises(ArgumentTypeError, match="partial must be True or False, got 1"):
        open_store(tmp_path, partial=1)


def failing(module, args, kwargs):
    if (kwargs["input_ids"][:, None] == batch([1, 7, 8])["input_ids"]).all(2).any():
        raise RuntimeError("that row")


@pytest.mark.parametrize("gone", [(), (0,), (1,)], ids=str)
@pytest.mark.parametrize("ids", ["id", None])
def test_rows_that_were_left_out_leave_their_numbers_free(tmp_path, gone, ids):
    model = small_model()
    model.register_forward_pre_hook(failing, with_kwargs=True)
    batches = BATCHES if ids else NUMBERED
    assert run(tmp_path, batches, model=model, ids=ids, on_failure=lambda *_: None).is_complete
    if gone:
        lose(tmp_path, *gone)
    store = open_store(tmp_path, partial=True)
    numbers = [row for row in range(15) if row not in (1, 7, 8) and row // 6 not in gone]
    assert store.row_numbers.tolist() == numbers == store.keep["label"][:].tolist()
    if gone:
        assert store.ids == ([f"row {number}" for number in numbers] if ids else numbers)


def test_rows_behind_a_missing_unit_behind_which_rows_were_added_cannot_be_numbered(tmp_path):
    run(tmp_path, BATCHES[:3])
    assert run(tmp_path, [batch(slice(0, 24))], append=True).is_complete
    assert open_store(tmp_path).row_numbers.tolist() == [*range(24)]
    lose(tmp_path, 0, journal=False)
    assert open_store(tmp_path, partial=True).row_numbers.tolist() == [*range(6, 24)]
    lose(tmp_path, 1)
    left = open_store(tmp_path, partial=True)
    with pytest.raises(StoreError, match="rows behind it to be numbered, got '00000001' missing, behind which rows we"):
        _ = left.row_numbers
    assert left.ids == [f"row {row}" for row in range(9, 24)]


def test_rows_are_not_added_to_a_store_with_a_hole(tmp_path):
    run(tmp_path)
    lose(tmp_path, 1)
    text = "all units up to its last before rows are added, got 1 unit missing: '00000001'. Call extract without append"
    with pytest.raises(StoreError, match=text):
        run(tmp_path, [batch(slice(0, 24))], append=True)
    run(tmp_path)
    assert run(tmp_path, [batch(slice(0, 24))], append=True).is_complete


def test_units_of_batches_cannot_be_numbered_behind_a_hole(tmp_path):
    rows = [{"input": torch.randn(2, 3, 4), "other": torch.randn(3, 2)} for _ in range(4)]

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(4, 2)

        def forward(self, input, other):  # noqa: A002
            return self.layer(input)

    store = extract(Model(), rows, "layer", out=tmp_path / "out", reduce="mean", rows_per_unit=2, progress=False)
    assert store.is_complete
    assert store.manifest["batches_per_unit"]
    assert store.row_numbers.tolist() == [*range(store.rows)]
    lose(tmp_path / "out", len(store.shards) - 1)
    left = open_store(tmp_path / "out", partial=True)
    assert left.row_numbers.tolist() == [*range(left.rows)]
    lose(tmp_path / "out", 0, journal=False)
    with pytest.raises(StoreError, match="rows behind it to be numbered, got '00000000' missing, whose number of rows"):
        _ = open_store(tmp_path / "out", partial=True).row_numbers


@pytest.mark.parametrize("make_sink", [SafetensorsSink, NpySink, NpzSink])
def test_a_hole_among_the_units_of_a_with_block_is_an_error(tmp_path, make_sink):
    model, out = small_model(), tmp_path / "out"
    for _ in range(2):
        with capture(model, "h.0", reduce="mean", sink=make_sink(out, rows_per_unit=2, append=True)):
            for start in range(0, 6, 2):
                model(batch(slice(start, start + 2))["input_ids"])
    store = open_store(out)
    assert (store.rows, store.is_complete, store.missing_units) == (12, False, [])
    assert store.row_numbers.tolist() == [*range(12)]
    first = store.shards[1].path
    shutil.rmtree(first) if first.is_dir() else first.unlink()
    shutil.rmtree(out / "journal")
    with pytest.raises(StoreError, match=f"1 of 6 missing: '{first.stem}'. Restore it from a copy, or read"):
        open_store(out)
    assert open_store(out, partial=True)["h.0"].shape == (10, 8)
    last = store.shards[-1].path  # of a writer that may have been killed before it
    shutil.rmtree(last) if last.is_dir() else last.unlink()
    assert len(open_store(out, partial=True).missing_units) == 1


def test_a_damaged_end_is_an_error_and_verify_reports_it(tmp_path):
    store = run(tmp_path)
    (tmp_path / "end.json").write_text("{}")
    for partial in (False, True):
        with pytest.raises(StoreError, match="end.json' must say where a data set ends, got something else. Delete it"):
            open_store(tmp_path, partial=partial)
    (damage,) = store.verify()
    assert (damage.path, damage.kind) == (tmp_path / "end.json", "unreadable")
    (tmp_path / "end.json").unlink()  # as the text advises
    assert not open_store(tmp_path).is_complete
    assert run(tmp_path).is_complete


def test_an_end_that_counts_other_rows_than_the_shards_is_reported(tmp_path):
    store = run(tmp_path)
    path = tmp_path / "end.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "rows": 16}))
    (damage,) = store.verify()
    assert (damage.path, damage.kind) == (path, "altered")
    assert damage.detail == "it says 16 rows where the shards have 15"


def test_a_store_that_is_growing_is_not_complete_before_its_new_end(tmp_path):
    run(tmp_path, BATCHES[:3])
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, interrupted([batch(slice(0, 9)), *BATCHES[3:], batch(slice(15, 40))], 3), append=True)
    store = open_store(tmp_path)
    assert store.rows == 15
    assert not store.is_complete
    assert store.verify() == []
    assert run(tmp_path, append=True).is_complete


def test_a_shard_that_appears_while_the_folder_is_listed_is_no_hole(tmp_path, monkeypatch):
    from activation_extractor.store import _listing

    run(tmp_path)
    real, calls = _listing.list_units, []

    def listed(folder, codec):
        calls.append(1)
        units = real(folder, codec)
        return [units[0], units[2]] if len(calls) == 1 else units

    monkeypatch.setattr(_listing, "list_units", listed)
    assert open_store(tmp_path).is_complete


def test_a_shard_with_a_number_far_behind_the_others_is_an_error_rather_than_a_full_memory(tmp_path):
    run(tmp_path)
    (tmp_path / "shards" / "99999999.safetensors").write_bytes(b"")
    assert [damage.kind for damage in verify_store(tmp_path)] == ["truncated"]
    (journal,) = (tmp_path / "journal").iterdir()
    line = journal.read_text().splitlines()[-1]
    journal.write_text(journal.read_text() + line.replace("00000002", "99999999") + "\n")
    for partial in (False, True):
        with pytest.raises(StoreError, match="99,999,996 of 100,000,000 missing: '00000003', '00000004', '00000005' a"):
            open_store(tmp_path, partial=partial)
