"""``activation-extractor import``; a file of that name could not be imported."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from activation_extractor.cli._terminal import say


def import_(
    folder: Annotated[
        Path, typer.Argument(help="A folder of safetensors files, one for each request.", show_default=False)
    ],
    out: Annotated[Path, typer.Option(help="The new folder of the store.", show_default=False)],
    layers: Annotated[
        list[str] | None,
        typer.Option(help="What a layer in the files is called, or its number in vLLM; once for each, in their order."),
    ] = None,
) -> None:
    """Make a store of the hidden states that vLLM or speculators wrote, a safetensors file for each request.

    The files have hidden_states (tokens, layers, hidden) and token_ids, as vLLM's extract_hidden_states writes them.
    The number 2 is the layer hidden_states.2; without --layers they are aux.0, aux.1, and so on.

    \b
    Examples:
        activation-extractor import /tmp/hidden_states --out states --layers 2 --layers 16 --layers 29
        activation-extractor verify states
    """
    from activation_extractor._display import human_bytes, plural
    from activation_extractor.store import import_store

    named = None if layers is None else [int(layer) if layer.isdecimal() else layer for layer in layers]
    store = import_store(folder, out, layers=named)
    content = f"{plural(store.rows, 'row')} of {plural(len(store), 'column')}"
    say(f"Wrote {str(out)!r}: {content}, {human_bytes(store.nbytes)}")
