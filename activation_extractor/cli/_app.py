"""The commands of ``activation-extractor``, a module each; importing them imports no torch, so that help is quick."""

from __future__ import annotations

from typing import Annotated

import typer

from activation_extractor import __version__
from activation_extractor.cli._command import Command
from activation_extractor.cli._terminal import say
from activation_extractor.cli.commands._import import import_
from activation_extractor.cli.commands.compare import compare
from activation_extractor.cli.commands.demo import demo
from activation_extractor.cli.commands.export import export
from activation_extractor.cli.commands.extract import extract
from activation_extractor.cli.commands.layers import layers
from activation_extractor.cli.commands.plot import plot
from activation_extractor.cli.commands.show import show
from activation_extractor.cli.commands.verify import verify

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


def _say_version(is_asked: bool) -> None:
    if is_asked:
        say(f"activation-extractor {__version__}")
        raise typer.Exit


@app.callback()
def about(
    version: Annotated[
        bool, typer.Option("--version", help="Print name and version.", is_eager=True, callback=_say_version)
    ] = False,
) -> None:
    """Get activations out of PyTorch models."""


for command in (demo, layers, extract, import_, show, verify, compare, export, plot):
    app.command(command.__name__.strip("_"), cls=Command)(command)
