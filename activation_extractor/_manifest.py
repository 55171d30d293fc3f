"""The two files that a store consists of: its manifest, and what the entries of a shard are called."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import torch

from activation_extractor._formats import entry_name, escape, sync_folder, temporary, unescape
from activation_extractor.errors import StoreError

FORMAT = "activation_extractor store"
VERSION = 1
MANIFEST = "manifest.json"
SHARDS = "shards"
SUFFIX = ".safetensors"

# Entries of a shard beside `layer:reducer`. A bare `#` cannot come from a name, where it is escaped.
IDS = "#ids"
KEEP = "#keep:"
OFFSETS = "#offsets"  # behind a ragged column, or behind ids that are text: where each row begins
ROWS = "#rows"  # behind a column that is short of rows: which rows of the shard it has


def column_entry(layer: str, reducer: str) -> str:
    """The entry of a column in a shard."""
    return entry_name(layer, reducer)


def keep_entry(name: str) -> str:
    """The entry of a kept column in a shard."""
    return KEEP + escape(name)


def column_key(entry: str) -> tuple[str, str] | None:
    """The layer and reducer of a column's entry; None for any other entry."""
    if "#" in entry or entry.count(":") != 1:
        return None
    layer, reducer = entry.split(":")
    return unescape(layer), unescape(reducer)


def shard_name(number: int) -> str:
    """What the shard of a unit is called, by the unit's place in the store."""
    return f"{number:08d}{SUFFIX}"


def shards_of(folder: Path) -> list[Path]:
    """The shards of a store, in order.

    Raises:
        StoreError: one is missing between others, so that rows would be left out.
    """
    shards = sorted(path for path in (folder / SHARDS).glob(f"*{SUFFIX}") if not path.name.startswith("."))
    for number, shard in enumerate(shards):
        if shard.name != shard_name(number):
            got = f"{shard.name!r} in place of {shard_name(number)!r}"
            raise StoreError(
                folder, "hold every shard up to its last", got, "Restore it from a copy, or extract again."
            )
    return shards


def write_manifest(folder: Path, about: Mapping[str, Any], columns: list[dict[str, Any]]) -> None:
    """Write the manifest of a new store, unless there is one: it never changes.

    Args:
        folder: the store.
        about: what the writer knows about the run.
        columns: name, reducer, dtype, row shape and raggedness of what its first unit held.
    """
    versions = {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "numpy": np.__version__,
        "safetensors": safetensors.__version__,
    }
    manifest = {"format": FORMAT, "version": VERSION, **about, "columns": columns, "versions": versions}
    path = folder / MANIFEST
    with temporary(path) as (file, draft):
        file.write(json.dumps(manifest, indent=1, ensure_ascii=False).encode())
        file.flush()
        os.fsync(file.fileno())
        publish(draft, path)


def publish(draft: Path, path: Path) -> None:
    """Give a finished file its name, if that name is free; what is there is never overwritten.

    Raises:
        StoreError: it is taken.
    """
    try:
        os.link(draft, path)
    except FileExistsError as error:
        raise StoreError(path, "not exist yet", "a file that another writer published", "Use a new folder.") from error
    sync_folder(path.parent)


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a store.

    Raises:
        StoreError: there is none, it is damaged, or a newer version of the library wrote it.
    """
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError) as error:
        got = "a folder without manifest.json" if folder.is_dir() else "a file" if folder.exists() else "no such folder"
        raise StoreError(folder, "be a store", got, "Give the folder that was given as out= or sink=.") from error
    except (OSError, ValueError) as error:
        raise StoreError(path, "be a readable manifest", type(error).__name__, "Restore it from a copy.") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise StoreError(path, "be the manifest of a store", "something else", "Give the folder of a store.")
    if manifest.get("version") != VERSION:
        got = f"version {manifest.get('version')!r}"
        raise StoreError(path, f"be of version {VERSION}", got, "Update activation_extractor.")
    columns = manifest.get("columns")
    if not isinstance(columns, list) or not all(_is_column(column) for column in columns):
        raise StoreError(path, "list its columns", "something else", "Restore it from a copy.")
    return manifest


def _is_column(column: Any) -> bool:
    return isinstance(column, dict) and all(isinstance(column.get(key), str) for key in ("layer", "reducer"))
