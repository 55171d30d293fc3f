"""What all commands share."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

pytest.importorskip("typer", reason="the extra 'cli' is not installed")

from commands import run
from typer.main import get_command
from typer.testing import CliRunner

from activation_extractor import SafetensorsSink, __version__, cli
from activation_extractor.cli._app import app
from activation_extractor.sinks import Step

COMMANDS = get_command(app).commands


def options(command: str) -> set[str]:
    return {option for parameter in COMMANDS[command].params for option in parameter.opts if option.startswith("-")}


def test_the_option_of_layers_has_one_name_in_every_command():
    assert {name for name in COMMANDS if "--layers" in options(name)} == {
        "layers",
        "extract",
        "import",
        "export",
        "plot",
    }
    assert not any({"--layer", "--pattern"} & options(name) for name in COMMANDS)


def test_version_is_a_line():
    done = CliRunner().invoke(app, ["--version"])
    assert (done.exit_code, done.stdout) == (0, f"activation-extractor {__version__}\n")


def test_version_and_help_import_neither_torch_nor_numpy():
    lines = [["--version"], ["--help"], *([name, "--help"] for name in COMMANDS)]
    code = f"""
import sys
from typer.testing import CliRunner
from activation_extractor.cli._app import app
for arguments in {lines}:
    assert CliRunner().invoke(app, arguments).exit_code == 0, arguments
assert not {{"torch", "numpy", "matplotlib"}} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("missing", ["typer", "rich"])
def test_a_missing_extra_is_one_sentence_and_exit_code_2(monkeypatch, capsys, missing):
    def find_spec(name):
        if name == missing:
            raise ModuleNotFoundError(f"No module named {name}", name=name)
        return object()

    monkeypatch.setattr(cli, "find_spec", find_spec)
    with pytest.raises(SystemExit, match="2"):
        cli.main()
    assert capsys.readouterr() == ("", f"The command line needs {missing}: pip install 'activation_extractor[cli]'\n")


def test_a_process_has_the_exit_code_of_its_command_and_no_colours_nor_wrapped_lines_in_a_pipe(tmp_path):
    names = [f"a_rather_long_name_of_a_layer.{index}.with_more_behind_it" for index in range(3)]
    stores = [tmp_path / "left", tmp_path / "right"]
    for value, out in enumerate(stores):
        sink = SafetensorsSink(out)
        sink.write(Step(0, 1, {(name, "mean"): torch.full((1, 2), float(value)) for name in names}))
        sink.close()
    environment = {**os.environ, "COLUMNS": "40", "FORCE_COLOR": "1", "PYTHONIOENCODING": "utf-8"}
    command = [sys.executable, "-m", "activation_extractor", "compare", *stores]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert (done.returncode, done.stderr) == (1, "")
    assert done.stdout == run("compare", *stores, code=1).stdout
    assert [line[3:].split()[0] for line in done.stdout.splitlines()[2:]] == names
    assert "\x1b" not in done.stdout
