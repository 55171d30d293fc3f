"""``export``: says what it wrote and how to open it."""

from __future__ import annotations

from typing import get_args

import pytest
import torch

pytest.importorskip("typer", reason="the extra 'cli' is not installed")

from commands import mistake, run
from exports import make_store
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
    needs = {"parquet": "pyarrow", "datasets": "datasets", "h5ad": "anndata"}
    if to in needs:
        pytest.importorskip(needs[to], reason=f"what {to} needs is not installed")
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
        "datasets": lambda: list(scope["dataset"]["h.0"]),
        "h5ad": lambda: scope["data"].obsm["h.0"].tolist(),
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


@pytest.fixture
def wide(tmp_path):
    sink = SafetensorsSink(tmp_path / "wide")
    values = {(layer, reducer): torch.ones(2, 3) for layer in ("h.0", "h.1", "x") for reducer in ("mean", "last")}
    sink.write(type(mean_step(2))(0, 2, values))
    sink.close()
    return tmp_path / "wide"


@pytest.mark.parametrize(
    ("options", "columns"),
    [
        (["--layers", "h.*"], ["h.0:mean", "h.0:last", "h.1:mean", "h.1:last"]),
        (["--reduce", "last"], ["h.0", "h.1", "x"]),
        (["--layers", "x", "--layers", "h.1", "--reduce", "mean", "--reduce", "last"], 4),
        (["--layers", "x", "--reduce", "mean"], ["x"]),
    ],
)
def test_layers_and_reducers_can_be_chosen(tmp_path, wide, options, columns):
    import numpy as np

    run("export", wide, "--to", "npz", "--out", tmp_path / "o.npz", *options)
    with np.load(tmp_path / "o.npz") as arrays:
        found = [name for name in arrays.files if not name.startswith("#")]
    assert found == columns or len(found) == columns


def test_layers_and_reducers_that_are_not_there_are_a_sentence(tmp_path, wide):
    line = mistake("export", wide, "--to", "npz", "--out", tmp_path / "o.npz", "--layers", "h.0", "--layers", "y.*")
    assert line.startswith("--layers must select something of the store, as 'h.0', 'h.1', 'x' would, got 'y.*'")
    line = mistake("export", wide, "--to", "npz", "--out", tmp_path / "o.npz", "--reduce", "max")
    assert line.startswith("--reduce must select something of the store, as 'mean', 'last' would, got 'max'")


def test_a_folder_of_tables_has_files_of_the_size_that_is_asked_for(tmp_path, wide):
    pytest.importorskip("pyarrow", reason="the extra 'parquet' is not installed")
    run("export", wide, "--to", "parquet", "--out", tmp_path / "parts", "--shard-bytes", "1")
    assert len(list((tmp_path / "parts").iterdir())) == 2
    assert "--shard-bytes must be" in mistake(
        "export", wide, "--to", "npz", "--out", tmp_path / "o", "--shard-bytes", "1"
    )


def test_a_ragged_column_is_left_out_of_h5ad_by_the_options_that_the_error_names(tmp_path):
    pytest.importorskip("h5py", reason="the extra 'h5ad' is not installed")
    make_store(tmp_path)
    line = mistake("export", tmp_path / "store", "--to", "h5ad", "--out", tmp_path / "o.h5ad")
    assert line.endswith("Choose other columns by --layers and --reduce, or export to npz.")
    run("export", tmp_path / "store", "--to", "h5ad", "--out", tmp_path / "o.h5ad", "--reduce", "mean")
