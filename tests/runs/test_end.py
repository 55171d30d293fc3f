"""Where a data set ends: said once, after the last shard, by the run that saw it."""

from __future__ import annotations

import json
import shutil

import pytest
from small_runs import BATCHES, FORMATS, batch, files, interrupted, run, shards, small_model

from activation_extractor import capture
from activation_extractor._format._end import End, read_end
from activation_extractor.errors import ArgumentError, OtherRunError, StoreError


@pytest.mark.parametrize("kind", FORMATS)
def test_a_run_says_where_its_data_ended_and_one_that_was_interrupted_does_not(tmp_path, kind):
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, interrupted(BATCHES, 5), format=kind)
    assert shards(tmp_path)
    assert read_end(tmp_path) is None
    run(tmp_path, format=kind)
    assert read_end(tmp_path) == End(3, 15)
    assert json.loads((tmp_path / "end.json").read_text())["rows"] == 15


def test_the_end_is_on_the_disk_after_the_last_shard(tmp_path, monkeypatch):
    from activation_extractor.runs import _stored_unit

    seen, write = [], _stored_unit.write_end
    monkeypatch.setattr(_stored_unit, "write_end", lambda *end: (seen.append(len(shards(tmp_path))), write(*end)))
    run(tmp_path, queue_bytes=10**9)
    assert seen == [3]


def test_a_run_that_cannot_write_its_last_shard_does_not_say_that_it_ended(tmp_path, monkeypatch):
    from activation_extractor.sinks import _store_writer

    write = _store_writer.write_shard

    def refuse(folder, codec, unit, *rest):
        if unit == "00000002":
            raise StoreError(folder, "have room", "none", "")
        return write(folder, codec, unit, *rest)

    monkeypatch.setattr(_store_writer, "write_shard", refuse)
    with pytest.raises(StoreError, match="have room"):
        run(tmp_path)
    assert read_end(tmp_path) is None


def test_a_store_of_an_earlier_version_that_is_run_again_gets_its_end(tmp_path):
    run(tmp_path)
    (tmp_path / "end.json").unlink()
    before = files(tmp_path)
    run(tmp_path)
    assert files(tmp_path).keys() - before.keys() == {"end.json"}


def test_rows_that_are_added_move_the_end(tmp_path):
    run(tmp_path, BATCHES[:3])
    run(tmp_path, BATCHES, append=True)
    assert read_end(tmp_path) == End(3, 15)
    assert {path.name for path in tmp_path.glob("end*")} == {"end.json", "end-3.json"}
    before = files(tmp_path)
    run(tmp_path, BATCHES, append=True)
    assert files(tmp_path) == before


def test_rows_without_ids_that_are_added_move_the_end(tmp_path):
    batches = [{name: value for name, value in one.items() if name != "id"} for one in BATCHES]
    run(tmp_path, batches[:3], ids=None)
    run(tmp_path, batches, ids=None, append=True)
    assert read_end(tmp_path) == End(3, 15)


def test_rows_that_are_left_out_do_not_count(tmp_path):
    def fail(module, args, kwargs):
        if (kwargs["input_ids"] == BATCHES[1]["input_ids"][1]).all(1).any():
            raise RuntimeError("that row")

    model = small_model()
    model.register_forward_pre_hook(fail, with_kwargs=True)
    left_out = []
    store = run(tmp_path, model=model, on_failure=lambda row_id, error: left_out.append(row_id))
    assert left_out == ["row 4"]
    assert read_end(tmp_path) == End(3, 14) == End(3, store.rows)


def test_data_that_ends_before_its_end_is_other_data(tmp_path):
    run(tmp_path)
    (tmp_path / "shards" / "00000002.safetensors").unlink()
    shutil.rmtree(tmp_path / "journal")
    with pytest.raises(OtherRunError, match="ends before the batches of unit '00000002'"):
        run(tmp_path, BATCHES[:4])
    assert len(run(tmp_path).shards) == 3


def test_a_damaged_end_is_an_error_before_anything_runs(tmp_path):
    run(tmp_path)
    (tmp_path / "end.json").write_text("{")
    for append in (False, True):
        with pytest.raises(StoreError, match="end.json' must be readable, got JSONDecodeError. Delete it"):
            run(tmp_path, append=append)


def test_a_with_block_does_not_say_where_data_end(tmp_path):
    model = small_model()
    with capture(model, "h.*", sink=tmp_path / "out"):
        model(batch(slice(0, 3))["input_ids"])
    assert read_end(tmp_path / "out") is None


def test_places_that_leave_out_a_whole_unit_are_an_error_rather_than_a_hole(tmp_path):
    batches = [{**batch(list(places)), "place": list(places)} for places in (range(6), range(12, 18))]
    with pytest.raises(ArgumentError, match="order must hold the places 6 to 11, since it holds later ones"):
        run(tmp_path, batches, order="place")
    assert read_end(tmp_path) is None
    between = {**batch(list(range(6, 12))), "place": list(range(6, 12))}
    assert len(run(tmp_path, [batches[0], between, batches[1]], order="place").shards) == 3
    with pytest.raises(OtherRunError, match="0 rows in place of 6"):
        run(tmp_path, batches, order="place")
