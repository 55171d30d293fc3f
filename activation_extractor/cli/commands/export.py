"""``activation-extractor export``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from activation_extractor.cli._terminal import say

Target = Literal["parquet", "npy", "npz", "safetensors"]


def export(
    store: Annotated[Path, typer.Argument(help="The folder of a store.", show_default=False)],
    to: Annotated[Target, typer.Option(help="The format.", show_default=False)],
    out: Annotated[Path, typer.Option(help="The new file; for npy, the new folder.", show_default=False)],
) -> None:
    """Write a store to one file, or a folder of arrays, that other programs read.

    \b
    Examples:
        activation-extractor export out --to parquet --out out.parquet
        activation-extractor export out --to npy --out arrays
    """
    from activation_extractor._display import human_bytes
    from activation_extractor.store import _export, open_store

    done = _export.export(open_store(store), out, to)
    say(f"Wrote {str(done.path)!r}, {human_bytes(done.nbytes)} ({done.nbytes:,} bytes). Open it with:")
    say(f"    {done.opened_with}")
