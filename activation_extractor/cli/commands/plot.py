"""``activation-extractor plot``."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn

import typer

from activation_extractor._display import examples
from activation_extractor.cli._terminal import say
from activation_extractor.errors import ArgumentError

if TYPE_CHECKING:
    from activation_extractor.store import Store

_SUFFIXES = (".jsonl", ".csv")


def plot(
    store: Annotated[Path, typer.Argument(help="The folder of a store.", metavar="STORE")],
    out: Annotated[Path, typer.Option(help="The picture to write, .png or .svg; an older one is replaced.")],
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
    from activation_extractor.plots._figures import check_suffix, column_of
    from activation_extractor.store import open_store

    check_suffix(out)
    if kind in ("norms", "similarity") and (layers is not None or labels is not None):
        option = "--layers" if layers is not None else "--labels"
        raise ArgumentError(option, "go with --kind projection", f"--kind {kind}", "Leave one of them out.")
    if label_ids is not None and _file_and_column(labels or "") is None:
        raise ArgumentError("--label-ids", "go with --labels FILE:COLUMN", labels, "Name the file of the labels.")
    opened = open_store(store)
    values = None if labels is None else _labels(opened, labels, label_ids)
    content = f"{len(opened.names)} layers and {opened.rows:,} rows"
    if kind == "norms":
        figure, content = plots.norms(opened, reduce), f"norms of {content}"
    elif kind == "similarity":
        figure, content = plots.similarity(opened, reduce), f"similarity of {content}"
    elif kind is None and layers is None:
        figure, content = plots.overview(opened, values, reduce), f"projection, norms and similarity of {content}"
    else:
        column = column_of(opened, layers, reduce)
        figure = plots.projection(column, None if values is None else [values[row] for row in column.rows.tolist()])
        content = f"{opened.rows:,} rows of layer {layers or opened.names[-1]!r}"
    plots.save_plot(figure, out)
    say(f"Wrote {out}: {content} of {store}")


def _labels(store: Store, name: str, ids_name: str | None) -> list[Any]:
    """The label of each row of a store, None where there is none."""
    if name in store.keep and ids_name is None:
        column = store.keep[name]
        kept = column.numpy().tolist() if hasattr(column, "torch") else list(column)
        label_of = dict(zip(column.rows.tolist(), kept, strict=True))
        return [label_of.get(row) for row in range(store.rows)]
    source = _file_and_column(name)
    if source is None:
        _no_column("--labels", name, list(store.keep), "a kept column of the store, or FILE.jsonl:COLUMN")
    path, column_name = source
    records = _read(path)
    labels = _column(records, column_name, "--labels", path)
    if path.suffix == ".csv":
        from activation_extractor.cli.inputs._columns import as_numbers

        labels = as_numbers(labels)
    if ids_name is not None:
        return _by_id(store, labels, _column(records, ids_name, "--label-ids", path))
    if len(labels) != store.rows:
        condition = f"have {store.rows} rows, as the store has"
        raise ArgumentError(str(path), condition, len(labels), "Name its column of row ids with --label-ids.")
    return labels


def _by_id(store: Store, labels: Sequence[Any], ids: Sequence[Any]) -> list[Any]:
    label_of = dict(zip(map(str, ids), labels, strict=True))
    if len(label_of) < len(ids):
        got = f"{len(ids)} rows, {len(label_of)} ids"
        raise ArgumentError("--label-ids", "name a column that holds each id once", got)
    missing = [row_id for row_id in store.ids if str(row_id) not in label_of]
    if missing:
        condition = "name a column that holds the id of every row of the store"
        raise ArgumentError("--label-ids", condition, f"none of {examples(missing)}")
    return [label_of[str(row_id)] for row_id in store.ids]


def _file_and_column(labels: str) -> tuple[Path, str] | None:
    """What ``FILE:COLUMN`` names."""
    for suffix in _SUFFIXES:
        head, mark, column = labels.rpartition(f"{suffix}:")
        if mark:
            return Path(head + suffix), column
    return None


def _read(path: Path) -> list[dict[str, Any]]:
    """The rows of a file."""
    try:
        text = path.read_text(encoding="utf-8-sig")
        if path.suffix == ".csv":
            return list(csv.DictReader(io.StringIO(text, newline="")))
        rows = [json.loads(line) for line in text.split("\n") if line.strip()]
        if not all(isinstance(row, dict) for row in rows):
            raise ValueError("a line that is no object")
        return rows
    except (OSError, ValueError) as error:
        got = getattr(error, "strerror", None) or str(error)
        raise ArgumentError("The file of --labels", f"be rows of {path.suffix[1:]}", f"{path}: {got}") from error


def _column(records: Sequence[dict[str, Any]], name: str, option: str, path: Path) -> list[Any]:
    """A column of a file, None where a cell is empty."""
    names = list(dict.fromkeys(key for record in records for key in record if key is not None))
    if name not in names:
        _no_column(option, name, names, f"a column of {path}")
    return [None if record.get(name) == "" else record.get(name) for record in records]


def _no_column(option: str, name: str, names: Sequence[str], what: str) -> NoReturn:
    advice = f"There is {', '.join(map(repr, names))}." if names else "There is none."
    raise ArgumentError(option, f"name {what}", name, advice)
