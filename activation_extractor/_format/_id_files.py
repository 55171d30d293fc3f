"""Files with the digests of a store's ids, so that who adds rows need not read the ids of all shards.

Each is ``ids/<name>.safetensors``: ``digests`` ``(ids, 16)`` bytes in rising order; ``fences``, every 256th of them;
and ``units``, the names of the units whose ids these are, a line each. They are a cache, of stores of with-blocks
alone: shards whose unit no file names are read, and a file that names a unit without a shard is not used.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from contextlib import suppress
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from activation_extractor._creation import create, make_ready, remove
from activation_extractor._files import open_regular, read_at
from activation_extractor._format._safetensors import read_safetensors_shard, shard_in_chunks
from activation_extractor._format._seen_ids import DIGEST_BYTES, Digests, contains, digest_of, merged
from activation_extractor._format._stored_rows import RowId
from activation_extractor._storage import RemoteFile, RemotePath, names_in
from activation_extractor.errors import StoreError

IDS_FOLDER = "ids"
_SUFFIX = ".safetensors"
_BLOCK = 256  # digests from one fence to the next: 4 KiB, which are read for an id that is looked up
_DTYPE = f"S{DIGEST_BYTES}"


class IdFile:
    """A file of digests, in which an id is looked up by reading 4 KiB; the whole is read after many of them.

    Attributes:
        path: the file.
        units: the units whose ids it holds.

    Raises:
        OSError: it cannot be read.
        ValueError: it is damaged.
    """

    def __init__(self, path: Path) -> None:
        header = read_safetensors_shard(path)
        header.check_seal()
        digests, fences, units = (header.extents[name] for name in ("digests", "fences", "units"))
        if digests.shape[1:] != (DIGEST_BYTES,) or fences.shape != (-(-digests.shape[0] // _BLOCK), DIGEST_BYTES):
            raise ValueError("digests of another size")
        self.path, self._count, self._start, self._looked_up = path, digests.shape[0], digests.start, 0
        self._whole: Digests | None = None
        self._object = RemoteFile(path) if isinstance(path, RemotePath) else None
        if self._object is None:
            self._descriptor = open_regular(path)
        self._fences = self._read(fences.start, fences.shape[0])
        self.units = frozenset(self._read_at(units.start, units.stop - units.start).decode().split("\n"))

    def __len__(self) -> int:
        return self._count

    def __del__(self) -> None:
        with suppress(AttributeError, TypeError):  # it was never opened, or the interpreter ends
            os.close(self._descriptor)

    def has(self, asked: Digests) -> npt.NDArray[np.bool_]:
        """Which digests it holds."""
        blocks = np.searchsorted(self._fences, asked, side="right") - 1
        wanted = np.unique(blocks[blocks >= 0])
        self._looked_up += len(wanted)
        if self._whole is not None or self._looked_up * _BLOCK > self._count:
            return contains(self.whole(), asked)
        found = np.zeros(len(asked), dtype=bool)
        for block in wanted.tolist():
            first = block * _BLOCK
            digests = self._read(self._start + first * DIGEST_BYTES, min(_BLOCK, self._count - first))
            found |= (blocks == block) & contains(digests, asked)
        return found

    def whole(self) -> Digests:
        """All digests, in memory."""
        if self._whole is None:
            self._whole = self._read(self._start, self._count)
        return self._whole

    def _read_at(self, start: int, size: int) -> bytes:
        return read_at(self._descriptor, start, size) if self._object is None else self._object.read(start, size)

    def _read(self, start: int, count: int) -> Digests:
        try:
            return np.frombuffer(self._read_at(start, count * DIGEST_BYTES), dtype=_DTYPE)
        except OSError as error:
            advice = "Call again: it reads the shards where these files are gone."
            raise StoreError(self.path, "be readable", error.strerror or str(error), advice) from error


class IdFiles:
    """The files of digests of a store, `units` of which have a shard.

    Attributes:
        left: the units whose ids are in none of them.
    """

    def __init__(self, folder: Path, units: Sequence[str]) -> None:
        self._folder = folder / IDS_FOLDER
        self._files = _read_files(self._folder, frozenset(units))
        covered = frozenset[str]().union(*(file.units for file in self._files))
        self.left = [unit for unit in units if unit not in covered]

    def has(self, ids: Sequence[RowId]) -> list[bool]:
        """Whether each of some ids is in one of them."""
        if not self._files or not ids:
            return [False] * len(ids)
        asked = np.array([digest_of(row_id) for row_id in ids], dtype=_DTYPE)
        return list(np.logical_or.reduce([file.has(asked) for file in self._files]).tolist())

    def add(self, name: str, units: Sequence[str], digests: Digests) -> None:
        """Write a file with the ids of further units; it takes the place of those that are not much longer.

        So there are few, however often rows are added.

        Raises:
            StoreError: the disk refuses.
        """
        replaced, runs, size = [], [digests], len(digests)
        for file in sorted(self._files, key=len):
            if len(file) <= 2 * size:
                replaced.append(file)
                runs.append(file.whole())
                size += len(file)
        named = frozenset(units).union(*(file.units for file in replaced))
        path = self._folder / (name + _SUFFIX)
        _write(path, sorted(named), _once(merged(runs)))
        self._files = [file for file in self._files if file not in replaced] + [IdFile(path)]
        for file in replaced:
            remove(file.path)


def _read_files(folder: Path, units: AbstractSet[str]) -> list[IdFile]:
    """The files that are whole, and name units alone that have a shard."""
    files = []
    for name in _names(folder):
        with suppress(OSError, ValueError, LookupError, TypeError):  # another writer has replaced it, or it is damaged
            file = IdFile(folder / name)
            if file.units <= units:
                files.append(file)
    return files


def _names(folder: Path) -> list[str]:
    with suppress(OSError):
        if not folder.is_symlink():
            return sorted(name for name in names_in(folder) if name.endswith(_SUFFIX))
    return []


def _write(path: Path, units: Sequence[str], digests: Digests) -> None:
    make_ready(path.parent)
    values = torch.from_numpy(digests.view(np.uint8).reshape(-1, DIGEST_BYTES))
    names = torch.frombuffer(bytearray("\n".join(units).encode()), dtype=torch.uint8)
    entries = {"digests": [values], "fences": [values[::_BLOCK].contiguous()], "units": [names]}
    create(path, shard_in_chunks(entries, {"format": "activation_extractor ids", "version": "1"})[1])


def _once(run: Digests) -> Digests:
    """A sorted array in which each digest is once."""
    is_new = np.ones(len(run), dtype=bool)
    is_new[1:] = run[1:] != run[:-1]
    return run if is_new.all() else run[is_new]
