"""``export``: says what it wrote and how to open it."""

from __future__ import annotations

from typing import get_args

import pytest
import torch

pytest.importorskip("typer", reason="the extra 'cli' is not installed")

from commands import mistake, run
from stores import mean_step

from activation_extractor import SafetensorsSink
from activation_extractor.cli.commands.export import Target
from activation_extractor.store import _export as module


@pytest.fixture
def out(tmp_path):
    sink = SafetensorsSink(tmp_path / "out")
    sink.write(mean_step(2, ["a", "b"], 1.5))
    sink.close()
    return tmp_path / "out"


@pytest.mark.parametrize("to", get_args(Target))
def test_it_says_what_was_written_and_the_line_that_opens_it_does(tmp_path, out, to):
    if to == "parquet":
        pytest.importorskip("pyarrow", reason="the extra 'parquet' is not installed")
    path = tmp_path / ("a rather long name of a folder or file for a terminal of eighty columns, with 'quotes' in it")
    done = run("export", out, "--to", to, "--out", path)
    wrote, opens = done.stdout.splitlines()
    files = [path] if path.is_file() else list(path.iterdir())
    nbytes = sum(one.stat().st_size for one in files)
    assert wrote.startswith(f"Wrote {str(path)!r}, ")
    assert wrote.endswith(f" ({nbytes:,} bytes). Open it with:")
    scope: dict = {}
    exec(opens.strip(), scope)
    found = {
        "parquet": lambda: scope["table"]["h.0"].to_pylist(),
        "npy": lambda: scope["arrays"]["h.0"].tolist(),
        "npz": lambda: scope["arrays"]["h.0"].tolist(),
        "safetensors": lambda: scope["tensors"].get_tensor("h.0").tolist(),
    }[to]()
    assert found == [[1.5] * 3] * 2
    if to == "npz":
        scope["arrays"].close()


def test_the_command_takes_every_format_that_there_is():
    assert list(get_args(Target)) == list(module._FORMATS)


def test_what_is_there_already_is_an_error_and_stays(tmp_path, out):
    (tmp_path / "mine").write_text("mine")
    assert "must be a new file" in mistake("export", out, "--to", "npz", "--out", tmp_path / "mine")
    assert (tmp_path / "mine").read_text() == "mine"


def test_another_format_and_a_missing_option_are_exit_code_2(tmp_path, out):
    assert "'csv' is not one of" in run("export", out, "--to", "csv", "--out", tmp_path / "x", code=2).output
    run("export", out, "--to", "npz", code=2)
    run("export", "--to", "npz", "--out", tmp_path / "x", code=2)


def test_a_folder_that_is_no_store_is_one_sentence(tmp_path, out):
    line = mistake("export", tmp_path / "not", "--to", "npz", "--out", tmp_path / "x")
    assert line == f"'{tmp_path / 'not'}' must be a store, got no such folder. Give the folder that extract wrote."
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_numbers_that_parquet_does_not_have_are_a_sentence(tmp_path):
    pytest.importorskip("pyarrow", reason="the extra 'parquet' is not installed")
    sink = SafetensorsSink(tmp_path / "out")
    step = mean_step(2)
    sink.write(type(step)(0, 2, {("h.0", "mean"): torch.ones(2, 3, dtype=torch.complex64)}))
    sink.close()
    line = mistake("export", tmp_path / "out", "--to", "parquet", "--out", tmp_path / "x")
    assert line.startswith("column 'h.0' of a Parquet file must hold real numbers")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
