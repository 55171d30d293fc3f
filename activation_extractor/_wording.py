"""How error texts show names and values."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

_EXAMPLES = 3
_LONGEST = 100  # characters of a value that are shown whole
_EXCERPT = 40


def examples(names: Iterable[object]) -> str:
    """Up to three of `names`, quoted, and how many more there are."""
    names = list(names)
    shown = ", ".join(repr(name) for name in names[:_EXAMPLES])
    rest = len(names) - _EXAMPLES
    return f"{shown} and {rest} more" if rest > 0 else shown


def shown(value: object) -> str:
    """A value as an error text shows it: what the user typed, but no dump of data."""
    text = repr(value)
    if len(text) <= _LONGEST and "\n" not in text:
        return text
    return f"a {type(value).__name__} ({' '.join(text.split())[:_EXCERPT]} ...)"


def printable(text: str) -> str:
    """A text on one line that cannot steer a terminal: names in a store may come from anybody."""
    return text if text.isprintable() else repr(text)[1:-1]


def short_path(path: str | Path) -> str:
    """A path as people read it: from the current directory on, when it is in there."""
    try:
        return str(Path(path).relative_to(Path.cwd()))
    except (ValueError, OSError):  # it is elsewhere; or the current directory was removed
        return str(path)
