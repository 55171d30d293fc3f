"""Pictures of a store: rows as points, norms by layer, layers beside each other; needs the extra ``plot``.

Each function returns a ``matplotlib.figure.Figure`` of its own: nothing is shown and no global state is touched.
"""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from activation_extractor import _similarity
from activation_extractor._files import replacing
from activation_extractor.errors import ArgumentError, MissingExtraError
from activation_extractor.store import Column, Store

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["norms", "overview", "projection", "save_plot", "similarity"]

# Paul Tol's "muted" scheme: told apart with every kind of colour vision; its pale grey is for what has no colour.
_COLORS = ("#CC6677", "#332288", "#DDCC77", "#117733", "#88CCEE", "#882255", "#44AA99", "#999933", "#AA4499")
_GREY, _DARK = "#BBBBBB", "#555555"
_MOST_CLASSES = 10  # integers of more values than this are a scale
_LONGEST = 46  # characters of a name in a title
_MOST_TICKS = 30
_MOST_NUMBERED = 12  # layers whose values are written into the cells
_LOG_RANGE = 100.0
_SHARES = torch.tensor([0.05, 0.25, 0.5, 0.75, 0.95], dtype=torch.float64)


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
    _draw_projection(figure.subplots(), column, _row_labels(column, labels), max_rows)
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
    _draw_norms(figure.subplots(), columns, max_rows)
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
    _draw_similarity(figure.subplots(), columns, max_rows)
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
    _draw_projection(axes["points"], columns[-1], _row_labels(columns[-1], labels, store.rows), 5000)
    _draw_norms(axes["norms"], columns, 5000)
    if has_pairs:
        _draw_similarity(axes["pairs"], columns, 1000)
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
        from matplotlib.figure import Figure
    except ImportError:
        raise MissingExtraError("Plots", "plot", "matplotlib") from None
    return Figure(figsize=(width, height), layout="constrained")


def _columns(store: Store, reducer: str | None) -> list[Column]:
    """The columns of one reducer, in the order of the layers."""
    if not store.names:
        raise ArgumentError(
            "A store", "hold a layer to be drawn", str(store.path), "Extract activations into it first."
        )
    names, wanted = store.names, reducer
    if wanted is None and "mean" in store.reducers:
        wanted = "mean"
    if wanted is None:
        firsts = [(one, next(name for name in names if (name, one) in store)) for one in store.reducers]
        wanted = next((one for one, name in firsts if not store[name, one].is_ragged), store.reducers[0])
    there = [store[name, wanted] for name in names if (name, wanted) in store]
    return there or [store[names[0], wanted]]  # raises: nothing is there under this reducer


def _draw_projection(axes: Axes, column: Column, labels: list[Any] | None, max_rows: int) -> None:
    (indices,), total = _similarity.common_rows([column], max_rows)
    rows = _similarity.read_rows(column, indices)
    is_finite = rows.isfinite().all(1)
    scores, shares = _similarity.principal_components(_enough(rows[is_finite], 2, f"{column.name!r}"))
    subtitle = [_count(len(rows), total), _left_out(is_finite)]
    subtitle += ["mean over positions"] if _similarity.has_positions(column) else []
    subtitle += [] if shares.any() else ["all alike"]
    _frame(axes, _title(column), subtitle)
    axes.set_xlabel(f"PC 1 ({shares[0]:.1%} of variance)".replace("%", " %"))
    axes.set_ylabel(f"PC 2 ({shares[1]:.1%} of variance)".replace("%", " %"))
    axes.set_aspect("equal", adjustable="datalim")
    taken = None if labels is None else [labels[row] for row in indices[is_finite].tolist()]
    _draw_points(axes, scores, taken)


def _draw_points(axes: Axes, scores: Tensor, labels: list[Any] | None) -> None:
    look: Any = {"s": max(5.0, min(22.0, 9000 / len(scores))), "alpha": 0.8, "linewidths": 0}
    if labels is None:
        axes.scatter(*scores.T.numpy(), color=_COLORS[1], **look)
    elif _is_scale(labels):
        values = torch.tensor([float("nan") if one is None else float(one) for one in labels], dtype=torch.float64)
        has_value = values.isfinite()
        axes.scatter(*scores[~has_value].T.numpy(), color=_GREY, **look)
        x, y = scores[has_value].T.numpy()
        points = axes.scatter(x, y, c=values[has_value].numpy(), cmap="viridis", **look)
        _add_scale(axes, points, "label")
    else:
        _draw_classes(axes, scores, labels, look)


def _draw_classes(axes: Axes, scores: Tensor, labels: list[Any], look: dict[str, Any]) -> None:
    frequent = [label for label, _ in Counter(one for one in labels if one is not None).most_common(len(_COLORS))]
    places = [frequent.index(one) if one in frequent else -1 for one in labels]
    shown = torch.tensor(places)
    for place, color in [(-1, _GREY), *enumerate(_COLORS[: len(frequent)])]:
        if (shown == place).any():
            axes.scatter(*scores[shown == place].T.numpy(), color=color, label=str(place), **look)
    handles = axes.collections[1:] + axes.collections[:1] if -1 in places else list(axes.collections)
    names = [_short(str(label)) for label in frequent] + (["others"] if -1 in places else [])
    counts = [places.count(place) for place in [*range(len(frequent)), -1]]
    legend = axes.legend(handles, map(str, range(len(names))), loc="upper left", bbox_to_anchor=(1.01, 1), fontsize=8)
    for handle in legend.legend_handles:
        if handle is not None:
            handle.set(sizes=[28.0])
    legend.get_title().set(text="label (rows)", fontsize=8)
    legend.set_frame_on(False)
    for text, name, count in zip(legend.get_texts(), names, counts, strict=False):
        text.set(text=f"{name} ({count:,})", parse_math=False)


def _draw_norms(axes: Axes, columns: Sequence[Column], max_rows: int) -> None:
    quantiles, left_out, counts = [], 0, []
    for column in columns:
        (indices,), total = _similarity.common_rows([column], max_rows)
        found = _similarity.read_norms(column, indices)
        finite = found[found.isfinite()]
        left_out += len(found) - len(finite)
        counts.append(_count(len(indices), total))
        quantiles.append(finite.quantile(_SHARES) if len(finite) else torch.full((5,), torch.nan, dtype=torch.float64))
    low, first, middle, third, high = torch.stack(quantiles).T.numpy()
    what = "position" if any(map(_similarity.has_positions, columns)) else "row"
    note = f"{left_out:,} with NaN or infinity left out" if left_out else ""
    _frame(axes, f"Norms by layer · {columns[0].name[1]}", [counts[0] if len(set(counts)) == 1 else "", note])
    places = range(len(columns))
    axes.vlines(places, low, high, color=_COLORS[4], linewidth=1.5, label="5 to 95 %")
    axes.vlines(places, first, third, color=_COLORS[1], linewidth=5, label="25 to 75 %")
    axes.plot(places, middle, "o", color="white", markeredgecolor=_COLORS[1], markersize=5, label="median")
    drawn = torch.stack(quantiles)
    drawn = drawn[drawn > 0]
    if len(drawn) and drawn.max() > _LOG_RANGE * drawn.min():
        axes.set_yscale("log")
    axes.set_xlim(-0.7, len(columns) - 0.3)
    axes.set_ylabel(f"L2 norm of a {what}")
    _name_layers(axes.xaxis, [column.name[0] for column in columns])
    axes.grid(visible=False, axis="x")
    look = {"columnspacing": 1.2, "handlelength": 1.2, "handletextpad": 0.5, "borderpad": 0, "borderaxespad": 2.2}
    axes.legend(loc="lower right", bbox_to_anchor=(1.06, 1), ncols=3, frameon=False, fontsize=8, **look)


def _draw_similarity(axes: Axes, columns: Sequence[Column], max_rows: int) -> None:
    indices, total = _similarity.common_rows(columns, max_rows)
    layers = [_similarity.read_rows(column, taken) for column, taken in zip(columns, indices, strict=True)]
    is_finite = torch.stack([rows.isfinite().all(1) for rows in layers]).all(0)
    values = _similarity.cka_matrix([_enough(rows[is_finite], 3, "The layers") for rows in layers])
    is_biased = int(is_finite.sum()) < max(rows.shape[1] for rows in layers)
    notes = [_count(len(is_finite), total), _left_out(is_finite)]
    notes += ["mean over positions"] if any(map(_similarity.has_positions, columns)) else []
    notes += ["fewer rows than features: biased upward"] if is_biased else []
    notes += ["constant layers are grey"] if values.isnan().any() else []
    _frame(axes, f"Similarity of layers · {columns[0].name[1]}", notes)
    axes.grid(visible=False)
    axes.set_facecolor("#DDDDDD")
    image = axes.imshow(values.numpy(), vmin=0, vmax=1, cmap="viridis", origin="lower")
    _add_scale(axes, image, "linear CKA")
    names = [column.name[0] for column in columns]
    _name_layers(axes.xaxis, names)
    _name_layers(axes.yaxis, names)
    if len(columns) <= _MOST_NUMBERED:
        for (y, x), value in ((divmod(place, len(names)), float(one)) for place, one in enumerate(values.flatten())):
            text = "-" if value != value else f"{value:.2f}"
            axes.text(x, y, text, ha="center", va="center", fontsize=7, color="white" if value < 0.6 else "black")


def _frame(axes: Axes, title: str, notes: Sequence[str]) -> None:
    """What all panels have: a title, notes below it, a thin grid behind the data."""
    subtitle = "; ".join(note for note in notes if note)
    axes.set_title(title, loc="left", fontsize=10, pad=18 if subtitle else 6, parse_math=False)
    where: dict[str, Any] = {"xycoords": "axes fraction", "xytext": (0, 5), "textcoords": "offset points"}
    axes.annotate(subtitle, (0, 1), **where, fontsize=8, color=_DARK, va="bottom")
    axes.grid(linewidth=0.4, color="#DDDDDD")
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=8, width=0.5, length=3)
    axes.xaxis.label.set_fontsize(9)
    axes.yaxis.label.set_fontsize(9)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_linewidth(0.5)


def _add_scale(axes: Axes, drawn: Any, label: str) -> None:
    """A colourbar at the very side of the panel."""
    bar = axes.figure.colorbar(drawn, cax=axes.inset_axes((1.03, 0, 0.035, 1)))
    bar.set_label(label, fontsize=9)
    bar.ax.tick_params(labelsize=8, width=0.5, length=3)
    bar.outline.set_linewidth(0.5)


def _name_layers(axis: Any, names: Sequence[str]) -> None:
    """Name the ticks of an axis after layers: what they share is said once, and of many every so many are named."""
    shared, own = _split_names(names)
    every = -(-len(own) // _MOST_TICKS)
    is_slanted = axis.axis_name == "x" and max(map(len, own)) > (3 if len(own) > 12 else 5)
    look = {"rotation": 45, "ha": "right", "rotation_mode": "anchor"} if is_slanted else {}
    axis.set_ticks(range(0, len(own), every), list(map(_short, own[::every])), parse_math=False, **look)
    axis.set_label_text(f"layer ({_short(shared, _LONGEST)})" if shared else "layer", parse_math=False)


def _split_names(names: Sequence[str]) -> tuple[str, list[str]]:
    """What names have in common, with a ``*`` for what they have not, and the latter; cut at dots."""
    parts = [name.split(".") for name in names]
    spare = min(map(len, parts)) - 1 if len(parts) > 1 else 0
    head = next((at for at in range(spare) if len({one[at] for one in parts}) > 1), spare)
    tail = next((at for at in range(spare - head) if len({one[-1 - at] for one in parts}) > 1), spare - head)
    own = [".".join(one[head : len(one) - tail]) for one in parts]
    return ".".join([*parts[0][:head], "*", *parts[0][len(parts[0]) - tail :]]) if head or tail else "", own


def _row_labels(column: Column, labels: Any, rows: int | None = None) -> list[Any] | None:
    """The labels of a column's rows; given are those of the store's rows, of which there may be more."""
    if labels is None:
        return None
    values, numbers = _as_list(labels), column.rows.tolist()
    if rows is None and len(values) == len(numbers):
        return values
    least = max(numbers, default=-1) + 1
    fits = len(values) == rows if rows is not None else len(numbers) < least <= len(values)
    if not fits:
        condition = f"have a value for each of {rows or least} rows"
        raise ArgumentError("labels", condition, len(values))
    return [values[row] for row in numbers]


def _as_list(labels: Any) -> list[Any]:
    """Labels as strings, numbers, and None for those that are missing."""
    listed = labels.numpy() if isinstance(labels, Column) else labels
    values = listed.tolist() if hasattr(listed, "tolist") else list(listed)
    strange = next((one for one in values if not (one is None or isinstance(one, str | int | float))), None)
    if strange is not None:
        raise ArgumentError("labels", "be a string or a number for each row", strange)
    return [None if one != one else one for one in values]


def _is_scale(labels: Sequence[Any]) -> bool:
    """Whether labels are numbers that measure something, rather than names of classes."""
    values = {one for one in labels if one is not None}
    is_number = all(type(one) in (int, float) for one in values)
    return is_number and (len(values) > _MOST_CLASSES or any(one != int(one) for one in values if math.isfinite(one)))


def _enough(rows: Tensor, least: int, what: str) -> Tensor:
    if len(rows) < least:
        raise ArgumentError(what, f"have at least {least} rows of finite numbers to be drawn", len(rows))
    return rows


def _title(column: Column) -> str:
    parts = column.name if isinstance(column.name, tuple) else (column.name,)
    return " · ".join(_short(part, _LONGEST) for part in parts)


def _count(taken: int, total: int) -> str:
    return f"{total:,} rows" if taken == total else f"{taken:,} of {total:,} rows"


def _left_out(is_finite: Tensor) -> str:
    count = int((~is_finite).sum())
    return f"{count:,} with NaN or infinity left out" if count else ""


def _short(name: str, longest: int = 30) -> str:
    """A name on one line, the middle of a long one left out."""
    name = " ".join(name.split())
    half = longest // 2
    return name if len(name) <= longest else f"{name[:half]}…{name[1 - half :]}"
