"""How names, values and tables are shown to people."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from html import escape
from pathlib import Path
from typing import Any, overload

_EXAMPLES = 3
_LONGEST = 100  # characters of a value that are shown whole
_EXCERPT = 40
_MOST_ROWS = 40


def examples(names: Iterable[object]) -> str:
    """Up to three of `names`, quoted, and how many more there are."""
    names = list(names)
    shown = ", ".join(repr(name) for name in names[:_EXAMPLES])
    rest = len(names) - _EXAMPLES
    return f"{shown} and {rest} more" if rest > 0 else shown


def close_matches(name: object, names: Iterable[str], otherwise: str = "") -> str:
    """A sentence with those of `names` that look like what was asked for; another one where none does."""
    return close_sentence(get_close_matches(name, names) if isinstance(name, str) else []) or otherwise


def close_sentence(close: Sequence[str]) -> str:
    """A sentence with names that look like what was asked for; empty where there are none."""
    return f"Close matches: {examples(close)}." if close else ""


def dtype_name(dtype: object) -> str:
    """A dtype without ``torch.``; empty for none."""
    return "" if dtype is None else str(dtype).removeprefix("torch.")


def shown(value: object) -> str:
    """A value as an error text shows it: what the user typed, but no dump of data."""
    text = repr(value)
    if len(text) <= _LONGEST and "\n" not in text:
        return text
    return f"a {type(value).__name__} ({' '.join(text.split())[:_EXCERPT]} ...)"


def printable(text: str) -> str:
    """A text on one line that cannot steer a terminal: names in a store may come from anybody."""
    return text if text.isprintable() else repr(text)[1:-1]


def one_line(error: Exception, *, briefly: bool = False) -> str:
    """An error's type and message on one line without a full stop; briefly, the message's first sentence."""
    text = f"{type(error).__name__}: {' '.join(str(error).split())}".rstrip(": ")
    return (text.split(". ")[0] if briefly else text).rstrip(".")


def short_path(path: str | Path) -> str:
    """A path as people read it: from the current directory on, when it is in there."""
    try:
        return str(Path(path).relative_to(Path.cwd()))
    except (ValueError, OSError):  # it is elsewhere; or the current directory was removed
        return str(path)


def describe(key: Any, value: Any) -> list[tuple[str, ...]]:
    """A table row for each tensor under a key: name, reducer, shape, dtype, device."""
    name, reducer = key if isinstance(key, tuple) else (key, "")
    if isinstance(value, list):
        return [row for index, call in enumerate(value) for row in describe((f"{name}#{index}", reducer), call)]
    shape = "nested" if value.is_nested else str(tuple(value.shape))
    return [(name, reducer, shape, dtype_name(value.dtype), str(value.device))]


def table(
    caption: str, rows: Sequence[Sequence[str]], *, header: Sequence[str] = (), first: int = 0, most: int = _MOST_ROWS
) -> str:
    """A caption and a line for each row, columns aligned, columns that are empty left out; a long table is cut.

    Args:
        caption: what stands above.
        rows: the cells, equally many in each.
        header: the columns' names, if they need any.
        first: the row that a cut table begins with.
        most: how many rows are shown.
    """
    window, above, below = _window(rows, header, first, most)
    lines = aligned(window)
    return "\n".join([caption, *lines[: bool(header)], *above, *lines[bool(header) :], *below])


class LazyRows(Sequence[tuple[str, ...]]):
    """Rows of a table, each made when it is shown: of a long table few are.

    Args:
        items: what there is a row for.
        cells: makes the row of an item.
    """

    def __init__(self, items: Sequence[Any], cells: Callable[[Any], tuple[str, ...]]) -> None:
        self._items, self._cells = items, cells

    def __len__(self) -> int:
        return len(self._items)

    @overload
    def __getitem__(self, index: int) -> tuple[str, ...]: ...
    @overload
    def __getitem__(self, index: slice) -> list[tuple[str, ...]]: ...
    def __getitem__(self, index: int | slice) -> tuple[str, ...] | list[tuple[str, ...]]:
        return (
            list(map(self._cells, self._items[index])) if isinstance(index, slice) else self._cells(self._items[index])
        )


def html_table(caption: str, rows: Sequence[Sequence[str]], *, header: Sequence[str] = (), first: int = 0) -> str:
    """What `table` shows, as HTML for a notebook: escaped, without scripts and styles."""
    window, above, below = _window(rows, header, first, _MOST_ROWS)
    lines = [f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in window]
    if header and window:
        lines[0] = lines[0].replace("<td>", "<th>").replace("</td>", "</th>")
    cut = [[f'<tr><td colspan="{len(window[0])}">{line.strip()}</td></tr>' for line in part] for part in (above, below)]
    lines = [*lines[: bool(header)], *cut[0], *lines[bool(header) :], *cut[1]]
    return "\n".join(["<table>", f"<caption>{escape(caption)}</caption>", *lines, "</table>"])


def total(title: str, count: int, nbytes: int, *, noun: str = "tensor") -> str:
    """A caption: a title, how many tensors (or other things) there are, and their bytes."""
    return f"{title}: {plural(count, noun)}, {human_bytes(nbytes)}"


def plural(count: int, noun: str) -> str:
    """A number of things, in good English."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


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


def _window(
    rows: Sequence[Sequence[str]], header: Sequence[str], first: int, most: int
) -> tuple[list[tuple[str, ...]], list[str], list[str]]:
    """The rows that are shown, the header first, without columns that are empty; lines about those above and below."""
    first = max(0, min(first, len(rows) - most))
    window = rows[first : first + most]
    filled = [index for index, column in enumerate(zip(*window, strict=True)) if any(column)]
    shown_rows = [tuple(row[index] for index in filled) for row in ([header, *window] if header and rows else window)]
    rest = len(rows) - first - len(window)
    return shown_rows, [f"  ... {first} more above"] * (first > 0), [f"  ... and {rest} more"] * (rest > 0)


@contextmanager
def quiet(*, shows_downloads: bool) -> Iterator[None]:
    """Turns transformers' reports and bars off, but for the bars of downloads when they are asked for."""
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, enable_progress_bars
    from transformers.utils import logging

    verbosity, had_bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    had_downloads = not are_progress_bars_disabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if shows_downloads and had_downloads:
        enable_progress_bars()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if had_bars:
            logging.enable_progress_bar()
