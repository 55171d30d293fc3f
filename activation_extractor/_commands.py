"""The commands of ``activation-extractor``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)

_SHOWN_CITATIONS = ("1 Chronicles 1:8", "2 Kings 14:4", "Exodus 29:4", "Proverbs 24:21")


@app.callback()
def about() -> None:
    """Get activations out of PyTorch models."""


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="A new or empty folder for the store, or that of an earlier demo.")],
) -> None:
    """Embed 500 sentences with every block of a pretrained model, and show which ones are alike.

    Example: activation-extractor demo --out out
    """
    from activation_extractor._demo import neighbour_rows, read_sentences, run_demo
    from activation_extractor.errors import ActivationError

    console = Console()
    try:
        store = run_demo(out)
    except ActivationError as error:
        Console(stderr=True, soft_wrap=True).print(str(error), style="red", highlight=False, markup=False)
        raise typer.Exit(2) from None
    last_block = store.names[-1]
    console.print(repr(store), highlight=False, markup=False, soft_wrap=True)
    table = Table("sentence", "is nearest to", "cosine", title=f"Nearest by the mean of {last_block}", show_lines=True)
    for row in neighbour_rows(store[last_block, "mean"], read_sentences(), _SHOWN_CITATIONS):
        table.add_row(*row)
    console.print(table)
    lines = [
        "Read it back:",
        "    from activation_extractor import open_store",
        f"    store = open_store({str(out)!r})",
        f"    store[{last_block!r}, 'mean'].numpy(), store.ids",
    ]
    console.print("\n".join(lines), highlight=False, markup=False, soft_wrap=True)
