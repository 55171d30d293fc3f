"""The manifest of a store: its run and its columns. It is written once and never changes."""

from __future__ import annotations

import json
import platform
import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import torch

from activation_extractor._creation import create, exists
from activation_extractor._format._codecs import CODECS, SAFETENSORS, Codec
from activation_extractor._format._fields import Field
from activation_extractor._storage import REACH, RemotePath, read_whole
from activation_extractor.errors import StoreError

FORMAT = "activation_extractor store"
VERSION = 1
MANIFEST = "manifest.json"
ROWS_PER_UNIT, BATCHES_PER_UNIT = (
    "rows_per_unit",
    "batches_per_unit",
)  # how large all units are, in a store of `extract`
_LEAST_ROWS = "least_rows_per_unit"  # the name of the first in stores that were made before 0.2
_GIVE = "Give the folder that was given as out= or sink=."
_ID_TYPES = {"str": "str", "int": "int", None: None}


@dataclass(frozen=True)
class Manifest:
    """The manifest of a store; columns are those of its first unit."""

    codec: Codec
    fingerprint: Mapping[str, Any]  # what the values depend on, by part
    rows_per_unit: int | None  # of a data set whose rows can be told apart; None in a store of with-blocks
    batches_per_unit: int | None  # of any other data set
    columns: tuple[Field, ...]
    keep: tuple[Field, ...]
    ids: str | None  # the type of the row ids, ``"str"`` or ``"int"``; None where rows have none
    content: Mapping[str, Any]  # the JSON object in the file, with members that this version does not know

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Manifest:
        """The manifest that a JSON object describes, each member checked.

        Raises:
            ValueError: a member is missing or wrong; the text is its name.
        """
        parsers: dict[str, Callable[[Any], Any]] = {
            "codec": CODECS.__getitem__,
            "fingerprint": dict.copy,  # a TypeError unless it is a dict
            ROWS_PER_UNIT: _size,
            BATCHES_PER_UNIT: _size,
            "columns": partial(_fields, is_kept=False),
            "keep": partial(_fields, is_kept=True),
            "ids": _ID_TYPES.__getitem__,
        }
        members = {ROWS_PER_UNIT: content.get(_LEAST_ROWS), **content}
        parsed: dict[str, Any] = {}
        for name, parse in parsers.items():
            try:
                parsed[name] = parse(members[name])
            except (LookupError, TypeError, ValueError) as error:
                raise ValueError(name) from error
        return cls(**parsed, content=content)

    @property
    def unit_size(self) -> int | None:
        """How many rows or batches a unit of a data set has; None in a store of with-blocks."""
        return self.rows_per_unit or self.batches_per_unit

    @property
    def entries(self) -> frozenset[str]:
        """The entries that a shard normally has for its columns and kept columns."""
        return frozenset(field.entry for field in (*self.columns, *self.keep))


def make_manifest(
    codec: Codec, run: Mapping[str, Any], columns: Iterable[Field], keep: Iterable[Field], ids: str | None
) -> Manifest:
    """The manifest of a new store.

    `run` holds ``fingerprint``, in a store of `extract` the size of its units, and further members.
    """
    versions = {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "numpy": np.__version__,
        "safetensors": safetensors.__version__,
    }
    head = {"format": FORMAT, "version": VERSION, "codec": codec.name}
    listed = {name: [field.to_json() for field in fields] for name, fields in (("columns", columns), ("keep", keep))}
    return Manifest.from_json({**head, **run, **listed, "ids": ids, "versions": versions})


def write_manifest(folder: Path, manifest: Manifest) -> bool:
    """Write the manifest of a new store, unless there is one; returns whether there was none.

    Raises:
        StoreError: the disk or the bucket refuses.
    """
    return create(folder / MANIFEST, [json.dumps(manifest.content, indent=1, ensure_ascii=False).encode()])


def has_manifest(folder: Path) -> bool:
    """Whether a folder holds a manifest, which makes it a store; a StoreError where a bucket does not say."""
    return exists(folder / MANIFEST)


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a store.

    Raises:
        StoreError: there is none, it is damaged, or a newer version of the library wrote it.
    """
    path = folder / MANIFEST
    try:
        content = json.loads(read_whole(path))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise StoreError(folder, "be a store", _described(folder), _GIVE) from error
    except (OSError, ValueError, RecursionError) as error:
        if isinstance(folder, RemotePath) and isinstance(error, OSError):
            raise StoreError(path, "be readable", str(error.strerror), REACH) from error
        got = str(error) if type(error) is ValueError else type(error).__name__
        raise StoreError(path, "be a readable manifest", got, "Restore it from a copy.") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise StoreError(path, "be the manifest of a store", "something else", "Give the folder of a store.")
    if content.get("version") != VERSION:
        got = f"version {content.get('version')!r}"
        raise StoreError(path, f"be of version {VERSION}", got, "Update activation_extractor.")
    try:
        manifest = Manifest.from_json(content)
    except ValueError as error:
        raise StoreError(path, f"hold a valid {str(error)!r}", "none", "Restore it from a copy.") from error
    if isinstance(folder, RemotePath) and manifest.codec != SAFETENSORS:
        got, advice = f"shards of {manifest.codec.name}", "Copy the store to a disk."
        raise StoreError(folder, "hold safetensors to be read from a bucket", got, advice)
    return manifest


def _described(folder: Path) -> str:
    """What a folder without a manifest is."""
    if isinstance(folder, RemotePath):
        return "no manifest.json there"
    return "a folder without manifest.json" if folder.is_dir() else "a file" if folder.exists() else "no such folder"


def store_name(fingerprint: Mapping[str, Any]) -> str:
    """The name of a run's store, which its shards hold: it follows from the fingerprint."""
    return f"{zlib.crc32(json.dumps(fingerprint, sort_keys=True).encode()):08x}"


def _size(value: Any) -> int | None:
    if value is not None and (type(value) is not int or value < 1):
        raise ValueError("a size that is not a positive number")
    return value


def _fields(value: Any, *, is_kept: bool) -> tuple[Field, ...]:
    if not isinstance(value, list):
        raise TypeError("columns that are not a list")
    return tuple(Field.from_json(column, is_kept=is_kept) for column in value)
