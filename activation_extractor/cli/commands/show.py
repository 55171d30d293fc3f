"""``activation-extractor show``."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import typer

from activation_extractor._display import aligned, dtype_name, examples, human_bytes, plural, printable
from activation_extractor.cli._terminal import say, say_json

_FIRST_IDS = 3
_OPTIONS = ("mask", "sequence_axis", "calls")
_STATISTICS = {  # their heads in the table
    "mean_norm": "mean norm",
    "variance": "variance",
    "dead_features": "dead",
    "features": "features",
    "nan_count": "NaN",
    "inf_count": "inf",
}


def show(
    store: Annotated[Path, typer.Argument(help="The folder of a store.", show_default=False)],
    stats: Annotated[bool, typer.Option("--stats", help="Read it all, and say what the numbers are like.")] = False,
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

    opened = open_store(store, partial=True)
    manifest, shards = opened.manifest, opened.shards
    # Ids of the first shard alone: `opened.ids` would open every shard.
    count = 0 if manifest["ids"] is None or not shards else min(_FIRST_IDS, shards[0].rows)
    content = {
        "path": str(opened.path),
        "model": manifest.get("model"),
        "rows": opened.rows,
        "format": manifest["codec"],
        "units": len(shards),
        "complete": opened.is_complete,
        "missing_units": opened.missing_units,
        "bytes": opened.nbytes,
        "ids": manifest["ids"],
        "first_ids": list(islice(opened.iter_ids(), count)),
        "reducers": opened.reducers,
        "options": {name: _option(opened.fingerprint[name]) for name in _OPTIONS if name in opened.fingerprint},
        "versions": manifest.get("versions", {}),
        "columns": [
            {"layer": layer, "reducer": reducer, **_column(opened[layer, reducer], stats)}
            for layer, reducer in opened.pairs
        ],
        "keep": [{"name": name, **_column(column, stats)} for name, column in opened.keep.items()],
    }
    if as_json:
        say_json(content)
    else:
        say("\n".join(_lines(content)))


def _option(value: Any) -> Any:
    """An option of a run; a mask that is no plain value as a text."""
    if not isinstance(value, Mapping):
        return value
    if "entry" in value:
        return f"{value['entry']} of the batches"
    return str(value.get("function") or value.get("type") or "a callable")


def _column(column: Any, stats: bool) -> dict[str, Any]:
    """A column's form, and its statistics where they are asked for and it holds real numbers."""
    from dataclasses import asdict

    from activation_extractor.store import statistics

    if not hasattr(column, "dtype"):
        return {"row_shape": [], "dtype": "text", "rows": len(column), "ragged": False}
    about = {
        "row_shape": list(column.row_shape),
        "dtype": dtype_name(column.dtype),
        "rows": len(column),
        "ragged": column.is_ragged,
    }
    if stats and not column.dtype.is_complex:
        numbers = asdict(statistics(column))
        # JSON has no NaN and no infinity.
        about["statistics"] = {name: value if math.isfinite(value) else None for name, value in numbers.items()}
    return about


def _lines(content: Mapping[str, Any]) -> Iterator[str]:
    yield from _aligned([(f"{name}:", value) for name, value in _head(content)], "<<")
    for title, columns in (("column", content["columns"]), ("kept column", content["keep"])):
        if columns:
            yield ""
            yield plural(len(columns), title)
            yield from _table(columns)


def _head(content: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    yield "store", content["path"]
    yield "model", str(content["model"])
    yield "rows", f"{content['rows']:,}"
    yield "format", f"{content['format']}, {plural(content['units'], 'unit')}"
    yield "complete", _completeness(content["complete"], content["missing_units"])
    yield "size", f"{human_bytes(content['bytes'])} ({content['bytes']:,} bytes)"
    ids = [repr(row_id) for row_id in content["first_ids"]]
    more = ["..."] if len(ids) < content["rows"] else []
    yield "ids", f"{content['ids']}: {', '.join(ids + more)}" if ids else "none, rows are numbered"
    yield "reducers", ", ".join(content["reducers"])
    for name, value in content["options"].items():
        yield name.replace("_", " "), "none" if value is None else str(value)
    yield "versions", ", ".join(f"{name} {version}" for name, version in content["versions"].items())


def _completeness(is_complete: bool, missing: Sequence[str]) -> str:
    if missing:
        return f"no, {plural(len(missing), 'unit')} missing: {examples(missing)}"
    return "yes" if is_complete else "not known, since no run has said that it came to the end of its data"


def _table(columns: Sequence[Mapping[str, Any]]) -> list[str]:
    """A line for each column below the heads; statistics where one of them has some."""
    names = [name for name in ("layer", "reducer", "name") if name in columns[0]]
    heads, sides = [*names, "row shape", "dtype", "rows"], "<" * len(names) + "<<>"
    rows = []
    for column in columns:
        sizes = ["positions"] * column["ragged"] + [str(size) for size in column["row_shape"]]
        cells = [column[name] for name in names]
        rows.append([*cells, " x ".join(sizes) or "-", column["dtype"], f"{column['rows']:,}"])
    if any("statistics" in column for column in columns):
        heads, sides = [*heads, *_STATISTICS.values()], sides + ">" * len(_STATISTICS)
        for row, column in zip(rows, columns, strict=True):
            numbers = column.get("statistics", {})
            values = [numbers.get(name) for name in _STATISTICS]
            row += [
                "-" if value is None else format(value, "," if isinstance(value, int) else ".4g") for value in values
            ]
    return _aligned([heads, *rows], sides)


def _aligned(rows: Sequence[Sequence[str]], sides: str) -> list[str]:
    """Lines of cells that are not fitted to a terminal, so that they can be piped and searched."""
    return aligned([[printable(cell) for cell in row] for row in rows], sides)
