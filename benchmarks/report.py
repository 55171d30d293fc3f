"""Results as a table and as a picture, drawn from what was stored and from nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

Row = tuple[str, ...]

COUNTED = ("counted", "value", "limit", "", "what")
FAILED, LEFT_OUT = ("failed", "error"), ("left out", "why")
COLUMNS = ("case", "floor us", "by hand us", "ours us", "ratio [95 %]", "CPU ratio", "target", "")
HEADINGS = "| time of ours | as a multiple |\n|---|---|"
# What a reader of the project's front page wants to know, and of which case it is.
HEADLINES = {
    "captured_call.inference_mode": "a captured call, beside a hook that clones",
    "captured_call.no_copy.no_grad": "the same with `copy=False`, beside a hook that keeps a reference",
    "pooled_call.inference_mode": 'a captured call with `reduce="mean"`, beside the same mean in a hook',
    "set_up.200_layers": "entering and leaving a block, beside attaching and removing hooks",
    "early_stop.third_of_12": "`stop_early` behind 3 of 12 blocks, beside the whole forward",
    "extract.pooled": "`extract` with mean and last token to disk, beside the forwards alone",
    "save.pooled": "saving that, beside the original system's way",
    "save.full": "saving whole activations, beside a plain file write",
}
_COLORS = {None: "tab:gray", "met": "tab:blue", "at the edge": "tab:orange", "missed": "tab:red"}


def table(document: dict[str, Any]) -> str:
    """The table of a document, with a line on the machine."""
    parts: list[tuple[Row, list[Row]]] = [
        (COLUMNS, [_row(result) for result in document["results"]]),
        (COUNTED, [_counted(count) for count in document["counts"]]),
        (FAILED, [(one["name"], one["error"]) for one in document["failed"]]),
        (LEFT_OUT, [(one["name"], one["why"]) for one in document["left_out"]]),
    ]
    return "\n".join([heading(document), *(line for columns, rows in parts for line in _lines(columns, rows))])


def headlines(*documents: dict[str, Any]) -> str:
    """The few figures of the front page, as a Markdown table."""
    results = {result["name"]: result for document in documents for result in document["results"]}
    rows = [f"| {text} | {_interval(results[name]['ratio']['wall'])} |" for name, text in HEADLINES.items()]
    return "\n".join([HEADINGS, *rows])


def plot(document: dict[str, Any], path: Path) -> None:
    """Draw the ratios with their intervals, and what is demanded, on a logarithmic axis; needs matplotlib.

    Args:
        document: what was stored.
        path: where to; its suffix is the format.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    results = [one for one in document["results"] if None not in one["ratio"]["wall"].values()][::-1]
    figure = Figure(figsize=(8, 1.2 + 0.24 * len(results)), layout="constrained")
    axes = figure.subplots()
    for row, result in enumerate(results):
        ratio = result["ratio"]["wall"]
        color = _COLORS[result["verdict"]]
        axes.plot([ratio["low"], ratio["high"]], [row, row], color=color, linewidth=2)
        axes.plot(ratio["median"], row, "o", color=color, markersize=5)
        if result["target"] is not None:
            axes.plot(result["target"], row, "|", color="black", markersize=12)
    axes.axvline(1, color="lightgray", linewidth=1, zorder=0)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.minorticks_off()
    axes.set_yticks(range(len(results)), [result["name"] for result in results])
    axes.set_ylim(-0.7, len(results) - 0.3)
    axes.set_xlabel("time as a multiple of the way by hand\nmedian and 95 % interval; | is the most that is demanded")
    axes.set_title(heading(document).partition(", load")[0], fontsize=9)
    with rc_context({"svg.hashsalt": "benchmarks"}):  # the same picture from the same results, byte for byte
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


def heading(document: dict[str, Any]) -> str:
    """Where and with what it was measured."""
    machine, versions = document["machine"], document["versions"]
    device = "" if machine["device"] == "cpu" else f"{machine['device']}, "
    where = f"{device}{machine['processor']}, {machine['cores']} cores, {machine['torch_threads']} torch thread(s)"
    return f"{where}, load {machine['load']}, {', '.join(f'{name} {version}' for name, version in versions.items())}"


def _counted(count: dict[str, Any]) -> Row:
    limit, told = _number(count["limit"]), _told(count["verdict"])
    return (count["name"], f"{count['value']:.2f}", limit, told, count["about"])


def _lines(columns: Row, rows: list[Row]) -> list[str]:
    """Rows in aligned columns, behind an empty line; nothing when there are none."""
    widths = [max(map(len, cells)) for cells in zip(columns, *rows, strict=True)]
    return ["", *(_line(row, widths) for row in (columns, *rows))] if rows else []


def _row(result: dict[str, Any]) -> Row:
    calls, runs, added = result["calls_per_run"], result["run_us"], result["added_us_per_call"]
    floor = f"{runs['floor']['wall']['median'] / calls:.2f}" if "floor" in runs else "-"
    return (
        result["name"],
        floor,
        f"+{added['reference']['wall']['median']:.2f}",
        f"+{added['ours']['wall']['median']:.2f}",
        _interval(result["ratio"]["wall"]),
        _interval(result["ratio"]["cpu"]),
        _target(result),
        _told(result["verdict"]),
    )


def _told(verdict: str | None) -> str:
    """A verdict as tables show it; one that was missed is to be seen at once."""
    return "MISSED" if verdict == "missed" else verdict or ""


def _interval(spread: dict[str, float | None]) -> str:
    return "{} [{}, {}]".format(*map(_ratio, spread.values()))


def _ratio(value: float | None) -> str:
    if value is None:
        return "inf"
    return f"{value:.2f}" if not 0 < value < 0.1 else f"{value:.2g}"


def _target(result: dict[str, Any]) -> str:
    allowed = result.get("allowed_us")
    return _number(result["target"]) + (f" + {allowed:g} us" if allowed else "")


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _line(row: Row, widths: list[int]) -> str:
    first, *others = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
    return "  ".join([first, *(cell.strip().rjust(len(cell)) for cell in others)]).rstrip()
