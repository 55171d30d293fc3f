"""Units one by one: in any order and process, retried and doubled, they make the store of one run."""

from __future__ import annotations

import dataclasses
import pickle
import random

import pytest
from divided_runs import ROWS, Layered, Numbered, Rows, batches_of, calls, run, scattered, shards
from torch.utils.data import DataLoader

from activation_extractor import open_store, plan_units, write_unit
from activation_extractor.errors import ArgumentError, ArgumentTypeError, OtherRunError, StoreError
from activation_extractor.sinks._store_writer import StoreWriter


def write(out, unit, batches=None, model=None, **options):
    options = {"ids": "id"} | options
    return write_unit(model or Layered(), batches or batches_of("loader"), "layer", out=out, unit=unit, **options)


@pytest.mark.parametrize("kind", ["loader", "numbered", "list", "order"])
@pytest.mark.parametrize("form", ["whole", "alone", "generator"])
@pytest.mark.parametrize("rows_per_unit", [8, 10])
def test_units_in_any_order_make_the_store_of_one_run(tmp_path, kind, form, rows_per_unit):
    options = {"ids": "id", **({"order": "place"} if kind == "order" else {})}
    run(tmp_path / "one", kind, rows_per_unit=rows_per_unit)
    units = plan_units(batches_of(kind), rows_per_unit=rows_per_unit, **options)
    random.Random(0).shuffle(units)
    for unit in pickle.loads(pickle.dumps(units)):
        batches = batches_of(kind)
        if form != "whole":
            listed = list(batches) if kind != "numbered" else [batches[number] for number in range(len(batches))]
            batches = [listed[number] for number in sorted(unit.batches)]
        receipt = write(tmp_path / "out", unit, iter(batches) if form == "generator" else batches, **options)
        assert receipt.is_new
        assert (receipt.unit, receipt.rows) == (unit.name, len(unit.rows))
        assert receipt.path.stat().st_size == receipt.nbytes
    assert shards(tmp_path / "out") == shards(tmp_path / "one")
    assert open_store(tmp_path / "out").is_complete
    assert open_store(tmp_path / "out").verify() == []
    assert plan_units(batches_of(kind), out=tmp_path / "out", **options) == []
    assert len(list((tmp_path / "out/journal").iterdir())) == 1


def test_a_task_that_runs_again_computes_nothing(tmp_path):
    unit = plan_units(batches_of("loader"), rows_per_unit=8, ids="id")[3]
    calls()
    first, again = write(tmp_path, unit), write(tmp_path, unit)
    assert (calls(), first.is_new, again) == (2, True, dataclasses.replace(first, is_new=False))


def test_a_unit_that_is_on_the_disk_at_once_is_new_too(tmp_path, monkeypatch):
    def commit(writer, *args):
        real(writer, *args)
        writer.finish()

    real = StoreWriter.commit
    monkeypatch.setattr(StoreWriter, "commit", commit)
    unit = plan_units(batches_of("loader"), rows_per_unit=8, ids="id")[3]
    assert write(tmp_path, unit).is_new


def test_a_task_that_runs_twice_at_once_does_no_harm(tmp_path):
    (unit, *_) = plan_units(batches_of("loader"), rows_per_unit=8, ids="id")
    data = batches_of("loader").dataset

    class Overtaken(Rows):
        def __getitem__(self, row):
            if row == 5:
                assert write(tmp_path, unit).is_new
            return super().__getitem__(row)

    receipt = write(tmp_path, unit, DataLoader(Overtaken(), batch_size=4))
    assert not receipt.is_new
    assert len(data) == ROWS


def test_a_task_loads_its_own_batches_alone(tmp_path):
    units = plan_units(Numbered(), rows_per_unit=8, ids="id")
    for unit in units[::7]:
        batches = Numbered()
        write(tmp_path, unit, batches)
        assert batches.loaded == list(unit.batches)


def test_what_is_missing_in_a_store_is_planned_alone_with_its_size_of_units(tmp_path):
    run(tmp_path)
    for number in (3, 19):
        (tmp_path / f"shards/{number:08d}.safetensors").unlink()
    before = shards(tmp_path)
    units = plan_units(batches_of("loader"), out=tmp_path, ids="id")
    assert [unit.number for unit in units] == [3, 19]
    for unit in units:
        write(tmp_path, unit)
    assert before.items() <= shards(tmp_path).items()
    assert open_store(tmp_path).rows == ROWS
    assert run(tmp_path).rows == ROWS


def test_a_store_whose_size_of_units_was_chosen_is_gone_on_with(tmp_path):
    run(tmp_path, rows_per_unit=None)
    before = shards(tmp_path)
    (tmp_path / "shards/00000000.safetensors").unlink()
    (unit,) = plan_units(batches_of("loader"), out=tmp_path, ids="id")
    write(tmp_path, unit)
    assert shards(tmp_path) == before


def test_the_end_is_said_by_the_last_unit_alone(tmp_path):
    units = plan_units(batches_of("loader"), rows_per_unit=40, ids="id")
    for number in (0, 3, 1):
        write(tmp_path, units[number])
        assert not (tmp_path / "end.json").exists()
    write(tmp_path, units[2])
    assert open_store(tmp_path).is_complete


def test_another_model_is_refused_by_a_store(tmp_path):
    units = plan_units(batches_of("loader"), rows_per_unit=8, ids="id")
    write(tmp_path, units[0])
    other = Layered()
    other.layer.weight.data += 1
    with pytest.raises(OtherRunError, match="weights"):
        write(tmp_path, units[1], model=other)


def test_other_values_of_a_doubled_task_are_refused(tmp_path):
    units = plan_units(batches_of("loader"), rows_per_unit=8, ids="id")

    class Overtaken(Rows):
        def __getitem__(self, row):
            if row == 5:
                write(tmp_path, units[0])
            return {**super().__getitem__(row), "input": super().__getitem__(row)["input"] * 2}

    with pytest.raises(StoreError, match="other values from another writer"):
        write(tmp_path, units[0], DataLoader(Overtaken(), batch_size=4))


@pytest.mark.parametrize(
    ("batches", "got"),
    [
        (lambda: batches_of("list")[4:5], "got '1 of them'"),
        (lambda: batches_of("list")[4:7], "got 'further ones'"),
        (lambda: batches_of("generator"), "got 'further ones'"),
        (lambda: iter([]), "got '0 of them'"),
    ],
)
def test_batches_that_are_not_those_of_the_unit_are_an_error(tmp_path, batches, got):
    unit = plan_units(batches_of("list"), rows_per_unit=8, ids="id")[2]
    with pytest.raises(ArgumentError, match=f"be the 2 of unit '00000002', or all 40 by number, {got}"):
        write(tmp_path, unit, batches())
    assert shards(tmp_path) == {}


def test_a_batch_of_other_rows_than_was_planned_is_an_error(tmp_path):
    unit = plan_units(batches_of("list"), rows_per_unit=8, ids="id")[2]
    batches = [{name: value[:3] for name, value in one.items()} for one in batches_of("list")[4:6]]
    with pytest.raises(ArgumentError, match="batch 4 must hold 4 rows"):
        write(tmp_path, unit, batches)


def test_what_has_no_meaning_for_a_unit_is_refused(tmp_path):
    unit = plan_units(batches_of("list"), rows_per_unit=8, ids="id")[0]
    for name, value in (("append", True), ("share", (0, 2)), ("rows_per_unit", 8), ("group", "g"), ("resume", False)):
        with pytest.raises(ArgumentError, match=f"{name} must be left out: the plan says"):
            write(tmp_path, unit, **{name: value})
    with pytest.raises(ArgumentTypeError, match="unit must be one that plan_units returned, got 3"):
        write(tmp_path, 3)
    with pytest.raises(ArgumentError, match="missing must be 'error' where rows have no ids"):
        write(tmp_path, unit, missing="skip", ids=None)


def test_what_cannot_be_planned_is_refused(tmp_path):
    with pytest.raises(ArgumentError, match="rows_per_unit must be given where there is no store"):
        plan_units(batches_of("list"))
    with pytest.raises(ArgumentError, match="batches must be such as can be asked for by their numbers"):
        plan_units(batches_of("generator"), rows_per_unit=8)
    with pytest.raises(ArgumentError, match="batches must be such as can be asked for by their numbers"):
        plan_units(Numbered(), rows_per_unit=8, order="place")
    run(tmp_path)
    with pytest.raises(ArgumentError, match="out must hold a store with 16 in a unit"):
        plan_units(batches_of("list"), rows_per_unit=16, out=tmp_path)
    assert len(plan_units(DataLoader(Rows(), batch_sampler=scattered()), rows_per_unit=16, order="place")) == 10
