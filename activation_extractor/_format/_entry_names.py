"""What the entries of a file are called: names that are safe on disk and come back as they went in."""

from __future__ import annotations

Key = tuple[str, str | None]  # of a value: the recorded name; the reducer's name, None where it is not known

_UNSAFE = "%:#/\\\0"

# Entries of a shard beside `layer:reducer`. A bare `#` cannot come from a name, where it is escaped.
IDS = "#ids"
KEEP = "#keep:"
OFFSETS = "#offsets"  # after the name of a ragged column, or of ids that are text: where each row begins
ROWS = "#rows"  # after the name of a column that has fewer rows than the shard: which ones it has


def escape(name: str) -> str:
    """A name that is safe on disk: `%`, `:`, `#`, path separators and NUL in percent form."""
    return "".join(f"%{ord(letter):02X}" if letter in _UNSAFE else letter for letter in name)


def unescape(name: str) -> str:
    """The name that `escape` was given."""
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
    """The name that was escaped; None for text that `escape` does not make, which a damaged file may hold."""
    try:
        original = unescape(name)
    except ValueError:
        return None
    return original if escape(original) == name else None
