"""Showing what is held as a table of text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

_MOST_ROWS = 40


def describe(key: Any, value: Any) -> list[tuple[str, ...]]:
    """A table row for each tensor under a key: name, reducer, shape, dtype, device."""
    name, reducer = key if isinstance(key, tuple) else (key, "")
    if isinstance(value, list):
        return [row for index, one in enumerate(value) for row in describe((f"{name}#{index}", reducer), one)]
    shape = "nested" if value.is_nested else str(tuple(value.shape))
    return [(name, reducer, shape, str(value.dtype).removeprefix("torch."), str(value.device))]


def table(title: str, rows: Sequence[Sequence[str]], nbytes: int) -> str:
    """A title with the total and a line for each row, columns aligned, columns that are empty left out."""
    head = f"{title}: {len(rows)} {'tensor' if len(rows) == 1 else 'tensors'}, {human_bytes(nbytes)}"
    shown = list(rows[:_MOST_ROWS])
    columns = [column for column in zip(*shown, strict=True) if any(column)]
    lines = [head, *_aligned(columns)]
    if len(rows) > _MOST_ROWS:
        lines.append(f"  ... and {len(rows) - _MOST_ROWS} more")
    return "\n".join(lines)


def human_bytes(count: float) -> str:
    """A number of bytes as people read it, in powers of 1024."""
    if count < 1024:
        return f"{count:.0f} B"
    for unit in ("KiB", "MiB", "GiB"):
        count /= 1024
        if round(count, 1) < 1024:
            return f"{count:.1f} {unit}"
    return f"{count / 1024:.1f} TiB"


def _aligned(columns: Sequence[Sequence[str]]) -> Iterable[str]:
    widths = [max(map(len, column)) for column in columns]
    for row in zip(*columns, strict=True):
        yield "  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
