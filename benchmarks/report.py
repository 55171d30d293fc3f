"""Results as a table and as a picture, drawn from what was stored and from nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

COUNTED = ("counted", "value", "limit", "", "what")
COLUMNS = ("case", "floor us", "by hand us", "ours us", "ratio [95 %]", "CPU ratio", "target", "")
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
_VERDICTS = {None: "", True: "met", False: "MISSED"}


def table(document: dict[str, Any]) -> str:
    """The table of a document, with a line on the machine."""
    timed = [COLUMNS, *(_row(result) for result in document["results"])] if document["results"] else []
    counted = [COUNTED, *(_counted(count) for count in document["counts"])] if document["counts"] else []
    return "\n".join([heading(document), *_lines(timed), *_lines(counted)])


def headlines(*documents: dict[str, Any]) -> str:
    """The few figures of the front page, as a Markdown table."""
    results = {result["name"]: result for document in documents for result in document["results"]}
    rows = [f"| {text} | {_interval(results[name]['ratio']['wall'])} |" for name, text in HEADLINES.items()]
    return "\n".join(["| time of ours | as a multiple |", "|---|---|", *rows])


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
        color = {None: "tab:gray", True: "tab:blue", False: "tab:red"}[result["is_met"]]
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


def _counted(count: dict[str, Any]) -> tuple[str, ...]:
    return (count["name"], f"{count['value']:.2f}", _number(count["limit"]), _VERDICTS[count["is_met"]], count["about"])


def _lines(rows: list[tuple[str, ...]]) -> list[str]:
    """Rows in aligned columns, behind an empty line."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["", *(_line(row, widths) for row in rows)] if rows else []


def _row(result: dict[str, Any]) -> tuple[str, ...]:
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
        _VERDICTS[result["is_met"]],
    )


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


def _line(row: tuple[str, ...], widths: list[int]) -> str:
    first, *others = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
    return "  ".join([first, *(cell.strip().rjust(len(cell)) for cell in others)]).rstrip()
