"""What all commands share."""

from __future__ import annotations

import pytest

pytest.importorskip("typer", reason="the extra cli is not installed")
from typer.main import get_command

from activation_extractor.cli._app import app

COMMANDS = get_command(app).commands


def options(command: str) -> set[str]:
    return {option for parameter in COMMANDS[command].params for option in parameter.opts if option.startswith("-")}


def test_the_option_of_layers_has_one_name_in_every_command():
    assert {name for name in COMMANDS if "--layers" in options(name)} == {"layers", "extract", "plot"}
    assert not any({"--layer", "--pattern"} & options(name) for name in COMMANDS)
