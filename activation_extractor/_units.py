"""A unit of a store: whole steps gathered until they are written as one shard."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from activation_extractor import _manifest
from activation_extractor._formats import check_dtype, make_folders, stream_safetensors, temporary
from activation_extractor._steps import Ragged, RowId, Step
from activation_extractor._values import ordinary
from activation_extractor.errors import StoreError

Spec = tuple[torch.dtype, tuple[int, ...], bool]  # dtype, shape of a row (of a position, when ragged), ragged


def check_free(path: Path) -> None:
    """Make sure that a folder can become a new store, without touching it.

    Raises:
        StoreError: it is a file, or holds something.
    """
    try:
        names = [entry.name for entry in path.iterdir()] if path.exists() else []
        # An empty folder of shards is what a run leaves that ended before its first unit.
        is_free = not names or (names == [_manifest.SHARDS] and not any((path / _manifest.SHARDS).iterdir()))
    except OSError as error:
        raise StoreError(path, "be a folder", error.strerror or str(error), "Choose another folder.") from error
    if not is_free:
        raise StoreError(path, "be a new or empty folder", "one that holds something", "Choose another folder.")


def make_folder(path: Path) -> None:
    """Make the folders of a new store.

    Raises:
        StoreError: they cannot be made, or another writer has made them.
    """
    check_free(path)
    make_folders(path / _manifest.SHARDS)


class _Column:
    """The chunks of one column of a unit, and which rows they are of."""

    def __init__(self) -> None:
        self.chunks: list[Tensor] = []
        self.lengths: list[Tensor] = []
        self.rows: list[Tensor] = []

    def add(self, value: Tensor | Ragged, first_row: int) -> int:
        """Add a step's rows; returns their size in bytes."""
        chunk = value.values if isinstance(value, Ragged) else value
        if isinstance(value, Ragged):
            self.lengths.append(value.lengths)
        host = ordinary(chunk.detach()).cpu()
        self.chunks.append(host)
        count = len(value.lengths) if isinstance(value, Ragged) else len(chunk)
        self.rows.append(torch.arange(first_row, first_row + count))
        return host.numel() * host.element_size()

    def entries(self, name: str, unit_rows: int) -> dict[str, Any]:
        """What goes into the shard for this column, as chunks."""
        entries: dict[str, Any] = {name: self.chunks}
        if self.lengths:
            entries[name + _manifest.OFFSETS] = [_offsets(torch.cat(self.lengths))]
        if sum(map(len, self.rows)) < unit_rows:
            entries[name + _manifest.ROWS] = self.rows
        return entries


class Unit:
    """Consecutive whole steps that become one shard.

    Args:
        number: the unit's place in the store.
        specs: dtypes and row shapes that the store's columns have so far.
        id_type: the type that the store's ids have so far, under the key ``type``.
    """

    def __init__(
        self, number: int, specs: dict[str, Spec] | None = None, id_type: dict[str, str] | None = None
    ) -> None:
        self.rows = self.nbytes = 0
        self._number, self._specs = number, {} if specs is None else specs
        self._id_type = {} if id_type is None else id_type
        self._columns: dict[str, _Column] = {}
        self._keys: dict[str, tuple[str, str]] = {}
        self._ids: list[RowId] = []

    def next(self, *, is_same: bool = False) -> Unit:
        """An empty unit to follow this one, or to take its place."""
        return Unit(self._number + (not is_same), self._specs, self._id_type)

    def add(self, step: Step) -> int:
        """Add a step, whole or not at all; returns the size in bytes of its columns.

        Raises:
            StoreError: a column changed its dtype or row shape.
            ArgumentError: a column has a dtype that the format lacks.
        """
        columns: dict[str, Tensor | Ragged] = {_manifest.keep_entry(name): one for name, one in step.keep.items()}
        keys = {_manifest.column_entry(*key): key for key in step.values}
        columns |= {name: step.values[key] for name, key in keys.items()}
        specs = {name: self._spec(name, value) for name, value in columns.items()}
        self._check_id_type(step)
        self._specs |= specs
        self._keys |= keys
        before = self.nbytes
        for name, value in columns.items():
            self.nbytes += self._columns.setdefault(name, _Column()).add(value, self.rows)
        self._ids += step.ids or ()
        self.rows += step.rows
        return self.nbytes - before

    def commit(self, folder: Path, about: Mapping[str, Any]) -> None:
        """Write the unit as a shard, and before the first one the manifest.

        Raises:
            StoreError: the disk refuses, or another writer was here.
        """
        if not (folder / _manifest.MANIFEST).exists():
            _manifest.write_manifest(folder, about, self._describe())
        entries: dict[str, Any] = self._id_entries()
        for name, column in self._columns.items():
            entries |= column.entries(name, self.rows)
        path = folder / _manifest.SHARDS / _manifest.shard_name(self._number)
        with temporary(path) as (file, draft):
            stream_safetensors(file, entries, {"unit": path.stem, "rows": str(self.rows)})
            file.flush()
            os.fsync(file.fileno())
            _manifest.publish(draft, path)

    def _check_id_type(self, step: Step) -> None:
        """Ids are of one type in the whole store, or there are none in all of it."""
        if not step.rows:
            return
        kind = type(step.ids[0]).__name__ if step.ids else "none"
        known = self._id_type.setdefault("type", kind)
        if "none" in (kind, known) and kind != known:
            raise StoreError("ids", "be given for every step or for none", "some", "Give each step its ids.")
        if kind != known:
            raise StoreError("ids", "be of one type in a store", f"{kind} after {known}", "Convert one of them.")

    def _spec(self, name: str, value: Tensor | Ragged) -> Spec:
        is_ragged = isinstance(value, Ragged)
        chunk = value.values if isinstance(value, Ragged) else value
        spec = (chunk.dtype, tuple(chunk.shape[1:]), is_ragged)
        known = self._specs.get(name, spec)
        check_dtype(chunk.dtype)
        if known != spec:
            advice = "Reduce it, or capture with batches of one shape."
            got = f"{spec[0]} {spec[1]} after {known[0]} {known[1]}"
            raise StoreError(name, "keep one dtype and row shape in a store", got, advice)
        return spec

    def _id_entries(self) -> dict[str, Any]:
        if not self._ids:
            return {}
        if isinstance(self._ids[0], int):
            return {_manifest.IDS: torch.tensor(self._ids, dtype=torch.int64)}
        texts = [str(one).encode() for one in self._ids]
        joined = torch.frombuffer(bytearray(b"".join(texts)) or bytearray(1), dtype=torch.uint8)
        offsets = _offsets(torch.tensor([len(text) for text in texts]))
        return {_manifest.IDS: joined[: int(offsets[-1])], _manifest.IDS + _manifest.OFFSETS: offsets}

    def _describe(self) -> list[dict[str, Any]]:
        described = []
        for name, (layer, reducer) in self._keys.items():
            dtype, shape, is_ragged = self._specs[name]
            text = str(dtype).removeprefix("torch.")
            described.append(
                {"layer": layer, "reducer": reducer, "dtype": text, "row_shape": list(shape), "ragged": is_ragged}
            )
        return described


def _offsets(lengths: Tensor) -> Tensor:
    return torch.cat([torch.zeros(1, dtype=torch.int64), lengths.to(torch.int64).cumsum(0)])
