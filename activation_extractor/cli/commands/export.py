"""``activation-extractor export``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from activation_extractor.cli._terminal import say
from activation_extractor.errors import ArgumentError

if TYPE_CHECKING:
    from activation_extractor.store import Store

Target = Literal["parquet", "npy", "npz", "safetensors", "datasets", "h5ad"]


def export(
    store: Annotated[Path, typer.Argument(help="The folder of a store.", show_default=False)],
    to: Annotated[Target, typer.Option(help="The format.", show_default=False)],
    out: Annotated[Path, typer.Option(help="The new file, or folder.", show_default=False)],
    layers: Annotated[
        list[str] | None, typer.Option(help="Only the layers that a name or pattern selects; repeatable.")
    ] = None,
    reduce: Annotated[list[str] | None, typer.Option(help="Only the columns of a reducer; repeatable.")] = None,
    shard_bytes: Annotated[
        int | None, typer.Option(help="For parquet and datasets: about how many bytes a file of the folder has.")
    ] = None,
) -> None:
    """Write a store to one file, or a folder of files, that other programs read.

    \b
    Examples:
        activation-extractor export out --to parquet --out out.parquet
        activation-extractor export out --to parquet --out parts --shard-bytes 500000000
        activation-extractor export out --to datasets --out cache
        activation-extractor export out --to h5ad --out out.h5ad --reduce mean
        activation-extractor export out --to npy --out arrays
    """
    from activation_extractor._display import human_bytes
    from activation_extractor.store import _export, open_store

    opened = open_store(store)
    keys = None if layers is None and reduce is None else _chosen(opened, layers, reduce)
    done = _export.export(opened, out, to, keys=keys, shard_bytes=shard_bytes)
    say(f"Wrote {str(done.path)!r}, {human_bytes(done.nbytes)} ({done.nbytes:,} bytes). Open it with:")
    say(f"    {done.opened_with}")


def _chosen(store: Store, layers: Sequence[str] | None, reducers: Sequence[str] | None) -> list[tuple[str, str]]:
    """The columns of some layers and reducers, each of which must be there."""
    from activation_extractor._display import examples
    from activation_extractor.layers._patterns import glob

    fits = {pattern: [name for name in store.names if glob(pattern).fullmatch(name)] for pattern in layers or ()}
    for option, asked, known in (
        ("--layers", [pattern for pattern, names in fits.items() if not names], store.names),
        ("--reduce", [reducer for reducer in reducers or () if reducer not in store.reducers], store.reducers),
    ):
        if asked:
            raise ArgumentError(option, f"select something of the store, as {examples(known)} would", asked[0])
    wanted = {name for names in fits.values() for name in names}
    return [
        (layer, reducer)
        for layer, reducer in store.pairs
        if (layers is None or layer in wanted) and (reducers is None or reducer in reducers)
    ]
