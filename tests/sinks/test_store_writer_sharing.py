"""Writers that meet in one folder, and the folders that a new store may have."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from stores import mean_step, shards
from unit_by_unit import UnitByUnit

from activation_extractor import open_store
from activation_extractor._format._codecs import NPZ, SAFETENSORS
from activation_extractor._format._journal import Journal
from activation_extractor._format._manifest import Manifest, make_manifest, write_manifest
from activation_extractor._format._shards import unit_name
from activation_extractor.errors import OtherRunError, StoreError
from activation_extractor.sinks import Step
from activation_extractor.sinks._resume import check_free, check_same

NAMES = ["20260101T000000000000-00000000", "20260101T000000000001-0000abcd"]
RUN = {"fingerprint": {"model": "Tiny"}, "batches_per_unit": None, "model": "Tiny"}


def writer(folder: Path, number: int = 0, codec=SAFETENSORS, *, shares_store: bool = True, run=RUN) -> UnitByUnit:
    made = UnitByUnit(folder, codec, queue_bytes=1 << 20, shares_store=shares_store)
    made.journal = Journal(made.folder, NAMES[number])
    made.begin(run["fingerprint"])
    return made


def write(made: UnitByUnit, unit: str, *steps: Step) -> None:
    for one in steps:
        made.add(one)
    made.commit(unit)
    made.finish()


def two_columns(ids: list[int]) -> Step:
    columns = {("h.0", "mean"): torch.zeros(len(ids), 3), ("h.1", "mean"): torch.ones(len(ids), 3)}
    return Step(0, len(ids), columns, ids, {})


def journal(folder: Path, number: int) -> list[dict]:
    return [json.loads(line) for line in (folder / "journal" / f"{NAMES[number]}.jsonl").read_text().splitlines()]


def manifest(codec=SAFETENSORS, **run) -> Manifest:
    return make_manifest(codec, {**RUN, **run}, [], [], None)


def test_writers_of_the_same_run_share_a_store(tmp_path):
    one, other = writer(tmp_path), writer(tmp_path, 1)
    one.add(mean_step(1, [1], 1.0))
    other.add(mean_step(1, [2], 2.0))  # both have begun before either has written
    write(other, unit_name(0, NAMES[1]))
    before = (tmp_path / "manifest.json").read_bytes()
    write(one, unit_name(0, NAMES[0]))
    write(one, unit_name(1, NAMES[0]), mean_step(1, [3], 3.0))
    assert (tmp_path / "manifest.json").read_bytes() == before
    assert [load_file(path)["h.0:mean"][0, 0].item() for path in shards(tmp_path)] == [1, 3, 2]
    assert [len(journal(tmp_path, number)) for number in range(2)] == [2, 1]


OTHERS = {
    "dtype": Step(0, 1, {("h.0", "mean"): torch.zeros(1, 3, dtype=torch.float64)}, [2], {}),
    "shape": Step(0, 1, {("h.0", "mean"): torch.zeros(1, 4)}, [2], {}),
    "ids": mean_step(1, ["2"]),
    "no_ids": mean_step(1),
}


@pytest.mark.parametrize("other", OTHERS.values(), ids=OTHERS)
def test_a_unit_that_does_not_fit_the_layout_of_a_shared_store_is_an_error(tmp_path, other):
    made = writer(tmp_path, 1)
    made.add(other)
    write(writer(tmp_path), unit_name(0, NAMES[0]), mean_step(1, [1]))
    with pytest.raises(StoreError, match="must .* got .* after |must be given for every step or for none"):
        write(made, unit_name(0, NAMES[1]))
    assert len(shards(tmp_path)) == 1


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_writers_whose_columns_differ_lose_none_of_them(tmp_path, order):
    made = [writer(tmp_path), writer(tmp_path, 1)]
    steps = [mean_step(1, [1]), two_columns([2])]
    for number in order:
        made[number].add(steps[number])
    for number in order:
        write(made[number], unit_name(0, NAMES[number]))
    assert journal(tmp_path, order[1])[0]["counts"] == dict.fromkeys(["h.0:mean", "h.1:mean"][: 1 + order[1]], 1)
    store = open_store(tmp_path)
    assert {layer: store[layer].shape for layer in store} == {"h.0": (2, 3), "h.1": (1, 3)}


@pytest.mark.parametrize("run", [RUN, {**RUN, "fingerprint": {"model": "Other"}}])
def test_a_writer_alone_does_not_write_into_the_store_of_another(tmp_path, run):
    made = writer(tmp_path, 1, shares_store=False, run=run)
    made.add(mean_step(1, [2]))
    write(writer(tmp_path), unit_name(0, NAMES[0]), mean_step(1, [1]))
    text = "must be this writer's own store, got one that another writer began. Use a new folder, or append=True."
    with pytest.raises(StoreError, match=text):
        write(made, unit_name(0, NAMES[1]))
    assert [path.stem for path in shards(tmp_path)] == [unit_name(0, NAMES[0])]
    assert not (tmp_path / "journal" / f"{NAMES[1]}.jsonl").exists()


@pytest.mark.parametrize(
    ("codec", "run", "text"),
    [
        (SAFETENSORS, {**RUN, "fingerprint": {"model": "Big"}}, r"differs in model \('Big' in place of 'Tiny'\)\. Use"),
        (NPZ, RUN, "must be a store of npz shards, got one of safetensors. Use the sink or format= that it was begun"),
    ],
)
def test_a_writer_of_another_run_does_not_share_the_store(tmp_path, codec, run, text):
    made = writer(tmp_path, 1, codec, run=run)
    made.add(mean_step(1, [2]))
    write(writer(tmp_path), unit_name(0, NAMES[0]), mean_step(1, [1]))
    with pytest.raises(StoreError, match=text):
        write(made, unit_name(0, NAMES[1]))
    assert len(os.listdir(tmp_path / "shards")) == 1


def test_a_unit_that_another_writer_has_written_alike_stays(tmp_path):
    for number in range(2):
        write(writer(tmp_path, number), unit_name(0), mean_step(1, [1], 1.0))
    assert len(shards(tmp_path)) == len(journal(tmp_path, 0)) == 1
    assert not (tmp_path / "journal" / f"{NAMES[1]}.jsonl").exists()


def test_a_unit_that_another_writer_has_written_otherwise_is_an_error_and_stays(tmp_path):
    write(writer(tmp_path), unit_name(0), mean_step(1, [1], 1.0))
    before = shards(tmp_path)[0].read_bytes()
    with pytest.raises(StoreError, match="must hold what this run computed, got other values from another writer"):
        write(writer(tmp_path, 1), unit_name(0), mean_step(1, [1], 2.0))
    assert shards(tmp_path)[0].read_bytes() == before
    assert len(os.listdir(tmp_path / "shards")) == 1


def test_a_writer_goes_on_in_the_layout_of_the_store(tmp_path):
    write(writer(tmp_path), unit_name(0, NAMES[0]), mean_step(1, [1]))
    before = (tmp_path / "manifest.json").read_bytes()
    made = writer(tmp_path, 1, shares_store=False)
    made.resume()
    with pytest.raises(StoreError, match=r"must keep one dtype and row shape in a store, got float64 \(2,\) after"):
        made.add(Step(0, 1, {("h.0", "mean"): torch.zeros(1, 2, dtype=torch.float64)}, [2], {}))
    with pytest.raises(StoreError, match="got str after int"):
        made.add(mean_step(1, ["2"]))
    write(made, unit_name(0, NAMES[1]), two_columns([2]))
    assert (tmp_path / "manifest.json").read_bytes() == before
    assert len(shards(tmp_path)) == 2
    assert journal(tmp_path, 1)[0]["counts"] == {"h.0:mean": 1, "h.1:mean": 1}


def test_the_manifest_of_the_same_run_is_returned(tmp_path):
    there = manifest(model="first")
    write_manifest(tmp_path, there)
    assert check_same(tmp_path, manifest(model="second")) == there


@pytest.mark.parametrize(
    ("run", "differences"),
    [
        ({"fingerprint": {"model": "Big"}}, ["model ('Big' in place of 'Tiny')"]),
        ({"fingerprint": {}}, ["model (none in place of 'Tiny')"]),
        ({"fingerprint": {"model": "Tiny", "mask": "m"}}, ["mask ('m' in place of none)"]),
        ({"batches_per_unit": 3}, ["unit size (3 in place of none)"]),
    ],
)
def test_another_run_is_an_error_that_says_what_differs(tmp_path, run, differences):
    write_manifest(tmp_path, manifest())
    with pytest.raises(OtherRunError, match="holds another run: it differs in ") as caught:
        check_same(tmp_path, manifest(**run))
    assert list(caught.value.differences) == differences
    assert caught.value.path == tmp_path


@pytest.mark.parametrize("name", ["missing", "missing/deeper", "empty"])
def test_a_missing_or_empty_folder_is_free_and_is_not_touched(tmp_path, name):
    (tmp_path / "empty").mkdir()
    check_free(tmp_path / name)
    assert os.listdir(tmp_path) == ["empty"]


def test_what_a_run_leaves_that_ended_before_its_first_unit_is_free(tmp_path):
    for name in ("shards", "journal"):
        (tmp_path / name).mkdir()
    (tmp_path / "shards" / f".{'0' * 32}.tmp").touch()
    check_free(tmp_path)


@pytest.mark.parametrize("name", [".hidden", "thesis.tex", "shards/00000000.safetensors", "journal/w.jsonl", "logs/a"])
def test_a_folder_that_holds_something_is_refused_untouched(tmp_path, name):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("mine")
    text = "must be a new or empty folder, got one that holds something. Choose another folder."
    with pytest.raises(StoreError, match=text) as caught:
        check_free(tmp_path)
    assert caught.value.path == tmp_path
    assert [path.read_text() for path in tmp_path.rglob("*") if path.is_file()] == ["mine"]


@pytest.mark.parametrize("name", ["shards", "journal"])
def test_a_link_in_a_folder_is_something_that_it_holds(tmp_path, name):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(StoreError, match="got one that holds something"):
        check_free(tmp_path / "out")
    (tmp_path / "out" / name).unlink()
    (tmp_path / "out" / name).touch()
    with pytest.raises(StoreError, match="got one that holds something"):
        check_free(tmp_path / "out")


def test_a_store_is_refused_with_advice(tmp_path):
    write_manifest(tmp_path, manifest())
    text = r"got one that holds a store. Choose another folder, or add to it with a sink such as SafetensorsSink\("
    with pytest.raises(StoreError, match=text):
        check_free(tmp_path)


def test_a_file_in_the_way_is_refused(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(StoreError, match="must be a folder, got Not a directory. Choose another folder."):
        check_free(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"
