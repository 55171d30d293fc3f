"""``activation-extractor verify``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from activation_extractor._display import printable
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
    from activation_extractor._display import human_bytes
    from activation_extractor._format._manifest import read_manifest
    from activation_extractor._format._shards import is_shard, scan_shards, size_of
    from activation_extractor.store import verify_store

    damages = verify_store(store)
    codec = read_manifest(store).codec
    units = [Path(one) for one in scan_shards(store) if is_shard(one.name, codec) and not one.is_symlink()]
    nbytes = sum(map(size_of, units))
    extent = f"{len(units):,} {'unit' if len(units) == 1 else 'units'}, {human_bytes(nbytes)} read"
    if as_json:
        listed = [{"path": str(one.path), "kind": one.kind, "detail": one.detail} for one in damages]
        say_json({"path": str(store), "units": len(units), "bytes": nbytes, "damages": listed})
    elif damages:
        lines = [printable(str(one)) for one in damages]
        say("\n".join([*lines, f"{len(lines)} {'damage' if len(lines) == 1 else 'damages'}: {extent}"]))
    else:
        say(f"All well: {extent}")
    if damages:
        raise typer.Exit(1)
