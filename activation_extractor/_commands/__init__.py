"""The commands of ``activation-extractor``, a module each; importing them imports no torch, so that help is quick."""

from __future__ import annotations

import typer

from activation_extractor._commands.demo import demo

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


@app.callback()
def about() -> None:
    """Get activations out of PyTorch models."""


app.command()(demo)
