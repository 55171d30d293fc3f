"""Commands of the command line, run in this process as a user types them."""

from __future__ import annotations

from typing import Any

from typer.testing import CliRunner

from activation_extractor.cli._app import app


def run(command: str, *arguments: object, code: int = 0, typed: str | None = None) -> Any:
    """What a command printed, once it ended with this exit code."""
    done = CliRunner().invoke(app, [command, *map(str, arguments)], input=typed)
    assert done.exit_code == code, (done.output, done.exception)
    return done


def mistake(command: str, *arguments: object) -> str:
    """The one line that a command says of a user's mistake; it prints nothing else, and ends with exit code 2."""
    done = run(command, *arguments, code=2)
    assert done.stdout == ""
    line, _ = done.stderr.split("\n")
    return line
