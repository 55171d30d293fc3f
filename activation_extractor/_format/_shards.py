"""Shards: the files of a store that hold rows. A shard appears complete and is never rewritten.

A unit's shard is ``shards/<unit>.safetensors`` or ``.npz``, or a folder ``shards/<unit>.npy``. Units of a data set are
named by their number, those of a with-block ``<writer>-<number>``.
"""

from __future__ import annotations

import dataclasses
import math
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from activation_extractor._creation import create
from activation_extractor._files import TruncatedError, draft, publish
from activation_extractor._format._codecs import Codec
from activation_extractor._format._entry_names import IDS, OFFSETS, ROWS, column_key, is_index, kept_name
from activation_extractor._format._fields import Field
from activation_extractor._format._headers import SEAL, Entries, Extent, Form, Header, form_of
from activation_extractor._format._journal import JournalRecord
from activation_extractor._format._safetensors import shard_in_chunks
from activation_extractor._storage import RemotePath, scan, size_of_file
from activation_extractor.errors import StoreError

SHARDS = "shards"
_LAST_UNIT = 10**8 - 1  # eight digits
_MAX_EMPTY_ROWS = 2**20  # of a shard without values: no file size limits how many rows its header claims
REPAIR = "Restore it from a copy, or delete it and extract again."
_COUNTS, _ROWS = "counts", "rows"  # remembered of a form: the rows of each column, and of shards it was checked for
_UNIT = r"(?:[0-9]{8}T[0-9]{12}-[0-9a-f]{8}-)?[0-9]{8}"
_NO_LINK = "Copy what it points to in its place."


@dataclass(frozen=True)
class Shard:
    """A shard, a file or folder, whose header was checked."""

    path: Path
    rows: int
    metadata: Mapping[str, str]  # unit, rows, store and seal; for a unit of a data set also batches and inputs
    extents: Mapping[str, Extent]  # by entry
    form: Form | None = dataclasses.field(default=None, compare=False)  # of the entries, where it is known already

    @cached_property
    def counts(self) -> Mapping[str, int]:
        """How many rows of each column and kept column the shard holds, by entry, in the order of the file."""
        form = self.form or form_of(self.extents)
        if _COUNTS not in form.known:
            names = [name for name in form.entries if name != IDS and not is_index(name)]
            form.known[_COUNTS] = {name: count(form, name) for name in names}
        found: Mapping[str, int] = form.known[_COUNTS]
        return found

    @property
    def columns(self) -> list[str]:
        """The entries of columns and kept columns, in the order of the file."""
        return list(self.counts)

    def count(self, entry: str) -> int:
        """How many rows of a column the shard holds."""
        return self.counts[entry]

    def is_regular(self, regular: frozenset[str]) -> bool:
        """Whether the shard has just these columns, and each of them has all rows."""
        form, key = self.form or form_of(self.extents), (regular, self.rows)
        if key not in form.known:
            form.known[key] = self.counts.keys() == regular and set(self.counts.values()) == {self.rows}
        return bool(form.known[key])

    def field(self, entry: str) -> Field:
        """What a column is, as the shard holds it."""
        dtype, shape = self.extents[entry].dtype, self.extents[entry].shape[1:]
        return Field(column_key(entry) or kept_name(entry) or "", dtype, shape, entry + OFFSETS in self.extents)

    def record(self, nbytes: int, regular: frozenset[str]) -> JournalRecord:
        """The journal's record of the shard, which takes `nbytes` on disk.

        It holds the rows of each column where the columns are not the `regular` ones, which the manifest lists, or one
        of them has fewer rows than the shard.
        """
        counts = None if self.is_regular(regular) else dict(self.counts)
        unit, seal = self.metadata["unit"], self.metadata[SEAL]
        return JournalRecord(unit, self.rows, nbytes, seal, counts)


def shard_path(folder: Path, unit: str, codec: Codec) -> Path:
    """The path of a unit's shard."""
    return folder / SHARDS / (unit + codec.suffix)


def unit_name(number: int, writer: str | None = None) -> str:
    """A unit's name: its number; in a with-block, after the name of its writer.

    Raises:
        StoreError: it is the 100,000,001st, whose number has nine digits: readers would pass over its shard.
    """
    if number > _LAST_UNIT:
        advice = "Make units larger: with unit_bytes=, or rows_per_unit=."
        raise StoreError("a store", f"have at most {_LAST_UNIT + 1:,} units", f"number {number:,}", advice)
    return f"{number:08d}" if writer is None else f"{writer}-{number:08d}"


def list_units(folder: Path, codec: Codec) -> list[str]:
    """The units that have a shard, in order; every other file is passed over.

    Raises:
        StoreError: the folder of shards, or something in it, is a link.
    """
    entries = scan_shards(folder)
    for link in [entry for entry in entries if entry.is_symlink()]:
        raise StoreError(link.path, "be a file of the store's own", "a link", _NO_LINK)
    names = [entry.name for entry in entries]
    if not re.fullmatch(f"(?:{_pattern(codec)}/)*", "/".join([*names, ""])):  # half the time of one match a name
        names = [name for name in names if is_shard(name, codec)]
    end = -len(codec.suffix)
    return sorted([name[:end] for name in names])


def is_shard(name: str, codec: Codec) -> bool:
    """Whether a file of this name is a shard of a store of this codec."""
    return re.fullmatch(_pattern(codec), name) is not None


def is_unit(name: str) -> bool:
    """Whether a unit can have this name."""
    return re.fullmatch(_UNIT, name) is not None


def _pattern(codec: Codec) -> str:
    """The names of shards: a unit's, and the suffix."""
    return _UNIT + re.escape(codec.suffix)


def scan_shards(folder: Path) -> list[Any]:
    """What lies in a store's folder of shards; an empty list where the store has no such folder.

    Raises:
        StoreError: the folder is a link, or cannot be read.
    """
    path = folder / SHARDS
    if path.is_symlink():
        raise StoreError(path, "be a folder of the store's own", "a link", _NO_LINK)
    try:
        return scan(path)
    except FileNotFoundError:
        return []
    except OSError as error:
        raise StoreError(path, "be a folder", error.strerror or str(error), "Give the folder of a store.") from error


def read_shard(path: Path, codec: Codec, *opened: Any) -> Shard:
    """Read the header of a shard, and check each number in it against the file and the other numbers.

    A descriptor may follow, where the file is open and the codec ``reads_open_files``; or its header and size.

    Raises:
        StoreError: the shard is damaged, gone, or of another format.
    """
    try:
        return _checked(path, codec.read(path, *opened), path.name.removesuffix(codec.suffix))
    except StoreError:  # of the place where all shards lie
        raise
    except Exception as error:  # damaged bytes make the parsers of json, zipfile and numpy raise errors of any type
        raise unreadable(path, error) from error


def unreadable(path: str | Path, error: Exception) -> StoreError:
    """The error for a shard that cannot be read: it is damaged, or the system refuses."""
    if isinstance(error, OSError):
        name = os.path.basename(str(error.filename or ""))
        where = f" ({name!r})" if name and name != os.path.basename(path) else ""
        advice = REPAIR if isinstance(error, FileNotFoundError) else "Check the disk, permissions and open files."
        return StoreError(path, "be a readable shard", f"{error.strerror or error}{where}", advice)
    reason = str(error) if type(error) in (ValueError, TruncatedError) else f"a header of another form ({error!r:.80})"
    return StoreError(path, "be a readable shard", reason, REPAIR)


def write_shard(
    folder: Path,
    codec: Codec,
    unit: str,
    entries: Entries,
    metadata: Mapping[str, str],
    is_same: Callable[[Entries], bool] = lambda _: False,
) -> tuple[Shard, int] | None:
    """Write a unit as a shard that appears whole or not at all; returns it, and its size in bytes.

    Where another writer had written a shard of the same rows, that one stays, and the result is None. Its bytes may be
    others where `is_same`, which is called with the entries, says that they are as good.

    Raises:
        StoreError: the disk or the bucket refuses, or another writer has written other rows.
    """
    path = shard_path(folder, unit, codec)
    is_new, nbytes, seal, opened = _create(path, codec, entries, {"unit": unit, **metadata})
    if is_new:
        return read_shard(path, codec, *opened), nbytes
    found = read_shard(path, codec)
    if found.metadata[SEAL] != seal and not is_same(entries):
        advice = "Give each run a folder of its own; where several share one on purpose, call again to go on."
        raise StoreError(path, "hold what this run computed", "other values from another writer", advice)
    # An object may be the very one that was put here, where the bucket's first answer was lost.
    return (found, nbytes) if found.metadata[SEAL] == seal and isinstance(path, RemotePath) else None


def _create(path: Path, codec: Codec, entries: Entries, metadata: Mapping[str, str]) -> tuple[bool, int, str, Any]:
    """Write a shard at a path, if it is free.

    Returns whether it was, the shard's size in bytes, its seal, and what `read_shard` needs not to ask a bucket for it.
    """
    if isinstance(path, RemotePath):
        seal, chunks = shard_in_chunks(entries, metadata)
        nbytes = sum(map(len, chunks))
        return create(path, chunks), nbytes, seal, [(chunks[0], nbytes)]
    with draft(path) as beside:
        seal = codec.write(beside, entries, metadata)
        nbytes = size_of(beside)
        return publish(beside, path), nbytes, seal, []


def size_of(path: Path) -> int:
    """The size in bytes of a shard."""
    files = path.iterdir() if path.is_dir() else [path]
    return sum(size_of_file(file) for file in files)


def count(form: Form, entry: str) -> int:
    """How many rows of an entry shards of a form hold."""
    offsets = form.entries.get(entry + OFFSETS)
    (_, shape), lacking = form.entries[entry], 0 if offsets is None else 1
    return (shape if offsets is None else offsets[1])[0] - lacking


def _checked(path: Path, header: Header, unit: str) -> Shard:
    metadata, form = header.metadata, header.form or form_of(header.extents)
    if not set(map(type, metadata.values())) <= {str}:
        raise ValueError("metadata that is not text")
    header.check_seal()
    if metadata["unit"] != unit:
        raise ValueError(f"the shard of unit {metadata['unit']!r}")
    rows = int(metadata["rows"])
    if str(rows) != metadata["rows"] or not 0 <= rows < 2**63:
        raise ValueError(f"{metadata['rows']!r} rows")
    if form.known.get(_ROWS) != rows:
        _check_form(form, rows)
        form.known[_ROWS] = rows
    return Shard(path, rows, metadata, header.extents, form)


def _check_form(form: Form, rows: int) -> None:
    """Raise a ValueError where entries do not belong together in a shard of so many rows."""
    if rows > _MAX_EMPTY_ROWS and not any(math.prod(shape) for _, shape in form.entries.values()):
        raise ValueError(f"{rows} rows without values")
    for name, (dtype, shape) in form.entries.items():
        _check_entry(name, dtype, shape, form)
    for name in form.entries:
        if not is_index(name):
            held = form.entries.get(name + ROWS)
            if count(form, name) != (rows if held is None else held[1][0]):
                of = rows if held is None else held[1][0]
                raise ValueError(f"{count(form, name)} rows of {name!r} in place of {of}")


def _check_entry(name: str, dtype: torch.dtype, shape: tuple[int, ...], form: Form) -> None:
    if is_index(name):
        base = name.removesuffix(OFFSETS).removesuffix(ROWS)
        if dtype != torch.int64 or len(shape) != 1 or base not in form.entries:
            raise ValueError(f"{name!r}, which is not the index of a column")
    elif name == IDS:
        if dtype != (torch.uint8 if IDS + OFFSETS in form.entries else torch.int64) or len(shape) != 1:
            raise ValueError("ids that are neither text nor integers")
    elif not shape:
        raise ValueError(f"{name!r}, which has no rows")
    elif column_key(name) is None and kept_name(name) is None:
        raise ValueError(f"{name!r}, which is not the name of an entry")
