"""The figures."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from activation_extractor._files import replacing
from activation_extractor.errors import ArgumentError, MissingExtraError
from activation_extractor.plots._panels import draw_norms, draw_projection, draw_similarity
from activation_extractor.store import Column, Store

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def projection(column: Column, labels: Any = None, *, max_rows: int = 5000) -> Figure:
    """The rows of a column as points on their first two principal components.

    Rows that are ``(positions, *features)`` are averaged over their positions; rows with NaN or infinity are left out
    and counted in the subtitle.

    Args:
        column: a column of a store.
        labels: strings or numbers that colour the points, one for each row of the store: the most frequent labels in
            a colour each and the others grey, or a scale for numbers of many values. None leaves a point grey.
        max_rows: of more rows than this so many are drawn, taken evenly.

    Raises:
        ArgumentError: labels for another number of rows, or fewer than 2 rows to draw.
        MissingExtraError: matplotlib is not installed.
        StoreError: a shard is damaged.

    Example:
        >>> import tempfile, torch
        >>> from torch import nn
        >>> from activation_extractor import extract, plots
        >>> batches = [torch.randn(20, 4)]
        >>> store = extract(nn.Sequential(nn.Linear(4, 8)), batches, "0", out=tempfile.mkdtemp(), progress=False)
        >>> figure = plots.projection(store["0"], labels=["even", "odd"] * 10)
        >>> figure.axes[0].get_title(loc="left")
        '0 · full'
    """
    figure = _figure(6.4, 4.8)
    draw_projection(figure.subplots(), column, _row_labels(column, labels), max_rows)
    return figure


def norms(store: Store, reducer: str | None = None, *, max_rows: int = 5000) -> Figure:
    """The L2 norms of the rows of each layer: median, quartiles, and the range of nine in ten.

    Where rows are ``(positions, *features)`` the norms are those of positions. The axis is logarithmic when the norms
    differ by more than a factor of 100.

    Args:
        store: a store.
        reducer: whose columns; by default the only one, else ``"mean"``, else the first whose rows are of one length.
        max_rows: of more rows than this so many are read, taken evenly.

    Raises:
        ActivationNotFoundError: there is no such reducer, or no layer.
        MissingExtraError: matplotlib is not installed.
        StoreError: a shard is damaged.

    Example:
        >>> import tempfile, torch
        >>> from torch import nn
        >>> from activation_extractor import extract, plots
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 8))
        >>> store = extract(model, [torch.randn(20, 4)], ["0", "1"], out=tempfile.mkdtemp(), progress=False)
        >>> plots.norms(store).axes[0].get_ylabel()
        'L2 norm of a row'
    """
    columns = _columns(store, reducer)
    figure = _figure(min(12.0, 4.8 + 0.2 * len(columns)), 4.0)
    draw_norms(figure.subplots(), columns, max_rows)
    return figure


def similarity(store: Store, reducer: str | None = None, *, max_rows: int = 1000) -> Figure:
    """The linear CKA of each pair of layers, a number between 0 and 1.

    ``||Y'X||² / (||X'X|| ||Y'Y||)`` for X and Y with each feature's mean taken off, over the same rows of all layers
    (Kornblith, Norouzi, Lee, Hinton: Similarity of Neural Network Representations Revisited, ICML 2019). With fewer
    rows than features the values are biased upward; the subtitle then says so.

    Args:
        store: a store.
        reducer: as for `norms`.
        max_rows: of more rows than this so many are read, taken evenly.

    Raises:
        ActivationNotFoundError: there is no such reducer, or no layer.
        ArgumentError: the layers share fewer than 3 rows.
        MissingExtraError: matplotlib is not installed.
        StoreError: a shard is damaged.

    Example:
        >>> import tempfile, torch
        >>> from torch import nn
        >>> from activation_extractor import extract, plots
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2))
        >>> store = extract(model, [torch.randn(20, 4)], ["0", "1"], out=tempfile.mkdtemp(), progress=False)
        >>> plots.similarity(store).axes[0].texts[1].get_text()
        '1.00'
    """
    columns = _columns(store, reducer)
    side = min(8.0, 3.6 + 0.22 * len(columns))
    figure = _figure(side + 1.2, side)
    draw_similarity(figure.subplots(), columns, max_rows)
    return figure


def overview(store: Store, labels: Any = None, reducer: str | None = None) -> Figure:
    """All of a store at a glance: `projection` of its last layer, `norms`, and `similarity` where layers are several.

    Args:
        store: a store.
        labels: as for `projection`.
        reducer: as for `norms`.

    Raises:
        ActivationNotFoundError: there is no such reducer, or no layer.
        ArgumentError: labels for another number of rows, or too few rows to draw.
        MissingExtraError: matplotlib is not installed.
        StoreError: a shard is damaged.

    Example:
        >>> import tempfile, torch
        >>> from torch import nn
        >>> from activation_extractor import extract, plots
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2))
        >>> store = extract(model, [torch.randn(20, 4)], ["0", "1"], out=tempfile.mkdtemp(), progress=False)
        >>> figure = plots.overview(store)
        >>> plots.save_plot(figure, f"{tempfile.mkdtemp()}/store.png")
    """
    columns = _columns(store, reducer)
    has_pairs = len(columns) > 1
    figure = _figure(11.5, 8.6 if has_pairs else 4.4)
    panels = [["points", "pairs"], ["norms", "norms"]] if has_pairs else [["points", "norms"]]
    axes: dict[str, Axes] = figure.subplot_mosaic(panels, height_ratios=[1.45, 1] if has_pairs else [1])
    draw_projection(axes["points"], columns[-1], _row_labels(columns[-1], labels, store.rows), 5000)
    draw_norms(axes["norms"], columns, 5000)
    if has_pairs:
        draw_similarity(axes["pairs"], columns, 1000)
    return figure


def save_plot(figure: Figure, path: str | os.PathLike[str]) -> None:
    """Write a figure to a file, which appears whole or not at all and takes the place of what was there.

    Args:
        figure: what another function here returned.
        path: ends in ``.png`` (200 dots per inch) or ``.svg`` (the same bytes for the same figure).

    Raises:
        ArgumentError: another suffix.
        StoreError: the file cannot be written.

    Example:
        >>> import tempfile
        >>> from matplotlib.figure import Figure
        >>> from activation_extractor import plots
        >>> plots.save_plot(Figure(), f"{tempfile.mkdtemp()}/empty.svg")
    """
    path = Path(path)
    check_suffix(path)
    from matplotlib import rc_context

    kind = path.suffix.lower()[1:]
    with replacing(path) as file, rc_context({"svg.hashsalt": "activation_extractor"}):
        figure.savefig(file, format=kind, dpi=200, metadata={"Date": None} if kind == "svg" else None)


def check_suffix(path: Path) -> None:
    """See that a picture can be written under this name, before it is drawn.

    Raises:
        ArgumentError: its suffix is of no known format.
    """
    if path.suffix.lower() not in (".png", ".svg"):
        raise ArgumentError("The file of a picture", "end in .png or .svg", str(path), "Give it one of these suffixes.")


def column_of(store: Store, layer: str | None, reducer: str | None) -> Column:
    """The column of a layer, by default the last one, and of a reducer, by default as for `norms`.

    Raises:
        ActivationNotFoundError: there is none.
    """
    columns = _columns(store, reducer)
    return columns[-1] if layer is None else store[layer, columns[0].name[1]]


def _figure(width: float, height: float) -> Figure:
    try:
        from activation_extractor.plots._notebook_figure import NotebookFigure
    except ImportError:
        raise MissingExtraError("A plot", "plot", "matplotlib") from None
    return NotebookFigure(figsize=(width, height), layout="constrained")


def _columns(store: Store, reducer: str | None) -> list[Column]:
    """The columns of one reducer, in the order of the layers."""
    if not store.names:
        advice = "Extract activations into it first."
        raise ArgumentError("A store", "hold a layer to be drawn", str(store.path), advice)
    names, wanted = store.names, reducer
    if wanted is None and "mean" in store.reducers:
        wanted = "mean"
    if wanted is None:
        firsts = {name: next(layer for layer in names if (layer, name) in store) for name in store.reducers}
        even = (name for name, layer in firsts.items() if not store[layer, name].is_ragged)
        wanted = next(even, store.reducers[0])
    columns = [store[layer, wanted] for layer in names if (layer, wanted) in store]
    return columns or [store[names[0], wanted]]  # raises ActivationNotFoundError: the store has no such reducer


def _row_labels(column: Column, labels: Any, rows: int | None = None) -> list[Any] | None:
    """The label of each row of a column, None where it is missing.

    `rows` is the number of rows of the store; where it is None, labels may also be those of the column's rows alone.
    """
    if labels is None:
        return None
    listed, numbers = labels.numpy() if isinstance(labels, Column) else labels, column.rows.tolist()
    values = listed.tolist() if hasattr(listed, "tolist") else list(listed)
    for value in values:
        if not isinstance(value, str | int | float | None):
            raise ArgumentError("labels", "be a string or a number for each row", value)
    values = [None if value != value else value for value in values]
    if rows is None and len(values) == len(numbers):
        return values
    least = max(numbers, default=-1) + 1
    if not (len(values) == rows if rows is not None else len(numbers) < least <= len(values)):
        raise ArgumentError("labels", f"have a value for each of {rows or least} rows", len(values))
    return [values[row] for row in numbers]
