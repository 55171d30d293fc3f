"""Shards: the files of a store that hold rows. One that is there is complete and is never rewritten.

A unit's shard is ``shards/<unit>.safetensors`` or ``.npz``, or a folder ``shards/<unit>.npy``. Units of a data set are
named by their number, those of a with-block ``<writer>-<number>``.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from activation_extractor._files import TruncatedError, draft, publish
from activation_extractor._format._codecs import Codec
from activation_extractor._format._entries import IDS, OFFSETS, ROWS, column_key, is_index, kept_name
from activation_extractor._format._fields import Field
from activation_extractor._format._headers import SEAL, Contents, Entries, Extent
from activation_extractor._format._journal import JournalRecord
from activation_extractor.errors import StoreError

SHARDS = "shards"
_MOST_BARE_ROWS = 2**20  # of a shard whose rows have no bytes that could bear witness to their number
REPAIR = "Restore it from a copy, or delete it and extract again."
_NO_LINK = "Copy what it points to in its place."


@dataclass(frozen=True)
class Shard:
    """The header of a shard, checked.

    Attributes:
        path: the file or folder.
        rows: how many rows it has.
        about: what its writer noted: unit, rows, store, seal; of a data set's unit also batches and inputs.
        extents: where the values of each entry lie.
    """

    path: Path
    rows: int
    about: Mapping[str, str]
    extents: Mapping[str, Extent]

    @property
    def columns(self) -> list[str]:
        """The entries that are columns, kept ones too, in the order of the file."""
        return [name for name in self.extents if name != IDS and not is_index(name)]

    def count(self, entry: str) -> int:
        """How many rows a column has here."""
        if entry + OFFSETS in self.extents:
            return self.extents[entry + OFFSETS].shape[0] - 1
        return self.extents[entry].shape[0]

    def field(self, entry: str) -> Field:
        """What a column is here; its key is the entry itself where no writer gives such names."""
        dtype, shape = self.extents[entry].dtype, self.extents[entry].shape[1:]
        return Field(column_key(entry) or kept_name(entry) or entry, dtype, shape, entry + OFFSETS in self.extents)

    def record(self, nbytes: int, regular: frozenset[str]) -> JournalRecord:
        """What a journal says of this shard.

        Args:
            nbytes: its size on disk.
            regular: the entries of the columns that a shard of this store normally has; where this one differs, its
                columns are listed with their rows.
        """
        counts = {entry: self.count(entry) for entry in self.columns}
        is_regular = counts.keys() == regular and set(counts.values()) == {self.rows}
        unit, seal = self.about["unit"], self.about[SEAL]
        return JournalRecord(unit, self.rows, nbytes, seal, None if is_regular else counts)


def shard_path(folder: Path, unit: str, codec: Codec) -> Path:
    """Where the shard of a unit lies."""
    return folder / SHARDS / (unit + codec.suffix)


def unit_name(number: int, writer: str | None = None) -> str:
    """A unit's name: its number in the data set, or behind the name of the with-block's writer."""
    return f"{number:08d}" if writer is None else f"{writer}-{number:08d}"


def list_units(folder: Path, codec: Codec) -> list[str]:
    """The units whose shards are there, in order; every other file is passed over.

    Raises:
        StoreError: something there, or the folder of shards, is a link.
    """
    entries = scan_shards(folder)
    for link in filter(os.DirEntry.is_symlink, entries):
        raise StoreError(link.path, "be a file of the store's own", "a link", _NO_LINK)
    matches = map(_pattern(codec).fullmatch, [entry.name for entry in entries])
    return sorted([match[1] for match in matches if match])


def is_shard(name: str, codec: Codec) -> bool:
    """Whether a file of this name is a shard of a store of this codec."""
    return _pattern(codec).fullmatch(name) is not None


def _pattern(codec: Codec) -> re.Pattern[str]:
    return re.compile(rf"((?:[0-9]{{8}}T[0-9]{{12}}-[0-9a-f]{{8}}-)?[0-9]{{8}}){re.escape(codec.suffix)}")


def scan_shards(folder: Path) -> list[os.DirEntry[str]]:
    """What lies in a store's folder of shards; nothing when there is none.

    Raises:
        StoreError: it is a link, or cannot be read.
    """
    path = folder / SHARDS
    if path.is_symlink():
        raise StoreError(path, "be a folder of the store's own", "a link", _NO_LINK)
    try:
        return list(os.scandir(path))
    except FileNotFoundError:
        return []
    except OSError as error:
        raise StoreError(path, "be a folder", error.strerror or str(error), "Give the folder of a store.") from error


def read_shard(path: Path, codec: Codec) -> Shard:
    """The header of a shard, every number of it checked against the file and against the others.

    Raises:
        StoreError: it is damaged, gone, or no shard.
    """
    try:
        return _checked(path, codec.read(path), path.name.removesuffix(codec.suffix))
    except Exception as error:  # whatever a parser makes of bytes that anybody may have written
        raise unreadable(path, error) from error


def unreadable(path: str | Path, error: Exception) -> StoreError:
    """What to tell of a shard that cannot be read: that it is damaged, or that the system does not let us."""
    if isinstance(error, OSError):
        name = os.path.basename(str(error.filename or ""))
        where = f" ({name!r})" if name and name != os.path.basename(path) else ""
        advice = REPAIR if isinstance(error, FileNotFoundError) else "Check the disk, permissions and open files."
        return StoreError(path, "be a readable shard", f"{error.strerror or error}{where}", advice)
    reason = str(error) if type(error) in (ValueError, TruncatedError) else f"no such header ({error!r:.80})"
    return StoreError(path, "be a readable shard", reason, REPAIR)


def write_shard(folder: Path, codec: Codec, unit: str, entries: Entries, about: Mapping[str, str]) -> int | None:
    """Write a unit as a shard that appears whole or not at all.

    Returns:
        Its size in bytes; None when another writer had written the same rows already, which stay.

    Raises:
        StoreError: the disk refuses, or another writer has written other rows.
    """
    path = shard_path(folder, unit, codec)
    with draft(path) as beside:
        sealed = codec.write(beside, entries, {"unit": unit, **about})
        nbytes = size_of(beside)
        if publish(beside, path):
            return nbytes
    if read_shard(path, codec).about[SEAL] != sealed:
        advice = "Give each run a folder of its own."
        raise StoreError(path, "hold what this run computed", "other values, from another writer", advice)
    return None


def size_of(path: Path) -> int:
    """The size in bytes of a shard."""
    files = path.iterdir() if path.is_dir() else [path]
    return sum(one.lstat().st_size for one in files)


def _checked(path: Path, contents: Contents, unit: str) -> Shard:
    about, extents = contents.about, contents.extents
    if not all(isinstance(value, str) for value in about.values()):
        raise ValueError("notes that are no text")
    contents.check_seal()
    if about["unit"] != unit:
        raise ValueError(f"the shard of unit {about['unit']!r}")
    shard = Shard(path, int(about["rows"]), about, extents)
    if str(shard.rows) != about["rows"] or not 0 <= shard.rows < 2**63:
        raise ValueError(f"{about['rows']!r} rows")
    if shard.rows > _MOST_BARE_ROWS and not any(extent.stop > extent.start for extent in extents.values()):
        raise ValueError(f"{shard.rows} rows without a byte")
    for name, extent in extents.items():
        _check_entry(name, extent, extents)
    for name in [*shard.columns, *([IDS] if IDS in extents else [])]:
        rows = extents[name + ROWS].shape[0] if name + ROWS in extents else shard.rows
        if shard.count(name) != rows:
            raise ValueError(f"{shard.count(name)} rows of {name!r} in place of {rows}")
    return shard


def _check_entry(name: str, extent: Extent, extents: Mapping[str, Extent]) -> None:
    if is_index(name):
        base = name.removesuffix(OFFSETS).removesuffix(ROWS)
        if extent.dtype != torch.int64 or len(extent.shape) != 1 or base not in extents:
            raise ValueError(f"{name!r}, which is no index")
    elif name == IDS:
        dtype = torch.uint8 if IDS + OFFSETS in extents else torch.int64
        if extent.dtype != dtype or len(extent.shape) != 1:
            raise ValueError("ids that are neither text nor integers")
    elif not extent.shape:
        raise ValueError(f"{name!r}, which has no rows")
    elif column_key(name) is None and kept_name(name) is None:
        raise ValueError(f"{name!r}, which is no entry of a store")
