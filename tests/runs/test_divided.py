"""Runs that several ranks share: each computes its part, what a dead one leaves is computed by the others."""

from __future__ import annotations

import os
import random
import re
import subprocess
import sys
import time
import warnings

import divided_runs
import pytest
import torch
from divided_runs import ROWS, VALUES, Layered, Numbered, batches_of, calls, context, run, shards, start  # noqa: F401
from torch.utils.data import DataLoader
from torch.utils.data.distributed import DistributedSampler

from activation_extractor import open_store
from activation_extractor.errors import ArgumentError, OtherRunError

pytestmark = pytest.mark.filterwarnings("ignore:Each of the . ranks goes through all batches")
KINDS = ["loader", "workers", "order", "numbered", "list", "generator"]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The shards of runs of one process, by kind."""
    found = {}
    for kind in KINDS:
        out = tmp_path_factory.mktemp(kind)
        run(out, kind)
        found[kind] = shards(out)
    return found


@pytest.mark.parametrize(("world", "kind"), [*((4, kind) for kind in KINDS if kind != "workers"), (2, "workers")])
def test_ranks_share_the_forwards_and_end_in_the_bytes_of_one_process(tmp_path, start, undisturbed, kind, world):  # noqa: F811
    results = [rank.result() for rank in start(world, tmp_path, kind, seconds=0.005)]
    rows = ROWS if kind in ("loader", "workers", "order") else ROWS - 2
    assert [rows for _, rows in results] == [rows] * world
    assert shards(tmp_path) == undisturbed[kind]
    assert open_store(tmp_path).verify() == []
    assert sum(count for count, _ in results) <= 40 * 1.05 + world + 2 * 2  # two units more, where the machine stalls
    if kind != "order":
        assert min(count for count, _ in results) >= 4


def test_ranks_of_torchrun_share_the_forwards(tmp_path):
    script = "import sys; from pathlib import Path; from divided_runs import *; PAUSE[0] = 0.005;"
    script += "store = run(Path(sys.argv[1])); print(f'<{calls()} of {store.rows}>')"
    (tmp_path / "script.py").write_text(script)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", str(tmp_path / "script.py")]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, str(tmp_path / "out")], env=env, capture_output=True, text=True, timeout=100)
    told = re.findall("<([0-9]+) of ([0-9]+)>", done.stdout)
    assert [int(rows) for _, rows in told] == [ROWS] * 2, done.stderr[-2000:]
    assert sum(int(count) for count, _ in told) <= 40 * 1.05 + 2 + 4


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kind", ["loader", "list", "numbered"])
def test_two_ranks_of_four_are_killed_and_the_others_finish_all(tmp_path, start, undisturbed, kind, seed):  # noqa: F811
    chance = random.Random(seed)
    ranks = start(4, tmp_path, kind, seconds=0.01)
    doomed = chance.sample(range(4), 2)
    for number in doomed:
        time.sleep(chance.uniform(0.0, 0.1))
        ranks[number].process.kill()
    for number, rank in enumerate(ranks):
        if number not in doomed:
            assert rank.result()[1] == len(open_store(tmp_path).ids)
    assert shards(tmp_path) == undisturbed[kind]


def test_all_ranks_are_killed_and_three_others_go_on(tmp_path, start, undisturbed):  # noqa: F811
    for rank in start(4, tmp_path, "loader", seconds=0.01):
        rank.process.join(0.05)
        rank.process.kill()
    done = len(shards(tmp_path))
    results = [rank.result() for rank in start(3, tmp_path, "loader", seconds=0.01)]
    assert [rows for _, rows in results] == [ROWS] * 3
    assert shards(tmp_path) == undisturbed["loader"]
    assert sum(count for count, _ in results) <= (20 - done) * 2 * 1.05 + 3 + 4


def test_a_rank_that_never_came_is_not_waited_for(tmp_path, start, undisturbed):  # noqa: F811
    (rank,) = start(4, tmp_path, "loader", only=[2])
    assert rank.result() == (40, ROWS)
    assert shards(tmp_path) == undisturbed["loader"]


def test_a_rank_loads_only_what_it_runs(tmp_path):
    batches = Numbered()
    calls()
    store = run(tmp_path, batches=batches, share=(0, 2))  # the other rank never comes
    assert store.rows == ROWS - 2
    assert sorted(batches.loaded) == sorted([*range(40), 39])  # the last one tells how many rows there are
    assert calls() == 40


@pytest.mark.parametrize("kind", ["safetensors", "npz", "npy"])
def test_ranks_write_any_format(tmp_path, kind):
    for out, share in (("one", None), ("two", (0, 2))):
        run(tmp_path / out, batches=Numbered(rows=50), format=kind, share=share)
    assert shards(tmp_path / "one") == shards(tmp_path / "two")


def test_rows_behind_the_last_one_are_added_by_ranks_too(tmp_path):
    for out, share in (("one", None), ("two", (1, 2))):
        for rows in (50, 90):
            batches = [{"input": one["input"]} for one in map(Numbered(rows=rows).__getitem__, range(-(-rows // 4)))]
            run(tmp_path / out, batches=batches, ids=None, share=share, append=True)
    assert shards(tmp_path / "one") == shards(tmp_path / "two")
    assert open_store(tmp_path / "two").rows == 90


def test_rows_that_fail_are_reported_by_the_rank_that_ran_them(tmp_path):
    class Fails(Layered):
        def forward(self, input):  # noqa: A002
            if (input[:, 0] > 2).any():
                raise ValueError("too large")
            return super().forward(input)

    told: dict[str, list[str]] = {"one": [], "two": []}
    for out, share in (("one", None), ("two", (0, 2))):
        run(tmp_path / out, model=Fails(), share=share, on_failure=lambda row, _, out=out: told[out].append(row))
    assert sorted(told["one"]) == sorted(told["two"]) != []
    assert shards(tmp_path / "one") == shards(tmp_path / "two")


def test_units_of_batches_are_shared_too(tmp_path):
    for out, share in (("one", None), ("two", (1, 3))):
        batches = [{"input": one["input"]} for one in batches_of("list")]
        run(tmp_path / out, batches=batches, ids=None, missing="skip", share=share)
    assert shards(tmp_path / "one") == shards(tmp_path / "two")
    assert open_store(tmp_path / "one").manifest["batches_per_unit"] == 2


def test_units_whose_size_the_first_batch_chooses_are_the_same_on_each_rank(tmp_path, start, undisturbed):  # noqa: F811
    run(tmp_path / "one", rows_per_unit=None)
    results = [rank.result() for rank in start(2, tmp_path / "two", "loader", rows_per_unit=None)]
    assert [rows for _, rows in results] == [ROWS] * 2
    assert shards(tmp_path / "one") == shards(tmp_path / "two")


def test_a_generator_is_gone_through_whole_with_one_warning(tmp_path):
    run(tmp_path)
    calls()
    (tmp_path / "shards/00000003.safetensors").unlink()
    with pytest.warns(UserWarning, match="Each of the 2 ranks goes through all batches") as caught:
        store = run(tmp_path, batches=iter(batches_of("loader")), share=(1, 2))
    assert [one.filename for one in caught] == [divided_runs.__file__]
    assert calls() == 1 + 2
    assert store.rows == ROWS


def test_a_rank_with_another_model_is_found(tmp_path, start):  # noqa: F811
    run(tmp_path / "out", share=None)
    other = Layered()
    other.layer.register_forward_hook(lambda _, args, out: out * 1.1)
    with pytest.raises(OtherRunError, match="what the model computes"):
        run(tmp_path / "out", model=other, share=(1, 2))


def test_a_rank_whose_model_differs_is_found_also_where_all_begin_at_once(tmp_path):
    class Other(Layered):
        def forward(self, input):  # noqa: A002
            if not (tmp_path / "shards/00000001.safetensors").exists():
                with warnings.catch_warnings():
                    run(tmp_path, share=(1, 2))
            return super().forward(input) * 1.1

    with pytest.raises(OtherRunError, match="what the model computes|structure"):
        run(tmp_path, model=Other(), share=(0, 2))


def test_a_batch_of_other_rows_than_the_first_is_an_error_that_says_what_to_do(tmp_path):
    class Uneven(Numbered):
        def __getitem__(self, number):
            batch = super().__getitem__(number)
            return batch if number != 5 else {name: value[:-1] for name, value in batch.items()}

    with pytest.raises(ArgumentError, match="batch 5 must hold 4 rows, as .*, got 3. With share=None"):
        run(tmp_path, batches=Uneven(), share=(0, 2))
    store = run(tmp_path / "alone", batches=Uneven(), share=None)
    assert store.rows == ROWS - 3
    listed = [Uneven()[number] for number in range(40)]
    run(tmp_path / "listed", batches=listed, share=(0, 2))
    assert shards(tmp_path / "listed") == shards(tmp_path / "alone")


def test_a_data_set_that_ranks_have_parts_of_is_not_shared_again(tmp_path, monkeypatch):
    loaders = {}
    for rank in range(2):
        data = batches_of("loader").dataset
        loaders[rank] = DataLoader(data, batch_size=4, sampler=DistributedSampler(data, 2, rank, shuffle=False))
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    calls()
    assert run(tmp_path / "1", batches=loaders[1]).rows == ROWS / 2
    assert calls() == 20
    with pytest.raises(ArgumentError, match="must be the same on each rank with share, got 'DistributedSampler'"):
        run(tmp_path / "2", batches=loaders[1], share=(1, 2))


def test_rows_in_windows_are_shared_too(tmp_path):
    parts = [(row, window, 1 + row % 3) for row in range(30) for window in range(1 + row % 3)]
    batches = []
    for at in range(0, len(parts), 4):
        given = parts[at : at + 4]
        values = VALUES[[row for row, _, _ in given]][:, None].expand(-1, 5, 8) + torch.arange(5.0)[:, None]
        batches.append({"input": values, "counts": torch.ones(len(given), 5, dtype=torch.int64), "window": given})
    options = {"group": "window", "pooling_mask": "counts", "ids": None, "reduce": ["mean", "full"], "rows_per_unit": 4}
    for out, share in (("one", None), ("two", (0, 2))):
        assert run(tmp_path / out, batches=batches, share=share, **options).rows == 30
    assert shards(tmp_path / "one") == shards(tmp_path / "two")
    for number in (3, 6):
        (tmp_path / f"two/shards/{number:08d}.safetensors").unlink()
    assert run(tmp_path / "two", batches=batches, share=(1, 2), **options).rows == 30
    assert shards(tmp_path / "one") == shards(tmp_path / "two")


def test_what_ranks_cannot_share_is_said(tmp_path):
    run(tmp_path, batches=Numbered(rows=40))
    with pytest.raises(ArgumentError, match=r"share must be left out with append=True beside ids, got \(0, 2\)"):
        run(tmp_path, batches=Numbered(rows=80), append=True, share=(0, 2))
    with pytest.raises(ArgumentError, match="share must be left out with resume=False"):
        run(tmp_path / "new", resume=False, share=(0, 2))
