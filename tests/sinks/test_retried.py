"""A task that runs again, or whose ids are those of another one, with ``append=True``."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from wide_runs import SINKS

from activation_extractor import SafetensorsSink, capture, open_store
from activation_extractor.errors import StoreError

MODEL = nn.Sequential(nn.Linear(2, 3))


def task(out, ids, sink=SafetensorsSink, **options) -> None:
    with capture(MODEL, "0", sink=sink(out, append=True, **options)) as acts:
        for row_id in ids:
            with acts.step(ids=[row_id]):
                MODEL(torch.full((1, 2), float(len(str(row_id)))))


@pytest.mark.parametrize("kind", SINKS)
@pytest.mark.parametrize("ids", [["a", "b"], [7, 8]], ids=["str", "int"])
def test_a_task_that_runs_again_is_told_so_and_the_advice_helps(tmp_path, kind, ids):
    task(tmp_path, ids[:1], SINKS[kind])
    text = (
        rf"must hold each id once, got {ids[0]!r}, which it holds already\. Leave out what open_store\(path\)\.ids has"
    )
    with pytest.raises(
        StoreError, match=text + r" where a task runs again, .*; else give every row an id of its own\."
    ):
        task(tmp_path, ids, SINKS[kind])
    assert open_store(tmp_path).ids == ids[:1]
    stored = set(open_store(tmp_path).ids)
    task(tmp_path, [row_id for row_id in ids if row_id not in stored], SINKS[kind])
    assert open_store(tmp_path).ids == ids


def test_a_task_that_gives_an_id_twice_itself_is_told_that(tmp_path):
    task(tmp_path, ["a"])
    with pytest.raises(StoreError, match=r"got 'b' again\. Give every row an id of its own\."):
        task(tmp_path, ["b", "b"])
    assert open_store(tmp_path).ids == ["a", "b"]


def test_a_step_of_which_some_rows_are_stored_is_refused_whole(tmp_path):
    task(tmp_path, ["a"])
    with capture(MODEL, "0", sink=SafetensorsSink(tmp_path, append=True)) as acts:
        with pytest.raises(StoreError, match="got 'a', which it holds already"), acts.step(ids=["b", "a"]):
            MODEL(torch.ones(2, 2))
        with acts.step(ids=["b"]):
            MODEL(torch.ones(1, 2))
    assert open_store(tmp_path).ids == ["a", "b"]


def test_rows_without_ids_are_appended_again_and_again(tmp_path):
    for _ in range(3):
        with capture(MODEL, "0", sink=SafetensorsSink(tmp_path, append=True)):
            MODEL(torch.ones(2, 2))
    assert open_store(tmp_path).rows == 6
