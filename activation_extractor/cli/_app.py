"""The commands of ``activation-extractor``, a module each; importing them imports no torch, so that help is quick."""

from __future__ import annotations

import typer

from activation_extractor.cli.commands.compare import compare
from activation_extractor.cli.commands.demo import demo
from activation_extractor.cli.commands.export import export
from activation_extractor.cli.commands.extract import extract
from activation_extractor.cli.commands.layers import layers
from activation_extractor.cli.commands.plot import plot
from activation_extractor.cli.commands.show import show
from activation_extractor.cli.commands.verify import verify

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


@app.callback()
def about() -> None:
    """Get activations out of PyTorch models."""


app.command()(demo)
app.command()(layers)
app.command()(extract)
app.command()(show)
app.command()(verify)
app.command()(compare)
app.command()(export)
app.command()(plot)
