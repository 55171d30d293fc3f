"""``activation-extractor demo``."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from activation_extractor.cli._terminal import how_to_read, say

_SHOWN_CITATIONS = ("1 Chronicles 1:8", "2 Kings 14:4", "Exodus 29:4", "Proverbs 24:21")


def demo(
    out: Annotated[Path, typer.Option(help="A new or empty folder for the store, or that of an earlier demo.")],
) -> None:
    """Embed 500 sentences with every block of a pretrained model, and show which ones are alike.

    Beside the store it leaves a picture of the same name.

    Example: activation-extractor demo --out out
    """
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from activation_extractor.cli._demo import neighbour_rows, read_sentences, run_demo
    from activation_extractor.plots import overview, save_plot

    store = run_demo(out)
    last_block = store.names[-1]
    say(repr(store))
    rows = neighbour_rows(store[last_block, "mean"], read_sentences(), _SHOWN_CITATIONS)
    title = f"Nearest by the mean of {last_block}"
    table = Table("sentence", "is nearest to", title=Text(title), title_justify="left", show_lines=True)
    table.add_column("cosine", justify="right")
    for row in rows:
        table.add_row(*map(Text, row))
    Console().print(table)
    picture = out.absolute().with_name(f"{out.absolute().name}.png")
    save_plot(overview(store, store.keep["book"], "mean"), picture)
    say(f"Look at it: {os.path.relpath(picture)}")
    say(how_to_read(out, (last_block, "mean")))
