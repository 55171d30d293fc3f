"""Results as a table, drawn from what was stored and from nothing else."""

from __future__ import annotations

from typing import Any

COUNTED = ("counted", "value", "limit", "", "what")
COLUMNS = ("case", "floor us", "by hand us", "ours us", "ratio [95 %]", "CPU ratio", "target", "goal", "")


def table(document: dict[str, Any]) -> str:
    """The table of a document, with a line on the machine."""
    timed = [COLUMNS, *(_row(result) for result in document["results"])] if document["results"] else []
    counted = [COUNTED, *(_counted(count) for count in document["counts"])] if document["counts"] else []
    return "\n".join([heading(document), *_lines(timed), *_lines(counted)])


def heading(document: dict[str, Any]) -> str:
    """Where and with what it was measured."""
    machine, versions = document["machine"], document["versions"]
    where = f"{machine['processor']}, {machine['cores']} cores, {machine['torch_threads']} torch thread(s)"
    return f"{where}, load {machine['load']}, {', '.join(f'{name} {version}' for name, version in versions.items())}"


def _counted(count: dict[str, Any]) -> tuple[str, ...]:
    verdict = "met" if count["is_met"] else "MISSED"
    return (count["name"], f"{count['value']:.2f}", f"{count['limit']:.2f}", verdict, count["about"])


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
        _number(result["target"]),
        _number(result["goal"]),
        {None: "", True: "met", False: "MISSED"}[result["is_met"]],
    )


def _interval(spread: dict[str, float | None]) -> str:
    return "{} [{}, {}]".format(*("inf" if value is None else f"{value:.2f}" for value in spread.values()))


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _line(row: tuple[str, ...], widths: list[int]) -> str:
    first, *others = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
    return "  ".join([first, *(cell.strip().rjust(len(cell)) for cell in others)]).rstrip()
