"""``activation-extractor plot``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from activation_extractor.cli._terminal import say

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from activation_extractor.store import Store

_SUFFIXES = (".jsonl", ".csv")


def plot(
    store: Annotated[Path, typer.Argument(help="The folder of a store.", metavar="STORE")],
    out: Annotated[Path, typer.Option(help="The picture to write, .png or .svg; takes the place of one there.")],
    kind: Annotated[
        Literal["projection", "norms", "similarity"] | None,
        typer.Option(help="One picture alone; by default all three, or the projection where --layers is given."),
    ] = None,
    layers: Annotated[
        str | None, typer.Option(help="The layer to project; by default the last one.", metavar="NAME")
    ] = None,
    reduce: Annotated[
        str | None,
        typer.Option(help="Which reducer's columns; by default the only one, or mean.", metavar="NAME"),
    ] = None,
    labels: Annotated[
        str | None,
        typer.Option(
            help="What colours the points: a kept column, or FILE.jsonl:COLUMN or FILE.csv:COLUMN with a row for each "
            "row of the store.",
            metavar="NAME",
        ),
    ] = None,
    label_ids: Annotated[
        str | None,
        typer.Option(help="The column of that file with row ids, where its rows are others or in another order."),
    ] = None,
) -> None:
    """Draw a store: its rows as points, norms by layer, and how similar layers are.

    Points are rows on the first two principal components of a layer; norms are medians, quartiles and the range of
    nine in ten; similarity is linear CKA. Needs the extra "plot".

    \b
    Examples:
      activation-extractor plot out --out picture.png
      activation-extractor plot out --out picture.png --labels book
      activation-extractor plot out --out layer3.svg --layers encoder.layer.3 --labels verses.jsonl:book
      activation-extractor plot out --out cka.svg --kind similarity --reduce last
    """
    from activation_extractor import plots
    from activation_extractor.plots._figures import check_suffix
    from activation_extractor.store import open_store

    check_suffix(out)
    kind = "projection" if kind is None and layers is not None else kind
    _check_together(kind, layers, labels, label_ids)
    opened = open_store(store)
    values = None if labels is None else _labels(opened, labels, label_ids)
    figure = _figure(opened, kind, layers, reduce, values)
    plots.save_plot(figure, out)
    say(f"Wrote {out}: {_what(opened, kind, layers)} of {store}")


def _figure(store: Store, kind: str | None, layer: str | None, reduce: str | None, labels: list[Any] | None) -> Figure:
    from activation_extractor import plots
    from activation_extractor.plots._figures import column_of

    draw: dict[str, Callable[[Store, str | None], Figure]] = {"norms": plots.norms, "similarity": plots.similarity}
    if kind is None:
        return plots.overview(store, labels, reduce)
    if kind in draw:
        return draw[kind](store, reduce)
    column = column_of(store, layer, reduce)
    own = None if labels is None else [labels[row] for row in column.rows.tolist()]
    return plots.projection(column, own)


def _what(store: Store, kind: str | None, layer: str | None) -> str:
    rows = f"{store.rows:,} rows"
    if kind == "projection":
        return f"{rows} of layer {layer or store.names[-1]!r}"
    what = {None: "projection, norms and similarity", "norms": "norms", "similarity": "similarity"}[kind]
    return f"{what} of {len(store.names)} layers and {rows}"


def _check_together(kind: str | None, layer: str | None, labels: str | None, label_ids: str | None) -> None:
    """See that options are given together that belong together."""
    from activation_extractor.errors import ArgumentError

    if kind in ("norms", "similarity") and (layer is not None or labels is not None):
        option = "--layers" if layer is not None else "--labels"
        raise ArgumentError(option, "go with --kind projection", f"--kind {kind}", "Leave one of them out.")
    if label_ids is not None and _file_of(labels or "") is None:
        raise ArgumentError("--label-ids", "go with --labels FILE:COLUMN", labels, "Name the file of the labels.")


def _labels(store: Store, name: str, ids_name: str | None) -> list[Any]:
    """The label of each row of a store, None where there is none."""
    found = _file_of(name)
    if name in store.keep and ids_name is None:
        return _of_kept(store, store.keep[name])
    if found is None:
        return _no_column("--labels", name, list(store.keep), "a kept column of the store, or FILE.jsonl:COLUMN")
    path, column = found
    records = _read(path)
    values = _of_records(records, column, "--labels", path)
    if ids_name is not None:
        return _by_id(store, values, _of_records(records, ids_name, "--label-ids", path))
    if len(values) != store.rows:
        from activation_extractor.errors import ArgumentError

        condition = f"have {store.rows} rows, as the store has"
        raise ArgumentError(str(path), condition, len(values), "Name its column of row ids with --label-ids.")
    return values


def _of_kept(store: Store, column: Any) -> list[Any]:
    items = column.numpy().tolist() if hasattr(column, "torch") else list(column)
    labels: list[Any] = [None] * store.rows
    for row, item in zip(column.rows.tolist(), items, strict=True):
        labels[row] = item
    return labels


def _by_id(store: Store, values: Sequence[Any], ids: Sequence[Any]) -> list[Any]:
    from activation_extractor._display import examples
    from activation_extractor.errors import ArgumentError

    known = dict(zip(map(str, ids), values, strict=True))
    if len(known) < len(ids):
        raise ArgumentError(
            "--label-ids", "name a column that holds each id once", f"{len(ids)} rows, {len(known)} ids"
        )
    missing = [one for one in store.ids if str(one) not in known]
    if missing:
        text = "name a column that holds the id of every row of the store"
        raise ArgumentError("--label-ids", text, f"none of {examples(missing)}")
    return [known[str(one)] for one in store.ids]


def _file_of(labels: str) -> tuple[Path, str] | None:
    """The file and the column that ``FILE:COLUMN`` names."""
    for suffix in _SUFFIXES:
        head, mark, column = labels.rpartition(f"{suffix}:")
        if mark:
            return Path(head + suffix), column
    return None


def _read(path: Path) -> list[dict[str, Any]]:
    """The rows of a file."""
    from activation_extractor.errors import ArgumentError

    try:
        text = path.read_text(encoding="utf-8-sig")
        return _parsed(text, path.suffix)
    except (OSError, ValueError) as error:
        got = getattr(error, "strerror", None) or str(error)
        raise ArgumentError("The file of --labels", f"be rows of {path.suffix[1:]}", f"{path}: {got}") from error


def _parsed(text: str, suffix: str) -> list[dict[str, Any]]:
    import csv
    import io
    import json

    if suffix == ".csv":
        return list(csv.DictReader(io.StringIO(text, newline="")))
    rows = [json.loads(line) for line in text.split("\n") if line.strip()]
    if not all(isinstance(row, dict) for row in rows):
        raise ValueError("a line that is no object")
    return rows


def _of_records(records: Sequence[dict[str, Any]], name: str, option: str, path: Path) -> list[Any]:
    """A column of a file; numbers where all of a CSV's cells are."""
    names = list(dict.fromkeys(key for record in records for key in record if key is not None))
    if name not in names:
        return _no_column(option, name, names, f"a column of {path}")
    values = [None if record.get(name) == "" else record.get(name) for record in records]
    if path.suffix == ".jsonl" or option != "--labels":
        return values
    for kind in (int, float):
        try:
            return [None if one is None else kind(one) for one in values]
        except ValueError:
            pass
    return values


def _no_column(option: str, name: str, there: Sequence[str], what: str) -> list[Any]:
    from activation_extractor.errors import ArgumentError

    advice = f"There is {', '.join(map(repr, there))}." if there else "There is none."
    raise ArgumentError(option, f"name {what}", name, advice)
