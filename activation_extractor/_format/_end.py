"""The end of a data set: how many units and rows a store has once it is complete.

Whoever sees the end writes it, after the last shard: ``end.json``. It never changes. A store that grew gets a further
one, ``end-<units>.json``, and the one with the most units counts.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from activation_extractor._creation import create
from activation_extractor._display import shown
from activation_extractor._format._id_files import IDS_FOLDER
from activation_extractor._format._journal import JOURNAL
from activation_extractor._format._manifest import MANIFEST
from activation_extractor._format._shards import SHARDS
from activation_extractor._storage import names_in, read_whole
from activation_extractor.errors import StoreError

END = "end.json"
_FORMAT = "activation_extractor end"
_VERSION = 1
_NAME = re.compile(r"end(?:-([1-9][0-9]{0,8}))?\.json")
_MOST_UNITS = 10**8  # whose numbers have eight digits
_MOST_ROWS = 2**62
_ADVICE = "Delete it; running extract again with the same arguments writes it anew."


@dataclass(frozen=True)
class End:
    """What a store has once it is complete."""

    units: int
    rows: int
    name: str = field(default=END, compare=False)  # of the file that says so


def is_own(name: str) -> bool:
    """Whether a file or folder of this name, in the folder of a store, is one that its writers make."""
    return name in (MANIFEST, SHARDS, JOURNAL, IDS_FOLDER) or _NAME.fullmatch(name) is not None


def read_end(folder: Path) -> End | None:
    """Where the data set of a store ends; None where nobody has said it: the run is at work, or was interrupted.

    Raises:
        StoreError: what was said is damaged, or a newer version of the library said it.
    """
    return max(read_ends(folder), key=lambda end: end.units, default=None)


def read_ends(folder: Path) -> list[End]:
    """Where the data set of a store ended each time; raises what `read_end` raises."""
    try:
        names = [name for name in names_in(folder) if _NAME.fullmatch(name)]
    except OSError:  # of a folder that is no store, which its manifest tells
        return []
    return [_read(folder / name) for name in sorted(names)]


def write_end(folder: Path, units: int, rows: int) -> bool:
    """Say where the data set of a store ends, once every one of its units is on the disk.

    Returns:
        Whether it was not said before.

    Raises:
        StoreError: the disk or the bucket refuses, or what was said before is damaged.
    """
    content = {"format": _FORMAT, "version": _VERSION, "units": units, "rows": rows}
    for name in (END, f"end-{units}.json"):
        known = read_end(folder)
        if known is not None and known.units >= units:
            return False
        if create(folder / name, [json.dumps(content).encode()]):
            return True
    return False


def _read(path: Path) -> End:
    try:
        content = json.loads(read_whole(path))
    except (OSError, ValueError, RecursionError) as error:
        got = str(error) if type(error) is ValueError else type(error).__name__
        raise StoreError(path, "be readable", got, _ADVICE) from error
    if not isinstance(content, dict) or content.get("format") != _FORMAT:
        raise StoreError(path, "say where a data set ends", "something else", _ADVICE)
    if content.get("version") != _VERSION:
        got = f"version {content.get('version')!r}"
        raise StoreError(path, f"be of version {_VERSION}", got, "Update activation_extractor.")
    named = _NAME.fullmatch(path.name)
    units = _number(path, content, "units", _MOST_UNITS)
    if named and named[1] and int(named[1]) != units:
        raise StoreError(path, "hold the number of units that its name says", str(units), _ADVICE)
    return End(units, _number(path, content, "rows", _MOST_ROWS), path.name)


def _number(path: Path, content: dict[str, Any], name: str, most: int) -> int:
    number = content.get(name)
    if type(number) is not int or not 0 <= number <= most:
        raise StoreError(path, f"hold a number of {name}", shown(number), _ADVICE)
    return number
