"""Starting over: an earlier store gives its place to a new one."""

from __future__ import annotations

from itertools import count
from pathlib import Path

from activation_extractor._files import is_draft
from activation_extractor._format._end import is_own
from activation_extractor._format._manifest import has_manifest, read_manifest
from activation_extractor._format._shards import SHARDS, is_shard, scan_shards
from activation_extractor._storage import RemotePath
from activation_extractor.errors import StoreError


def check_replaceable(folder: Path) -> None:
    """Make sure that a store holds nothing else, and lies where it can be renamed.

    Raises:
        StoreError: a file in it is not of the store, or commands run in it.
    """
    if isinstance(folder, RemotePath):
        advice = "Choose another place for the new one."
        raise StoreError(folder, "be on a disk where --fresh is to begin another store", "a store in a bucket", advice)
    codec = read_manifest(folder).codec
    names = [path.name for path in folder.iterdir() if not is_own(path.name)]
    names += [f"{SHARDS}/{entry.name}" for entry in scan_shards(folder) if not is_shard(entry.name, codec)]
    others = [name for name in names if not is_draft(name.rpartition("/")[2])]
    if others:
        advice = "Take it out of there, or choose another folder."
        raise StoreError(folder, "hold nothing but a store where --fresh is to begin another", repr(others[0]), advice)
    if Path.cwd().is_relative_to(folder.resolve()):
        advice = "Choose another folder, or run the command elsewhere."
        raise StoreError(folder, "not be the current folder where --fresh is to begin another store", "that", advice)


def set_aside(folder: Path) -> Path | None:
    """Rename the store in a folder, if there is one, so that the folder is empty; returns where the store is now.

    Nothing is removed. Where the folder is a link, it leads to the same place afterwards.

    Raises:
        StoreError: what `check_replaceable` raises, or the store cannot be renamed.
    """
    if not has_manifest(folder):
        return None
    check_replaceable(folder)
    place = folder.resolve()
    aside = next(path for number in count(1) if not (path := place.with_name(f"{place.name}.{number}")).exists())
    try:
        place.rename(aside)
        place.mkdir()
    except OSError as error:
        reason = error.strerror or str(error)
        raise StoreError(folder, "be renamed for --fresh", reason, "Choose another folder.") from error
    return aside
