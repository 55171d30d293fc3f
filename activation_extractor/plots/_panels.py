"""The panels of a figure: each function draws one into axes of matplotlib."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from activation_extractor.errors import ArgumentError
from activation_extractor.plots import _similarity
from activation_extractor.store import Column

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Paul Tol's "muted" scheme, which people with any colour vision can distinguish; grey is for points without a label.
_COLORS = ("#CC6677", "#332288", "#DDCC77", "#117733", "#88CCEE", "#882255", "#44AA99", "#999933", "#AA4499")
_GREY, _DARK = "#BBBBBB", "#555555"
_MOST_CLASSES = 10  # integers of more values than this are a scale
_LONGEST = 46  # characters of a name in a title
_MOST_TICKS = 30
_MOST_NUMBERED = 12  # layers whose values are written into the cells
_SHARES = torch.tensor([0.05, 0.25, 0.5, 0.75, 0.95], dtype=torch.float64)


def draw_projection(axes: Axes, column: Column, labels: list[Any] | None, max_rows: int) -> None:
    (indices,), total = _similarity.common_rows([column], max_rows)
    rows = _similarity.read_rows(column, indices)
    is_finite = rows.isfinite().all(1)
    scores, shares = _similarity.principal_components(_enough(rows[is_finite], 2, f"{column.name!r}"))
    subtitle = [_count(len(rows), total), _left_out(is_finite)]
    subtitle += ["mean over positions"] if _similarity.has_positions(column) else []
    subtitle += [] if shares.any() else ["all alike"]
    names = column.name if isinstance(column.name, tuple) else (column.name,)
    _frame(axes, " · ".join(_short(name, _LONGEST) for name in names), subtitle)
    axes.set_xlabel(f"PC 1 ({shares[0]:.1%} of variance)".replace("%", " %"))
    axes.set_ylabel(f"PC 2 ({shares[1]:.1%} of variance)".replace("%", " %"))
    axes.set_aspect("equal", adjustable="datalim")
    style: Any = {"s": max(5.0, min(22.0, 9000 / len(scores))), "alpha": 0.8, "linewidths": 0}
    if labels is None:
        axes.scatter(*scores.T.numpy(), color=_COLORS[1], **style)
        return
    labels = [labels[row] for row in indices[is_finite].tolist()]
    kinds = {label for label in labels if label is not None}
    is_number = all(type(label) in (int, float) for label in kinds)
    if is_number and (len(kinds) > _MOST_CLASSES or any(math.isfinite(kind) and kind != int(kind) for kind in kinds)):
        _draw_scale(axes, scores, labels, style)
    else:
        _draw_classes(axes, scores, labels, style)


def _draw_scale(axes: Axes, scores: Tensor, labels: list[Any], style: dict[str, Any]) -> None:
    """Points coloured by numbers that measure something."""
    values = torch.tensor([math.nan if label is None else float(label) for label in labels], dtype=torch.float64)
    has_value = values.isfinite()
    axes.scatter(*scores[~has_value].T.numpy(), color=_GREY, **style)
    x, y = scores[has_value].T.numpy()
    points = axes.scatter(x, y, c=values[has_value].numpy(), cmap="viridis", **style)
    _add_colorbar(axes, points, "label")


def _draw_classes(axes: Axes, scores: Tensor, labels: list[Any], style: dict[str, Any]) -> None:
    """Points coloured by names of classes: the most frequent ones have a colour each."""
    named = Counter(label for label in labels if label is not None).most_common(len(_COLORS))
    numbers = {label: number for number, (label, _) in enumerate(named)}
    classes = torch.tensor([numbers.get(label, -1) for label in labels])  # -1: any other label, or none
    for number, color in [(-1, _GREY), *enumerate(_COLORS[: len(named)])]:
        if (classes == number).any():
            axes.scatter(*scores[classes == number].T.numpy(), color=color, label=str(number), **style)
    others = int((classes == -1).sum())
    names = [f"{_short(str(label))} ({count:,})" for label, count in named]
    names += [f"others ({others:,})"] if others else []
    handles = axes.collections[1:] + axes.collections[:1] if others else list(axes.collections)
    legend = axes.legend(handles, map(str, range(len(names))), loc="upper left", bbox_to_anchor=(1.01, 1), fontsize=8)
    for handle in legend.legend_handles:
        if handle is not None:
            handle.set(sizes=[28.0])
    legend.get_title().set(text="label (rows)", fontsize=8)
    legend.set_frame_on(False)
    for text, name in zip(legend.get_texts(), names, strict=False):
        text.set(text=name, parse_math=False)


def draw_norms(axes: Axes, columns: Sequence[Column], max_rows: int) -> None:
    quantiles, left_out, counts = [], 0, []
    for column in columns:
        (indices,), total = _similarity.common_rows([column], max_rows)
        layer_norms = _similarity.read_norms(column, indices)
        finite = layer_norms[layer_norms.isfinite()]
        left_out += len(layer_norms) - len(finite)
        counts.append(_count(len(indices), total))
        quantiles.append(finite.quantile(_SHARES) if len(finite) else torch.full((5,), torch.nan, dtype=torch.float64))
    drawn = torch.stack(quantiles)
    low, first, middle, third, high = drawn.T.numpy()
    what = "position" if any(map(_similarity.has_positions, columns)) else "row"
    note = f"{left_out:,} with NaN or infinity left out" if left_out else ""
    _frame(axes, f"Norms by layer · {columns[0].name[1]}", [counts[0] if len(set(counts)) == 1 else "", note])
    places = range(len(columns))
    axes.vlines(places, low, high, color=_COLORS[4], linewidth=1.5, label="5 to 95 %")
    axes.vlines(places, first, third, color=_COLORS[1], linewidth=5, label="25 to 75 %")
    axes.plot(places, middle, "o", color="white", markeredgecolor=_COLORS[1], markersize=5, label="median")
    drawn = drawn[drawn > 0]
    if len(drawn) and drawn.max() > 100 * drawn.min():
        axes.set_yscale("log")
    axes.set_xlim(-0.7, len(columns) - 0.3)
    axes.set_ylabel(f"L2 norm of a {what}")
    _name_layers(axes.xaxis, [column.name[0] for column in columns])
    axes.grid(visible=False, axis="x")
    style = {"columnspacing": 1.2, "handlelength": 1.2, "handletextpad": 0.5, "borderpad": 0, "borderaxespad": 2.2}
    axes.legend(loc="lower right", bbox_to_anchor=(1.06, 1), ncols=3, frameon=False, fontsize=8, **style)


def draw_similarity(axes: Axes, columns: Sequence[Column], max_rows: int) -> None:
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
    _add_colorbar(axes, image, "linear CKA")
    names = [column.name[0] for column in columns]
    _name_layers(axes.xaxis, names)
    _name_layers(axes.yaxis, names)
    if len(columns) <= _MOST_NUMBERED:
        for number, value in enumerate(values.flatten().tolist()):
            y, x = divmod(number, len(names))
            text = "-" if math.isnan(value) else f"{value:.2f}"
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


def _add_colorbar(axes: Axes, drawn: Any, label: str) -> None:
    """A colourbar at the right side of the panel."""
    bar = axes.figure.colorbar(drawn, cax=axes.inset_axes((1.03, 0, 0.035, 1)))
    bar.set_label(label, fontsize=9)
    bar.ax.tick_params(labelsize=8, width=0.5, length=3)
    bar.outline.set_linewidth(0.5)


def _name_layers(axis: Any, names: Sequence[str]) -> None:
    """Name the ticks of an axis after layers, and the axis after what their names share; of many some have ticks."""
    shared, own = _split_names(names)
    every = -(-len(own) // _MOST_TICKS)
    is_slanted = axis.axis_name == "x" and max(map(len, own)) > (3 if len(own) > 12 else 5)
    style = {"rotation": 45, "ha": "right", "rotation_mode": "anchor"} if is_slanted else {}
    axis.set_ticks(range(0, len(own), every), list(map(_short, own[::every])), parse_math=False, **style)
    axis.set_label_text(f"layer ({_short(shared, _LONGEST)})" if shared else "layer", parse_math=False)


def _split_names(names: Sequence[str]) -> tuple[str, list[str]]:
    """What names have in common, with a ``*`` where they differ, and what each has at that place; cut at dots."""
    parts = [name.split(".") for name in names]
    spare = min(map(len, parts)) - 1 if len(parts) > 1 else 0
    head = next((place for place in range(spare) if len({part[place] for part in parts}) > 1), spare)
    tail = next((place for place in range(spare - head) if len({part[-1 - place] for part in parts}) > 1), spare - head)
    own = [".".join(part[head : len(part) - tail]) for part in parts]
    return ".".join([*parts[0][:head], "*", *parts[0][len(parts[0]) - tail :]]) if head or tail else "", own


def _enough(rows: Tensor, least: int, what: str) -> Tensor:
    if len(rows) < least:
        raise ArgumentError(what, f"have at least {least} rows of finite numbers to be drawn", len(rows))
    return rows


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
