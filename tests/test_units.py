"""Units: steps gathered into one shard, read back with safetensors itself."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from activation_extractor._steps import Ragged, Step
from activation_extractor._units import Unit, check_free, make_folder
from activation_extractor.errors import StoreError


def step(values, ids=None, keep=None, index=0) -> Step:
    value = next(iter(values.values()))
    rows = len(value.lengths) if isinstance(value, Ragged) else len(value)
    return Step(index, rows, values, ids, keep or {})


def dense(rows: int, start: int = 0) -> dict:
    return {("h.0", "mean"): torch.arange(start, start + rows * 2, dtype=torch.float32).reshape(rows, 2)}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make_folder(tmp_path / "store")
    return tmp_path / "store"


def shard(folder: Path, number: int = 0) -> Path:
    return folder / "shards" / f"{number:08d}.safetensors"


def test_steps_of_a_unit_become_one_shard(folder):
    unit = Unit(0)
    assert unit.add(step(dense(2), ["a", "b"], {"label": torch.tensor([1, 0])})) == 2 * 2 * 4 + 2 * 8
    unit.add(step(dense(1, 4), ["ç"], {"label": torch.tensor([5])}))
    assert unit.rows == 3
    unit.commit(folder, {})
    entries = load_file(shard(folder))
    assert entries["h.0:mean"].tolist() == [[0, 1], [2, 3], [4, 5]]
    assert entries["#keep:label"].tolist() == [1, 0, 5]
    assert bytes(entries["#ids"].tolist()).decode() == "abç"
    assert entries["#ids#offsets"].tolist() == [0, 1, 2, 4]
    assert len(entries) == 4
    with safe_open(shard(folder), framework="pt") as file:
        assert file.metadata() == {"unit": "00000000", "rows": "3"}


def test_integer_ids_are_an_integer_tensor_and_no_ids_are_no_entry(folder):
    unit = Unit(0)
    unit.add(step(dense(2), [7, -3]))
    unit.commit(folder, {})
    entries = load_file(shard(folder))
    assert entries["#ids"].tolist() == [7, -3]
    assert "#ids#offsets" not in entries
    unit = Unit(1)
    unit.add(step(dense(2)))
    unit.commit(folder, {})
    assert list(load_file(shard(folder, 1))) == ["h.0:mean"]


def test_an_empty_text_is_an_id(folder):
    unit = Unit(0)
    unit.add(step(dense(1), [""]))
    unit.commit(folder, {})
    entries = load_file(shard(folder))
    assert entries["#ids"].tolist() == []
    assert entries["#ids#offsets"].tolist() == [0, 0]


def test_ragged_rows_lie_one_behind_the_other_with_their_offsets(folder):
    unit = Unit(0)
    for lengths in ([2, 0], [3]):
        values = torch.full((sum(lengths), 4), float(len(lengths)))
        unit.add(step({("h.0", "full"): Ragged(values, torch.tensor(lengths))}))
    unit.commit(folder, {})
    entries = load_file(shard(folder))
    assert entries["h.0:full"].shape == (5, 4)
    assert entries["h.0:full#offsets"].tolist() == [0, 2, 2, 5]


def test_a_column_short_of_rows_carries_their_numbers(folder):
    unit = Unit(0)
    unit.add(step({**dense(2), ("h.1", "mean"): torch.zeros(2, 3)}))
    unit.add(step(dense(2, 4)))
    unit.add(step({**dense(1, 8), ("h.1", "mean"): torch.ones(1, 3)}))
    unit.commit(folder, {})
    entries = load_file(shard(folder))
    assert entries["h.1:mean"].shape == (3, 3)
    assert entries["h.1:mean#rows"].tolist() == [0, 1, 4]
    assert "h.0:mean#rows" not in entries


def test_the_manifest_says_what_the_columns_are(folder):
    unit = Unit(0)
    values = {("h:0", "full"): Ragged(torch.zeros(3, 4, dtype=torch.bfloat16), torch.tensor([3]))}
    unit.add(step({**values, ("é", "mean"): torch.zeros(1, 2, 3)}))
    unit.commit(folder, {"model": "Tiny"})
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    assert manifest["model"] == "Tiny"
    assert manifest["version"] == 1
    assert manifest["columns"] == [
        {"layer": "h:0", "reducer": "full", "dtype": "bfloat16", "row_shape": [4], "ragged": True},
        {"layer": "é", "reducer": "mean", "dtype": "float32", "row_shape": [2, 3], "ragged": False},
    ]


def test_the_manifest_never_changes(folder):
    unit = Unit(0)
    unit.add(step(dense(1)))
    unit.commit(folder, {"run": 1})
    before = (folder / "manifest.json").read_bytes()
    unit = unit.next()
    unit.add(step(dense(1)))
    unit.commit(folder, {"run": 2})
    assert (folder / "manifest.json").read_bytes() == before


@pytest.mark.parametrize(
    ("value", "got"),
    [
        (torch.zeros(1, 3), r"torch.float32 \(3,\) after torch.float32 \(2,\)"),
        (torch.zeros(1, 2, dtype=torch.float64), r"torch.float64 \(2,\) after torch.float32 \(2,\)"),
    ],
)
@pytest.mark.parametrize("new_unit", [True, False])
def test_a_column_that_changes_is_an_error_also_in_a_later_unit(value, got, new_unit):
    unit = Unit(0)
    unit.add(step(dense(1)))
    if new_unit:
        unit = unit.next()
    with pytest.raises(StoreError, match=f"'h.0:mean' must keep one dtype and row shape in a store, got {got}. Reduce"):
        unit.add(step({("h.0", "mean"): value}))


def test_a_step_that_is_refused_leaves_the_unit_as_it_was(folder):
    unit = Unit(0)
    two = {("a", "mean"): torch.zeros(2, 3), ("b", "mean"): torch.zeros(2, 3)}
    unit.add(step(two))
    with pytest.raises(StoreError):
        unit.add(step({**two, ("b", "mean"): torch.zeros(2, 4)}))
    unit.commit(folder, {})
    assert load_file(shard(folder))["a:mean"].shape == (2, 3)


@pytest.mark.parametrize("ids", [(["a"], None), (None, ["a"])])
def test_ids_for_some_steps_only_are_an_error(ids):
    unit = Unit(0)
    unit.add(step(dense(1), ids[0]))
    with pytest.raises(StoreError, match=r"'ids' must be given for every step or for none, got some. Give each step"):
        unit.add(step(dense(1), ids[1]))


def test_ids_for_some_units_only_are_an_error():
    unit = Unit(0)
    unit.add(step(dense(1), ["a"]))
    with pytest.raises(StoreError):
        unit.next().add(step(dense(1)))


@pytest.mark.parametrize("ids", [(["a"], [1]), ([1], ["a"])])
def test_ids_that_change_their_type_between_steps_are_an_error(ids):
    unit = Unit(0)
    unit.add(step(dense(1), ids[0]))
    with pytest.raises(StoreError):
        unit.add(step(dense(1), ids[1]))


def test_a_dropped_unit_leaves_its_number_to_the_next(folder):
    unit = Unit(0)
    unit.add(step(dense(1)))
    unit = unit.next(is_same=True)
    assert unit.rows == 0
    unit.add(step(dense(1, 8)))
    unit.commit(folder, {})
    assert [path.name for path in (folder / "shards").iterdir()] == ["00000000.safetensors"]
    assert load_file(shard(folder))["h.0:mean"].tolist() == [[8, 9]]


def test_a_shard_that_is_there_is_never_overwritten(folder):
    shard(folder).write_bytes(b"another writer's")
    unit = Unit(0)
    unit.add(step(dense(1)))
    with pytest.raises(StoreError, match=r"00000000.safetensors' must not exist yet, got a file that another writer"):
        unit.commit(folder, {})
    assert shard(folder).read_bytes() == b"another writer's"
    assert len(list((folder / "shards").iterdir())) == 1


def test_a_folder_that_is_gone_is_an_error(tmp_path):
    unit = Unit(0)
    unit.add(step(dense(1)))
    with pytest.raises(StoreError, match="must be writable, got No such file or directory"):
        unit.commit(tmp_path / "gone", {})


@pytest.mark.parametrize("name", ["missing", "missing/deeper", "empty"])
def test_a_missing_or_empty_folder_is_free_and_is_made(tmp_path, name):
    (tmp_path / "empty").mkdir()
    check_free(tmp_path / name)
    assert (tmp_path / name).exists() == (name == "empty")
    make_folder(tmp_path / name)
    assert (tmp_path / name / "shards").is_dir()


@pytest.mark.parametrize("check", [check_free, make_folder])
def test_a_folder_that_holds_something_is_refused_untouched(tmp_path, check):
    (tmp_path / ".hidden").write_text("mine")
    with pytest.raises(StoreError, match="must be a new or empty folder, got one that holds something. Choose another"):
        check(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [".hidden"]


def test_a_file_in_the_way_is_an_error(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(StoreError, match="file' must be a folder, got Not a directory"):
        check_free(tmp_path / "file")
    with pytest.raises(StoreError, match="must be a folder that can be written to, got Not a directory"):
        make_folder(tmp_path / "file" / "store")
    assert (tmp_path / "file").read_text() == "mine"
