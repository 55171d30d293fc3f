"""``extract --engine ray``: the command in several processes, on a cluster of this machine."""

from __future__ import annotations

import re
import threading

import commands
import pytest
from commands import mistake
from tiny import LETTERS, save_bert

ray = pytest.importorskip("ray", reason="ray comes with the extra of that name")

from engine_ray import cluster, kill, wait_until  # noqa: E402
from small_runs import shards  # noqa: E402

from activation_extractor import open_store  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")  # Ray warns of itself
TEXTS = ["".join(LETTERS[(row * step) % 20] for step in range(1 + row * 7 % 23)) for row in range(40)]
SLOW = """
import os, time
from pathlib import Path
import torch
from torch import nn

class Slow(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(3, 3)
    def forward(self, rows):
        Path("began", f"{os.getpid()}-{time.time_ns()}").touch()
        time.sleep(0.2)
        return self.layer(rows)
"""


@pytest.fixture(scope="module")
def running():
    with cluster() as started:
        yield started


def test_tasks_of_ray_write_the_store_of_one_process(running, tmp_path):
    save_bert(tmp_path / "model")
    (tmp_path / "texts.txt").write_text("\n".join(TEXTS))
    options = [
        "--model",
        tmp_path / "model",
        "--input",
        tmp_path / "texts.txt",
        "--rows-per-unit",
        4,
        "--batch-size",
        4,
    ]
    commands.run("extract", *options, "--out", tmp_path / "one")
    done = commands.run("extract", *options, "--out", tmp_path / "several", "--engine", "ray", "--workers", 2)
    assert "2 tasks of Ray share the work." in done.stderr
    assert shards(tmp_path / "several") == shards(tmp_path / "one")
    assert open_store(tmp_path / "several").is_complete
    again = commands.run("extract", *options, "--out", tmp_path / "several", "--engine", "ray", "--workers", 2)
    assert "40 rows" in again.stdout
    assert shards(tmp_path / "several") == shards(tmp_path / "one")


def test_a_task_whose_worker_is_killed_costs_nothing_but_time(running, tmp_path, monkeypatch):
    import numpy as np

    monkeypatch.chdir(tmp_path)
    (tmp_path / "began").mkdir()
    (tmp_path / "slow_models.py").write_text(SLOW)
    np.save("rows.npy", np.random.default_rng(0).normal(size=(48, 3)).astype(np.float32))
    options = ["--model", "slow_models:Slow", "--input", "rows.npy", "--layers", "layer", "--reduce", "full"]
    options += ["--batch-size", 4, "--rows-per-unit", 4]

    def kill_one():
        def processes():
            return [int(file.name.partition("-")[0]) for file in (tmp_path / "began").iterdir()]

        began = wait_until(lambda: len({*(found := processes())}) >= 2 and len(found) >= 8 and found, "both work")
        kill(next(process for process in began if process != began[0]))

    thread = threading.Thread(target=kill_one)
    thread.start()
    commands.run("extract", *options, "--out", "several", "--engine", "ray", "--workers", 2)
    thread.join()
    commands.run("extract", *options, "--out", "one")
    written = {name: data for name, data in shards(tmp_path / "several").items() if not name.endswith(".tmp")}
    assert written == shards(tmp_path / "one")  # beside the draft of the one that was killed


def test_what_a_task_raises_is_the_commands_error(running, tmp_path):
    (tmp_path / "texts.txt").write_text("\n".join(TEXTS))
    options = ["--input", tmp_path / "texts.txt", "--out", tmp_path / "out", "--engine", "ray", "--workers", 2]
    text = commands.run("extract", "--model", "no_such_module:build", *options, code=2).stderr
    assert "--model must name a module that can be imported, got 'no_such_module:build'." in text
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--engine", "ray", "--append"], "--append must be left out with --engine ray"),
        (["--engine", "ray", "--skip-bad-rows", "bad.jsonl"], "--skip-bad-rows must be left out with --engine ray"),
        (["--engine", "ray", "--workers", 0], "--workers must be a positive integer, got 0"),
        (["--workers", 2], "--workers must be left out without --engine ray, got 2"),
    ],
)
def test_what_only_one_process_can_do_is_refused_at_the_door(tmp_path, options, text):
    line = mistake("extract", "--model", "a:b", "--input", tmp_path / "x.txt", "--out", tmp_path / "out", *options)
    assert re.sub(r"\s+", " ", line).startswith(text)


def test_standard_input_cannot_be_read_by_several(tmp_path):
    options = ["--model", "a:b", "--input", "-", "--out", tmp_path / "out", "--engine", "ray"]
    assert mistake("extract", *options).startswith("--input must be a file with --engine ray, got '-'")
