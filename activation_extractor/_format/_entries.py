"""What the entries of a file are called: names that are safe on disk and come back as they went in."""

from __future__ import annotations

Key = tuple[str, str | None]  # of a value: recorded name; reducer's name, or None where that is not known

_UNSAFE = "%:#/\\\0"

# Entries of a shard beside `layer:reducer`. A bare `#` cannot come from a name, where it is escaped.
IDS = "#ids"
KEEP = "#keep:"
OFFSETS = "#offsets"  # behind a ragged column, or behind ids that are text: where each row begins
ROWS = "#rows"  # behind a column that is short of rows: which rows of the shard it has


def escape(name: str) -> str:
    """A name that is safe on disk: `%`, `:`, `#`, path separators and NUL in percent form."""
    return "".join(f"%{ord(one):02X}" if one in _UNSAFE else one for one in name)


def unescape(name: str) -> str:
    """What `escape` was given."""
    head, *parts = name.split("%")
    return head + "".join(chr(int(part[:2], 16)) + part[2:] for part in parts)


def entry_name(layer: str, reducer: str | None = None) -> str:
    """The name of an entry in a file: ``layer`` or ``layer:reducer``, each escaped."""
    return escape(layer) if reducer is None else f"{escape(layer)}:{escape(reducer)}"


def keep_entry(name: str) -> str:
    """The entry of a kept column in a shard."""
    return KEEP + escape(name)


def kept_name(entry: str) -> str | None:
    """The name of a kept column's entry; None for any other entry."""
    return _unescaped(entry.removeprefix(KEEP)) if entry.startswith(KEEP) and not is_index(entry) else None


def column_key(entry: str) -> tuple[str, str] | None:
    """The layer and reducer of a column's entry; None for any other entry."""
    if "#" in entry or entry.count(":") != 1:
        return None
    layer, reducer = map(_unescaped, entry.split(":"))
    return None if layer is None or reducer is None else (layer, reducer)


def is_index(entry: str) -> bool:
    """Whether an entry belongs to another one and says where its rows are."""
    return entry.endswith((OFFSETS, ROWS))


def _unescaped(name: str) -> str | None:
    """What a name stands for in a file that anybody may have written; None unless `escape` has made it."""
    try:
        found = unescape(name)
    except ValueError:
        return None
    return found if escape(found) == name else None
