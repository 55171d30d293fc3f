"""``activation-extractor verify``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from activation_extractor._display import human_bytes, plural, printable
from activation_extractor.cli._terminal import say, say_json


def verify(
    store: Annotated[Path, typer.Argument(help="The folder of a store.", show_default=False)],
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object, for a script.")] = False,
) -> None:
    """Read a store whole and compare it with its checksums.

    The exit code is 0 when all is well, 1 when something is damaged, missing or foreign, and 2 when there is no store.

    \b
    Examples:
        activation-extractor verify out
        activation-extractor verify out --json | jq '.damages[].path'
    """
    from activation_extractor.store import verify_store

    damages = verify_store(store)
    extent = f"{plural(damages.shards, 'unit')}, {human_bytes(damages.nbytes)} read"
    if as_json:
        listed = [{"path": str(damage.path), "kind": damage.kind, "detail": damage.detail} for damage in damages]
        say_json({"path": str(store), "units": damages.shards, "bytes": damages.nbytes, "damages": listed})
    elif damages:
        lines = [printable(str(damage)) for damage in damages]
        say("\n".join([*lines, f"{plural(len(lines), 'damage')}: {extent}"]))
    else:
        say(f"All well: {extent}")
    if damages:
        raise typer.Exit(1)
