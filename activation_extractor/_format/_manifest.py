"""The manifest of a store: what its run was, and what its columns are. It is written once and never changes."""

from __future__ import annotations

import json
import math
import os
import platform
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import torch

from activation_extractor._files import draft, publish, read_whole, sync
from activation_extractor._format._codecs import CODECS, Codec
from activation_extractor._format._entries import entry_name, keep_entry
from activation_extractor._format._safetensors import STORED_DTYPES
from activation_extractor.errors import StoreError

FORMAT = "activation_extractor store"
VERSION = 1
MANIFEST = "manifest.json"
LEAST_ROWS = "least_rows_per_unit"  # of a run whose batches come in another order than their rows
_MOST_VALUES = 2**58  # of a row: its bytes can be counted in 64 bits
DTYPES = {str(one).removeprefix("torch."): one for one in (*STORED_DTYPES, torch.complex128)}


@dataclass(frozen=True)
class Manifest:
    """What a store's manifest says.

    Attributes:
        content: all of it, as it stands in the file.
    """

    content: Mapping[str, Any]

    @property
    def codec(self) -> Codec:
        """The format of the shards."""
        return CODECS[self.content["codec"]]

    @property
    def fingerprint(self) -> dict[str, Any]:
        """What the values depend on, by part."""
        return dict(self.content["fingerprint"])

    @property
    def batches_per_unit(self) -> int | None:
        """How many batches a unit of a data set has; None where that differs, and in a store of with-blocks."""
        batches: int | None = self.content["batches_per_unit"]
        return batches

    @property
    def unit_size(self) -> int | None:
        """How many batches a unit of a data set has, or at least how many rows; None in a store of with-blocks."""
        rows: int | None = self.content.get(LEAST_ROWS)
        return self.batches_per_unit if rows is None else rows

    @property
    def columns(self) -> list[tuple[str, str]]:
        """The layers and reducers of the first unit."""
        return [(column["layer"], column["reducer"]) for column in self.content["columns"]]

    @property
    def entries(self) -> frozenset[str]:
        """The entries that a shard normally has for its columns, kept ones too."""
        kept = (keep_entry(column["name"]) for column in self.content["keep"])
        return frozenset([*(entry_name(*key) for key in self.columns), *kept])


def make_manifest(
    codec: Codec,
    run: Mapping[str, Any],
    columns: Sequence[Mapping[str, Any]],
    keep: Sequence[Mapping[str, Any]],
    ids: str | None,
) -> Manifest:
    """The manifest of a new store.

    Args:
        codec: the format of the shards.
        run: ``fingerprint``, ``batches_per_unit`` or `LEAST_ROWS`, and what else the writer knows.
        columns: layer, reducer, dtype, row shape and raggedness of what its first unit held.
        keep: the same of the kept columns, by name.
        ids: the type of the row ids, ``"str"`` or ``"int"``; None when there are none.
    """
    versions = {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "numpy": np.__version__,
        "safetensors": safetensors.__version__,
    }
    head = {"format": FORMAT, "version": VERSION, "codec": codec.name}
    columns_of = {"columns": list(columns), "keep": list(keep), "ids": ids}
    return Manifest({**head, **run, **columns_of, "versions": versions})


def write_manifest(folder: Path, manifest: Manifest) -> bool:
    """Write the manifest of a new store, unless there is one; returns whether there was none.

    Raises:
        StoreError: the disk refuses.
    """
    path = folder / MANIFEST
    with draft(path) as beside:
        with open(beside, "xb") as file:
            file.write(json.dumps(manifest.content, indent=1, ensure_ascii=False).encode())
            sync(file)
        return publish(beside, path)


def has_manifest(folder: Path) -> bool:
    """Whether a folder is a store, as far as its file names tell."""
    return os.path.lexists(folder / MANIFEST)


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a store.

    Raises:
        StoreError: there is none, it is damaged, or a newer version of the library wrote it.
    """
    path = folder / MANIFEST
    try:
        content = json.loads(read_whole(path))
    except (FileNotFoundError, NotADirectoryError) as error:
        got = "a folder without manifest.json" if folder.is_dir() else "a file" if folder.exists() else "no such folder"
        raise StoreError(folder, "be a store", got, "Give the folder that was given as out= or sink=.") from error
    except (OSError, ValueError, RecursionError) as error:
        got = str(error) if type(error) is ValueError else type(error).__name__
        raise StoreError(path, "be a readable manifest", got, "Restore it from a copy.") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise StoreError(path, "be the manifest of a store", "something else", "Give the folder of a store.")
    if content.get("version") != VERSION:
        got = f"version {content.get('version')!r}"
        raise StoreError(path, f"be of version {VERSION}", got, "Update activation_extractor.")
    fault = _fault(content)
    if fault:
        raise StoreError(path, "tell what the store is", f"no usable {fault!r}", "Restore it from a copy.")
    return Manifest(content)


def store_name(fingerprint: Mapping[str, Any]) -> str:
    """What the shards of a run say that they belong to."""
    return f"{zlib.crc32(json.dumps(fingerprint, sort_keys=True).encode()):08x}"


def _fault(content: Mapping[str, Any]) -> str | None:
    """The first member of a manifest that is not what it should be."""
    batches, rows = content.get("batches_per_unit", 0), content.get(LEAST_ROWS)
    is_well = {
        "codec": isinstance(content.get("codec"), str) and content["codec"] in CODECS,
        "fingerprint": isinstance(content.get("fingerprint"), dict),
        "batches_per_unit": batches is None or (type(batches) is int and batches > 0),
        LEAST_ROWS: rows is None or (type(rows) is int and rows > 0),
        "columns": _are_columns(content.get("columns"), ("layer", "reducer")),
        "keep": _are_columns(content.get("keep"), ("name",)) and all(map(_is_kept, content["keep"])),
        "ids": content.get("ids", 0) in ("str", "int", None),
    }
    return next((name for name, well in is_well.items() if not well), None)


def _are_columns(columns: Any, names: tuple[str, ...]) -> bool:
    return isinstance(columns, list) and all(_is_column(column, names) for column in columns)


def _is_column(column: Any, names: tuple[str, ...]) -> bool:
    if not isinstance(column, dict) or not all(isinstance(column.get(name), str) for name in names):
        return False
    dtype, shape = column.get("dtype"), column.get("row_shape")
    return isinstance(dtype, str) and dtype in DTYPES and _is_shape(shape) and isinstance(column.get("ragged"), bool)


def _is_kept(column: Mapping[str, Any]) -> bool:
    """Whether a kept column that is ragged is the bytes of text: nothing else of its kind is kept."""
    return not column["ragged"] or (column["dtype"] == "uint8" and not column["row_shape"])


def _is_shape(shape: Any) -> bool:
    if not isinstance(shape, list) or not all(type(size) is int and size >= 0 for size in shape):
        return False
    return bool(math.prod(max(size, 1) for size in shape) < _MOST_VALUES)
