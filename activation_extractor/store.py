"""Reading what was saved: `open_store` and the `Store` that it returns."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from activation_extractor import _manifest, _tables
from activation_extractor._columns import Column, Part, read_entry
from activation_extractor._formats import unescape
from activation_extractor._keys import EntryKey, entry_keys, resolve_key
from activation_extractor._steps import RowId
from activation_extractor.errors import ActivationNotFoundError, StoreError

__all__ = ["Column", "Store", "open_store"]


def open_store(path: str | os.PathLike[str]) -> Store:
    """Open a folder that ``capture(..., sink=path)`` or ``extract(..., out=path)`` wrote.

    Only the manifest and the shards' headers are read. A store that is still being written opens to the units that
    are complete.

    Args:
        path: the folder.

    Raises:
        StoreError: it is not a store, a newer version wrote it, or a shard is damaged.

    Example:
        >>> import tempfile, torch
        >>> from torch import nn
        >>> from activation_extractor import capture, open_store
        >>> model, folder = nn.Sequential(nn.Linear(4, 8)), tempfile.mkdtemp()
        >>> with capture(model, "0", sink=folder) as acts:
        ...     with acts.step(ids=["a", "b"]):
        ...         _ = model(torch.randn(2, 4))
        >>> store = open_store(folder)
        >>> store["0"]
        Column(('0', 'full'), (2, 8), float32)
        >>> store.ids
        ['a', 'b']
    """
    return Store(Path(path))


class Store(Mapping[Any, Column]):
    """A store: lazy columns by layer and reducer, the row ids, and kept columns.

    ``store[layer, reducer]`` always works; ``store[layer]`` is short for the only reducer. Iteration gives names when
    there is one reducer, ``(name, reducer)`` pairs otherwise.

    Attributes:
        path: the folder.
        manifest: what its writer noted: columns, options, versions.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.manifest = _manifest.read_manifest(path)
        self._shards = [_Shard(shard) for shard in _manifest.shards_of(path)]
        self._starts: dict[Path, int] = {}
        self._rows = 0
        for shard in self._shards:
            self._starts[shard.path] = self._rows
            self._rows += shard.rows
        entries = dict.fromkeys(entry for shard in self._shards for entry in shard.shapes)
        listed = [(column["layer"], column["reducer"]) for column in self.manifest["columns"]]
        found = [key for entry in entries if (key := _manifest.column_key(entry))]
        self._keys = [key for key in dict.fromkeys([*listed, *found]) if key in found]

    @property
    def names(self) -> list[str]:
        """The recorded names."""
        return list(dict.fromkeys(name for name, _ in self._keys))

    @property
    def reducers(self) -> list[str]:
        """The reducers' names."""
        return list(dict.fromkeys(reducer for _, reducer in self._keys))

    @property
    def rows(self) -> int:
        """How many samples there are."""
        return self._rows

    @property
    def ids(self) -> list[RowId]:
        """The ids of all rows; row numbers where the writer was given none."""
        return [one for shard in self._shards for one in shard.ids(self._starts[shard.path])]

    @property
    def keep(self) -> dict[str, Column]:
        """The kept columns, by name."""
        entries = dict.fromkeys(entry for shard in self._shards for entry in shard.shapes)
        kept = [entry for entry in entries if entry.startswith(_manifest.KEEP) and not _is_index(entry)]
        return {unescape(entry.removeprefix(_manifest.KEEP)): self._column(entry, entry) for entry in kept}

    @property
    def nbytes(self) -> int:
        """Bytes on disk."""
        return sum(shard.path.stat().st_size for shard in self._shards)

    def __getitem__(self, key: Any) -> Column:
        """The column of a layer.

        Raises:
            ActivationNotFoundError: there is none, or which reducer is meant is not said.
        """
        resolved = resolve_key(key, self.names, self.reducers)
        if resolved not in self._keys:
            raise ActivationNotFoundError(key, f"The store must hold {resolved!r} to read it, got no such column.")
        return self._column(_manifest.column_entry(*resolved), resolved)

    def __iter__(self) -> Iterator[EntryKey]:
        return (key for key in entry_keys(self.names, self.reducers) if isinstance(key, str) or key in self._keys)

    def __len__(self) -> int:
        return len(self._keys)

    def __repr__(self) -> str:
        rows = []
        for key in self:
            column = self[key]
            name, reducer = key if isinstance(key, tuple) else (key, "")
            rows.append((name, reducer, str(column.shape), str(column.dtype).removeprefix("torch.")))
        return _tables.table(f"Store {str(self.path)!r} of {self.rows} rows", rows, self.nbytes)

    def _column(self, entry: str, name: Any) -> Column:
        parts = [shard.part(entry, self._starts[shard.path]) for shard in self._shards if entry in shard.shapes]
        shard = next(shard for shard in self._shards if entry in shard.shapes)
        sample = read_entry(shard.path, entry, 0, 0)
        return Column(name, parts, sample.dtype, tuple(sample.shape[1:]))


class _Shard:
    """The header of one shard."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with safe_open(path, framework="pt") as shard:
                self.rows = int(shard.metadata()["rows"])
                self.shapes = {entry: tuple(shard.get_slice(entry).get_shape()) for entry in shard.keys()}  # noqa: SIM118
        except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
            advice = "Restore it from a copy, or delete it and extract again."
            raise StoreError(path, "be a readable shard", str(error), advice) from error

    def part(self, entry: str, first_row: int) -> Part:
        """What this shard holds of a column, when its rows begin at `first_row` of the store."""
        offsets = entry + _manifest.OFFSETS if entry + _manifest.OFFSETS in self.shapes else None
        count = self.shapes[offsets][0] - 1 if offsets else self.shapes[entry][0]
        index = entry + _manifest.ROWS
        rows = read_entry(self.path, index) if index in self.shapes else torch.arange(count)
        return Part(self.path, entry, count, offsets, rows + first_row)

    def ids(self, first_row: int) -> list[RowId]:
        """The ids of this shard's rows."""
        if _manifest.IDS not in self.shapes:
            return list(range(first_row, first_row + self.rows))
        values = read_entry(self.path, _manifest.IDS)
        if _manifest.IDS + _manifest.OFFSETS not in self.shapes:
            return list(values.tolist())
        return _texts(values, read_entry(self.path, _manifest.IDS + _manifest.OFFSETS))


def _texts(values: Tensor, offsets: Tensor) -> list[RowId]:
    joined, ends = bytes(values.tolist()), offsets.tolist()
    return [joined[start:stop].decode() for start, stop in itertools.pairwise(ends)]


def _is_index(entry: str) -> bool:
    return entry.endswith((_manifest.OFFSETS, _manifest.ROWS))
