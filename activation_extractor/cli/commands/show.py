"""``activation-extractor show``."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from activation_extractor._display import printable
from activation_extractor.cli._terminal import say, say_json

if TYPE_CHECKING:
    from activation_extractor.store import Store

_FIRST_IDS = 3
_OPTIONS = ("mask", "sequence_axis", "calls")  # of a run, in the manifest's fingerprint
_NUMBERS = ("rows", "mean_norm", "variance", "dead_features", "features", "nan_count", "inf_count")
_MOST_WIDTH = 60  # of a value in the head


def show(
    store: Annotated[Path, typer.Argument(help="The folder of a store.", show_default=False)],
    stats: Annotated[bool, typer.Option("--stats", help="Read it all, and tell what the numbers are like.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object, for a script.")] = False,
) -> None:
    """Show what a store holds: its columns, and what run they are of.

    With --stats each column also has the mean Euclidean norm of its rows, the mean variance of its features, how many
    features have the same value in every row (dead), and how many values are NaN or infinite.

    \b
    Examples:
        activation-extractor show out
        activation-extractor show out --stats
        activation-extractor show out --json | jq .rows
    """
    from activation_extractor.store import open_store

    found = _about(open_store(store), stats)
    if as_json:
        say_json(found)
    else:
        say("\n".join(_lines(found)))


def _about(store: Store, stats: bool) -> dict[str, Any]:
    """What there is to say of a store, as JSON has it."""
    manifest = store.manifest
    fingerprint = manifest["fingerprint"]
    units, first_ids = _units(store)
    return {
        "path": str(store.path),
        "model": manifest.get("model"),
        "rows": store.rows,
        "format": manifest["codec"],
        "units": units,
        "bytes": store.nbytes,
        "ids": manifest["ids"],
        "first_ids": first_ids,
        "reducers": store.reducers,
        "options": {name: fingerprint[name] for name in _OPTIONS if name in fingerprint},
        "versions": manifest.get("versions", {}),
        "columns": [
            {"layer": layer, "reducer": reducer, **_column(store[layer, reducer], stats)}
            for layer, reducer in store.pairs
        ],
        "keep": [{"name": name, **_column(column, stats)} for name, column in store.keep.items()],
    }


def _units(store: Store) -> tuple[int, list[Any]]:
    """How many units there are, and the first ids: from one shard, where `store.ids` would open all of them."""
    from activation_extractor._format._manifest import Manifest, store_name
    from activation_extractor._format._reader import Reader
    from activation_extractor._format._shards import list_units, shard_path

    manifest = Manifest.from_json(store.manifest)
    units = list_units(store.path, manifest.codec)
    if not units:
        return 0, []
    reader = Reader(manifest.codec, store_name(manifest.fingerprint))
    ids = reader.ids(str(shard_path(store.path, units[0], manifest.codec))) or []
    return len(units), ids[:_FIRST_IDS]


def _column(column: Any, stats: bool) -> dict[str, Any]:
    """A column's form, and its statistics where they are asked for and it holds real numbers."""
    from dataclasses import asdict

    from activation_extractor.store import statistics

    if not hasattr(column, "dtype"):
        return {"row_shape": [], "dtype": "text", "rows": len(column), "ragged": False}
    about = {
        "row_shape": list(column.row_shape),
        "dtype": str(column.dtype).removeprefix("torch."),
        "rows": len(column),
        "ragged": column.is_ragged,
    }
    if stats and not column.dtype.is_complex:
        numbers = asdict(statistics(column))
        # JSON has no NaN and no infinity.
        about["statistics"] = {name: one if math.isfinite(one) else None for name, one in numbers.items()}
    return about


def _lines(found: Mapping[str, Any]) -> Iterator[str]:
    yield from _aligned([(f"{name}:", value) for name, value in _head(found)], "<<")
    for title, columns in (("columns", found["columns"]), ("kept columns", found["keep"])):
        if columns:
            yield ""
            yield f"{len(columns)} {title if len(columns) > 1 else title.removesuffix('s')}"
            yield from _table(columns)


def _head(found: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    from activation_extractor._display import human_bytes

    yield "store", found["path"]
    yield "model", str(found["model"])
    yield "rows", f"{found['rows']:,}"
    yield "format", f"{found['format']}, {found['units']:,} {'unit' if found['units'] == 1 else 'units'}"
    yield "size", f"{human_bytes(found['bytes'])} ({found['bytes']:,} bytes)"
    ids = [repr(one) for one in found["first_ids"]]
    more = ["..."] if len(ids) < found["rows"] else []
    yield "ids", f"{found['ids']}: {', '.join(ids + more)}" if ids else "none, rows are numbered"
    yield "reducers", ", ".join(found["reducers"])
    for name, value in found["options"].items():
        yield name.replace("_", " "), "none" if value is None else str(value)
    yield "versions", ", ".join(f"{name} {version}" for name, version in found["versions"].items())


def _table(columns: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """A line for each column below one with what stands in it."""
    names = [name for name in ("layer", "reducer", "name") if name in columns[0]]
    heads, sides = [*names, "row shape", "dtype", "rows"], "<" * len(names) + "<<>"
    rows = [[*(one[name] for name in names), _shape(one), one["dtype"], f"{one['rows']:,}"] for one in columns]
    if any("statistics" in one for one in columns):
        heads, sides = [*heads, "mean norm", "variance", "dead", "features", "NaN", "inf"], sides + ">>>>>>"
        rows = [[*row, *_numbers(one.get("statistics"))] for row, one in zip(rows, columns, strict=True)]
    yield from _aligned([heads, *rows], sides)


def _shape(column: Mapping[str, Any]) -> str:
    sizes = ["positions"] * column["ragged"] + [str(size) for size in column["row_shape"]]
    return " x ".join(sizes) or "-"


def _numbers(found: Mapping[str, Any] | None) -> list[str]:
    if found is None:
        return ["-"] * (len(_NUMBERS) - 1)
    return ["-" if found[name] is None else _number(found[name]) for name in _NUMBERS[1:]]


def _number(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def _aligned(rows: Sequence[Sequence[str]], sides: str) -> list[str]:
    """Lines of cells, which are left as they are rather than fitted to a terminal: they can be piped and searched."""
    from activation_extractor._display import aligned

    return aligned([[printable(cell) for cell in row] for row in rows], sides)
