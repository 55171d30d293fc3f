"""Reading what was saved: `open_store` and the `Store` that it returns."""

from __future__ import annotations

import os
from collections.abc import Hashable, Iterable, Iterator, Sequence
from functools import cached_property
from itertools import accumulate, chain
from pathlib import Path
from typing import Any

from activation_extractor import _display
from activation_extractor._display import close_matches, dtype_name, examples
from activation_extractor._format._entry_names import column_key, kept_name
from activation_extractor._format._journal import read_records
from activation_extractor._format._manifest import read_manifest, store_name
from activation_extractor._format._reader import Reader
from activation_extractor._format._stored_rows import RowId
from activation_extractor.errors import ActivationNotFoundError, ArgumentTypeError, StoreError
from activation_extractor.reducers._keys import EntryKey, entry_keys, pair_of, pairs_of, resolve_key
from activation_extractor.store._columns import Column
from activation_extractor.store._for_training import ForTraining
from activation_extractor.store._listing import ShardInfo, list_shards
from activation_extractor.store._rows_on_disk import Part, Parts
from activation_extractor.store._text_columns import TextColumn
from activation_extractor.store._verify import Verification, verify_store

_HEADER = ("layer", "reducer", "shape", "dtype")


def open_store(path: str | os.PathLike[str]) -> Store:
    """Open a folder that ``capture(..., sink=path)`` or ``extract(..., out=path)`` wrote.

    Only the manifest, the journal and the list of shards are read; shards are opened, and checked, when something in
    them is asked for. A store that is still being written, or whose writer was killed, opens to the units that are
    complete. Nothing in a store is trusted: its shards come from the folder's listing, links are refused, and every
    number is checked against the file that it is about.

    Args:
        path: the folder.

    Raises:
        StoreError: it is not a store, a newer version wrote it, or a shard is missing or damaged.

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
        >>> store["0"][store.row_of("b")].shape
        torch.Size([8])
    """
    return Store(Path(path))


class Store(ForTraining):
    """A store: lazy columns by layer and reducer, the row ids, and kept columns.

    ``store[layer, reducer]`` always works; ``store[layer]`` is short for the only reducer. Iteration gives names when
    there is one reducer, ``(name, reducer)`` pairs otherwise, in the order in which layers ran. A store can be handed
    to other processes.

    Attributes:
        path: the folder.
        manifest: the content of ``manifest.json``: among others ``codec`` (the format), ``ids`` (``"str"``, ``"int"``,
            or None when rows are numbered) and ``versions``; ``model`` where `extract` wrote it.
        fingerprint: what the values depend on, by part, such as ``mask`` and ``weights``.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        manifest = read_manifest(path)
        self.manifest, self.fingerprint = manifest.content, manifest.fingerprint
        self._is_of_data = manifest.unit_size is not None
        self._fields = {field.entry: field for field in (*manifest.columns, *manifest.keep)}
        records = read_records(path)  # before the listing, which can only grow meanwhile
        self._shards = list_shards(path, manifest, records)
        self._reader = Reader(manifest.codec, store_name(manifest.fingerprint), records, manifest.entries)
        counts = [record.counts for _, record in self._shards if record.counts]
        extra = [entry for rows in counts for entry, count in rows.items() if count]
        self._entries = list(dict.fromkeys([*self._fields, *extra]))
        self._keys = {key: entry for entry in self._entries if (key := column_key(entry))}
        self._names = dict.fromkeys(name for name, _ in self._keys)
        self._reducers = list(dict.fromkeys(reducer for _, reducer in self._keys))

    def __reduce__(self) -> Any:
        return Store, (self.path,)

    @cached_property
    def _starts(self) -> list[int]:
        """The row that each shard begins with, and the number of all rows."""
        return [0, *accumulate([record.rows for _, record in self._shards])]

    @property
    def names(self) -> list[str]:
        """The recorded names."""
        return list(self._names)

    @property
    def reducers(self) -> list[str]:
        """The reducers' names."""
        return list(self._reducers)

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """The name and reducer of each column, also where iteration gives names alone."""
        return pairs_of(self, self.reducers)

    @property
    def rows(self) -> int:
        """How many samples there are."""
        return self._starts[-1]

    @cached_property
    def ids(self) -> list[RowId]:
        """The ids of all rows; row numbers in a store without ids.

        Raises:
            StoreError: a damaged shard; rows without ids, and a unit that is not there yet between others that are.
        """
        if self.manifest["ids"] is None:
            if self._is_of_data and self._shards and int(Path(self._shards[-1][0]).stem) != len(self._shards) - 1:
                advice = "Run extract again with the same arguments to complete it."
                raise StoreError(self.path, "have all units up to its last for rows to be numbered", "gaps", advice)
            return list(range(sum(self._reader.shard(path).rows for path, _ in self._shards)))
        ids = list(self.iter_ids())
        if len(ids) != self.rows:
            advice = "Run verify(), or restore it from a copy."
            raise StoreError(self.path, f"hold an id for each of its {self.rows} rows", f"{len(ids)}", advice)
        return ids

    def iter_ids(self) -> Iterator[RowId]:
        """The ids of all rows, in order; each shard is opened when its first id is asked for. Row numbers as for `ids`.

        Raises:
            StoreError: a shard is damaged or gone.
        """
        if self.manifest["ids"] is None:
            return iter(range(self.rows))
        kind = self.manifest["ids"]
        return chain.from_iterable(self._reader.ids(path, kind) or () for path, _ in self._shards)

    @property
    def shards(self) -> list[ShardInfo]:
        """The files that hold the rows, in the order of the rows; none of them is opened."""
        return [ShardInfo(Path(path), record.rows, record.nbytes) for path, record in self._shards]

    @property
    def keep(self) -> dict[str, Column | TextColumn]:
        """The kept columns, by name."""
        return dict(self._kept)

    @cached_property
    def _kept(self) -> dict[str, Column | TextColumn]:
        names = {entry: name for entry in self._entries if (name := kept_name(entry)) is not None}
        columns = {name: self._column(entry) for entry, name in names.items()}
        return {name: TextColumn(column) if column.is_ragged else column for name, column in columns.items()}

    @property
    def nbytes(self) -> int:
        """Bytes on disk."""
        return sum(record.nbytes for _, record in self._shards)

    def row_of(self, row_id: RowId) -> int:
        """The row that has this id.

        Raises:
            ActivationNotFoundError: there is none.
        """
        return self.rows_of([row_id])[0]

    def rows_of(self, row_ids: Iterable[RowId]) -> list[int]:
        """The rows that have these ids, in their order.

        Raises:
            ActivationNotFoundError: there is none for one of them.
            ArgumentTypeError: one id in place of several.
        """
        if isinstance(row_ids, str | bytes):
            raise ArgumentTypeError("row_ids", "be several ids", row_ids, "Use row_of for one.")
        wanted, known = list(row_ids), self._rows_by_id
        for row_id in wanted:
            if not isinstance(row_id, Hashable) or row_id not in known:
                names = [name for name in self.ids if isinstance(name, str)]
                hint = close_matches(row_id, names, f"There is {examples(self.ids)}." if known else "")
                raise ActivationNotFoundError(row_id, f"No row has the id {row_id!r}. {hint}".rstrip())
        return [known[row_id] for row_id in wanted]

    def verify(self) -> Verification:
        """Read everything and compare it with the checksums; see `verify_store`."""
        return verify_store(self.path)

    def __getitem__(self, key: Any) -> Column:
        """A column.

        Raises:
            ActivationNotFoundError: there is no such column, or which reducer is meant is not said.
        """
        resolved = resolve_key(key, self._names, self._reducers)
        if resolved not in self._keys:
            raise ActivationNotFoundError(
                key, f"The store has no column {resolved!r}: the layer was recorded with other reducers."
            )
        return self._column(self._keys[resolved])

    def __contains__(self, key: object) -> bool:
        return pair_of(key, self._reducers) in self._keys

    def __iter__(self) -> Iterator[EntryKey]:
        return (key for key in entry_keys(self._names, self._reducers) if isinstance(key, str) or key in self._keys)

    def __len__(self) -> int:
        return len(self._keys)

    def __repr__(self) -> str:
        return _display.table(*self._table(), header=_HEADER)

    def _repr_html_(self) -> str:
        return _display.html_table(*self._table(), header=_HEADER)

    def _table(self) -> tuple[str, Sequence[tuple[str, ...]]]:
        def cells(key: EntryKey) -> tuple[str, ...]:
            column, (name, reducer) = self[key], key if isinstance(key, tuple) else (key, "")
            return name, reducer, str(column.shape), dtype_name(column.dtype)

        caption = _display.total(f"Store {str(self.path)!r} of {self.rows} rows", len(self), self.nbytes)
        return caption, _display.LazyRows(list(self), cells)

    @cached_property
    def _rows_by_id(self) -> dict[RowId, int]:
        return {row_id: row for row, row_id in enumerate(self.ids)}

    def _column(self, entry: str) -> Column:
        parts = []
        for (path, record), first in zip(self._shards, self._starts, strict=False):
            usual = record.rows if entry in self._fields else 0
            count = usual if record.counts is None else record.counts.get(entry, 0)
            if count:
                parts.append(Part(path, count, first))
        field = self._fields.get(entry)
        if field is None:  # of a layer that first ran after the first unit
            shard = self._reader.shard(parts[0].path)
            if entry not in shard.extents:
                advice = "Remove the folder 'journal', which is made from shards."
                raise StoreError(shard.path, f"hold the column {entry!r}, since the journal lists it", "none", advice)
            field = shard.field(entry)
        return Column(Parts(field, self._reader, parts))
