"""Showing what is held as a table of text."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

_MOST_ROWS = 40


def describe(key: Any, value: Any) -> list[tuple[str, ...]]:
    """A table row for each tensor under a key: name, reducer, shape, dtype, device."""
    name, reducer = key if isinstance(key, tuple) else (key, "")
    if isinstance(value, list):
        return [row for index, one in enumerate(value) for row in describe((f"{name}#{index}", reducer), one)]
    shape = "nested" if value.is_nested else str(tuple(value.shape))
    return [(name, reducer, shape, str(value.dtype).removeprefix("torch."), str(value.device))]


def table(
    title: str, rows: Sequence[Sequence[str]], nbytes: int, *, noun: str = "tensor", header: Sequence[str] = ()
) -> str:
    """A title with the total and a line for each row, columns aligned, columns that are empty left out.

    Args:
        title: what the rows are of.
        rows: the cells, equally many in each.
        nbytes: the total.
        noun: what a row is.
        header: the columns' names, if they need any.
    """
    shown, cut = _shown(rows, header)
    return "\n".join([_total(title, rows, nbytes, noun), *aligned(shown), *(f"  {line}" for line in cut)])


def html_table(
    title: str, rows: Sequence[Sequence[str]], nbytes: int, *, noun: str = "tensor", header: Sequence[str] = ()
) -> str:
    """The same as HTML for a notebook: escaped, the total as its caption, without scripts and styles."""
    shown, cut = _shown(rows, header)
    lines = [f"<caption>{escape(_total(title, rows, nbytes, noun))}</caption>"]
    for index, row in enumerate(shown):
        tag = "th" if header and index == 0 else "td"
        lines.append(f"<tr>{''.join(f'<{tag}>{escape(cell)}</{tag}>' for cell in row)}</tr>")
    lines += [f'<tr><td colspan="{len(shown[0])}">{escape(line)}</td></tr>' for line in cut]
    return "\n".join(["<table>", *lines, "</table>"])


def aligned(rows: Sequence[Sequence[str]], sides: str = "") -> list[str]:
    """A line for each row, indented, its cells as wide as their columns; no line has space at its end.

    Args:
        rows: the cells, equally many in each.
        sides: for each column ``<`` or ``>``, the side that its cells keep to; by default all keep to the left.
    """
    columns = list(zip(*rows, strict=True))
    sides = sides or "<" * len(columns)
    forms = [f"{side}{max(map(len, column))}" for side, column in zip(sides, columns, strict=True)]
    return ["  " + "  ".join(map(format, row, forms)).rstrip() for row in rows]


def human_bytes(count: float) -> str:
    """A number of bytes as people read it, in powers of 1024."""
    if count < 1024:
        return f"{count:.0f} B"
    for unit in ("KiB", "MiB", "GiB"):
        count /= 1024
        if round(count, 1) < 1024:
            return f"{count:.1f} {unit}"
    return f"{count / 1024:.1f} TiB"


def _total(title: str, rows: Sequence[Sequence[str]], nbytes: int, noun: str) -> str:
    return f"{title}: {len(rows)} {noun}{'' if len(rows) == 1 else 's'}, {human_bytes(nbytes)}"


def _shown(rows: Sequence[Sequence[str]], header: Sequence[str]) -> tuple[list[tuple[str, ...]], list[str]]:
    """The rows that are shown, the header first, without the columns that are empty; and a line about the others."""
    columns = list(zip(*rows[:_MOST_ROWS], strict=True))
    filled = [index for index, column in enumerate(columns) if any(column)]
    shown = [header, *rows[:_MOST_ROWS]] if header and rows else rows[:_MOST_ROWS]
    rest = len(rows) - _MOST_ROWS
    return [tuple(row[index] for index in filled) for row in shown], [f"... and {rest} more"] if rest > 0 else []
