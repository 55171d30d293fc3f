"""Data sets through models that two processes share: one store, as that of one process, and nothing that hangs."""

from __future__ import annotations

import pytest
import torch
from spread_models import SPREAD, X, plain
from torch import nn

from activation_extractor import extract
from activation_extractor._format._fingerprints import weights_digest
from activation_extractor.errors import OtherProcessError
from activation_extractor.runs._devices import with_weights

MASK = torch.arange(6) < torch.tensor([[6], [4], [1], [5]])
BATCHES = [{"x": X[start : start + 1], "attention_mask": MASK[start : start + 1], "id": [start]} for start in range(4)]
OPTIONS = {"reduce": ["mean", "last"], "ids": "id", "progress": False, "rows_per_unit": 2}
COLLECTIVE = [kind for kind in SPREAD if kind != "DDP"]


def run(rank, kind, folder, batches=BATCHES, options=None, seed=0):
    """What a run gives: its store's values, or its error."""
    model = SPREAD[kind](seed)
    try:
        store = extract(model, batches, ["up", "act", "down"], out=folder, **{**OPTIONS, **(options or {})})
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    with torch.no_grad():
        model(X)  # which inference tensors in it would not let
    return {key: store[key].torch() for key in store}


def wanted(folder, **options):
    store = extract(plain(), BATCHES, ["up", "act", "down"], out=folder, **{**OPTIONS, **options})
    return {key: store[key].torch() for key in store}


def check(found, expected):
    assert not isinstance(found, str), found
    assert list(found) == list(expected)
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value)


@pytest.mark.parametrize("kind", COLLECTIVE)
def test_processes_that_share_a_model_make_one_store_and_go_on_with_it(ranks, kind, tmp_path):
    expected = wanted(tmp_path / "plain")
    for values in ranks(run, kind, str(tmp_path / "out")):
        check(values, expected)
    written = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out" / "shards").iterdir()}
    assert len(written) == 2
    (tmp_path / "out" / "shards" / sorted(written)[1]).unlink()
    for values in ranks(run, kind, str(tmp_path / "out")):
        check(values, expected)
    assert len([*(tmp_path / "out" / "shards").iterdir()]) == 2


@pytest.mark.parametrize("kind", COLLECTIVE)
def test_other_weights_are_refused_in_each_process(ranks, kind, tmp_path):
    ranks(run, kind, str(tmp_path / "out"))
    leading, following = ranks(run, kind, str(tmp_path / "out"), BATCHES, None, 1)
    assert leading.startswith("OtherRunError")
    assert "weights" in leading
    assert following == f"OtherProcessError: {OtherProcessError(0, leading)}"


def digests(rank, kind):
    model = SPREAD[kind]()
    before = weights_digest(with_weights(model))
    with torch.no_grad():
        model(X)
    return before, weights_digest(with_weights(model))


@pytest.mark.parametrize("kind", SPREAD)
def test_the_digest_of_weights_is_that_of_the_plain_model_in_each_process(ranks, kind):
    digest = weights_digest(plain())
    assert ranks(digests, kind) == [(digest, digest)] * 2


def only_one(rank, folder):
    """One process alone runs a data set through a DistributedDataParallel with buffers."""
    model = nn.parallel.DistributedDataParallel(nn.Sequential(nn.Linear(32, 8), nn.BatchNorm1d(6)))
    if rank:
        return True
    store = extract(model, X.split(1), "*", out=folder, reduce="mean", progress=False)
    return store["1"].shape == (4, 6) and model.training


def test_a_ddp_model_waits_for_nobody(ranks, tmp_path):
    assert ranks(only_one, str(tmp_path)) == [True, True]


def different(rank, folder):
    """Processes with data of their own, of different lengths, and a folder each."""
    model = SPREAD["DDP"]()
    store = extract(
        model, X[: 2 + rank].split(1), "up", out=f"{folder}/{rank}", share=None, reduce="mean", progress=False
    )
    return store.rows


def test_ddp_processes_may_have_data_of_different_lengths(ranks, tmp_path):
    pytest.importorskip("activation_extractor.runs._ranks", reason="share= is to come")
    assert ranks(different, str(tmp_path)) == [2, 3]


class Fails(nn.Module):
    """Fails on one row."""

    def forward(self, x):
        if (x == 7).any():
            raise ValueError("this row")
        return x


def failing(rank, folder, skips):
    from spread_models import tensor_parallel

    model = nn.Sequential(Fails(), tensor_parallel())
    rows = X.clone()
    rows[2] = 7
    lost = []
    options = {"on_failure": lambda row, error: lost.append((row, str(error)))} if skips else {}
    try:
        store = extract(model, rows.split(2), "1.down", out=folder, reduce="mean", progress=False, **options)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return store.rows, lost


def test_a_row_that_fails_ends_the_run_in_each_process_or_is_left_out(ranks, tmp_path):
    leading, following = ranks(failing, str(tmp_path / "a"), False)
    assert leading.startswith("ValueError: this row")
    assert following.startswith(
        "OtherProcessError: A run of several processes must go well in each of them, got in rank 0 ValueError"
    )
    assert ranks(failing, str(tmp_path / "b"), True) == [(3, [(2, "this row")]), (3, [])]


class Breaks:
    """Batches that end in an error."""

    def __iter__(self):
        yield BATCHES[0]
        raise OSError("no more data")


def test_data_that_break_off_end_the_run_in_each_process(ranks, tmp_path):
    leading, following = ranks(run, "tensor parallel", str(tmp_path / "out"), Breaks())
    assert leading == "OSError: no more data"
    assert "no more data" in following


def refused(ranks, tmp_path, options):
    return ranks(run, "tensor parallel", str(tmp_path / "out"), BATCHES, options)


def unlike(rank, folder):
    """One process has no batches that it could run."""
    return run(rank, "tensor parallel", folder, 3 if rank else BATCHES)


def test_an_argument_that_one_process_alone_refuses_ends_the_run_in_each(ranks, tmp_path):
    leading, following = ranks(unlike, str(tmp_path / "out"))
    assert following.startswith("ArgumentTypeError")
    assert leading.startswith(
        "OtherProcessError: A run of several processes must go well in each of them, got in rank 1 "
    )


def test_parts_are_not_stored_for_all(ranks, tmp_path):
    for options in ({"sharded": "local"}, {"reduce": "median"}):
        assert all(outcome.startswith("ArgumentError") for outcome in refused(ranks, tmp_path, options))
    leading, following = refused(ranks, tmp_path, {"sharded": "local"})
    assert leading.startswith("ArgumentError: sharded must be 'gather' where one process stores")
    assert following.startswith("ArgumentError: sharded must be 'gather'")


def dealt_out(rank, folder):
    """Each process is given a part of the rows."""
    from torch.utils.data import DataLoader, DistributedSampler

    rows = [{"x": x, "id": f"row {number}"} for number, x in enumerate(X)]
    return run(rank, "FSDP2", folder, DataLoader(rows, batch_size=1, sampler=DistributedSampler(rows)))


def test_rows_that_are_dealt_out_to_processes_are_refused_where_one_would_store_its_own(ranks, tmp_path):
    for outcome in ranks(dealt_out, str(tmp_path)):
        assert outcome.startswith("ArgumentError: batches must be the same in each process that shares a model")


def previewed(rank):
    from activation_extractor import preview

    model = SPREAD["FSDP2"]()
    shapes = [row.shape for row in preview(model, "*", X)]
    with torch.no_grad():
        model(X)  # which inference tensors in it would not let
    return shapes


def test_a_preview_leaves_an_fsdp_model_as_it_was(ranks):
    assert ranks(previewed) == [[(4, 6, 64), (4, 6, 64), (4, 6, 32)]] * 2


def nested(rank, folder, use_orig_params):
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.fsdp.wrap import ModuleWrapPolicy

    options = {"auto_wrap_policy": ModuleWrapPolicy({nn.Linear}), "device_id": torch.device("cpu")}
    model = FullyShardedDataParallel(plain(), use_orig_params=use_orig_params, **options)
    store = extract(model, BATCHES, ["up", "act", "down"], out=folder, **OPTIONS)
    return {key: store[key].torch() for key in store}


@pytest.mark.parametrize("use_orig_params", [True, False])
def test_fsdp_in_fsdp(ranks, tmp_path, use_orig_params):
    expected = wanted(tmp_path / "plain")
    for values in ranks(nested, str(tmp_path / "out"), use_orig_params):
        check(values, expected)
