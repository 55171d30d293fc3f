"""A `Store`: columns, ids, and what is missing of them."""

from __future__ import annotations

import functools
from collections.abc import Hashable, Iterable, Iterator, Sequence
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

from torch import Tensor

from activation_extractor import _display
from activation_extractor._display import close_matches, dtype_name, examples
from activation_extractor._format._end import read_end
from activation_extractor._format._entry_names import column_key, kept_name
from activation_extractor._format._gaps import check_gaps
from activation_extractor._format._journal import read_records
from activation_extractor._format._manifest import ROWS_PER_UNIT, read_manifest, store_name
from activation_extractor._format._reader import Reader
from activation_extractor._format._stored_rows import RowId
from activation_extractor._requests import ahead
from activation_extractor._storage import RemotePath, for_each, located
from activation_extractor.errors import ActivationNotFoundError, ArgumentTypeError, StoreError
from activation_extractor.reducers._keys import EntryKey, entry_keys, pair_of, pairs_of, resolve_key
from activation_extractor.store._columns import Column
from activation_extractor.store._for_training import ForTraining
from activation_extractor.store._listing import ShardInfo, list_shards
from activation_extractor.store._row_numbers import row_numbers
from activation_extractor.store._rows_in_bucket import RemoteParts
from activation_extractor.store._rows_on_disk import Parts
from activation_extractor.store._text_columns import TextColumn
from activation_extractor.store._verify import Verification, verify_store

_MOST_MISSING = 10**6  # units: a single shard of a high number may claim a hundred million of them
_HEADER = ("layer", "reducer", "shape", "dtype")


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

    def __init__(self, path: Path, *, partial: bool = False) -> None:
        self.path, self._is_partial = path, partial
        manifest = read_manifest(path)
        self.manifest, self.fingerprint = manifest.content, manifest.fingerprint
        self._fields = {field.entry: field for field in (*manifest.columns, *manifest.keep)}
        self._end, records = read_end(path), read_records(path)  # before the listing, which can only grow meanwhile
        self._units, self._gaps = list_shards(path, manifest, records, self._end)
        if not partial or sum(map(len, self._gaps)) > _MOST_MISSING:
            check_gaps(path, self._gaps, len(self._units), is_of_data=manifest.unit_size is not None)
        self._reader = Reader(manifest.codec, store_name(manifest.fingerprint), self._units)
        self._entries = [*self._fields, *self._units.entries]
        self._keys = {key: entry for entry in self._entries if (key := column_key(entry))}
        self._names = dict.fromkeys(name for name, _ in self._keys)
        self._reducers = list(dict.fromkeys(reducer for _, reducer in self._keys))

    def __reduce__(self) -> Any:
        return functools.partial(Store, partial=self._is_partial), (self.path,)

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
        return int(self._units.starts[-1])

    @property
    def is_complete(self) -> bool:
        """Whether each unit of the data set is there: the run of `extract` came to its end, and nothing is missing.

        False for stores of with-blocks, and of `extract` before 0.2, which do not say where they end: whether units are
        missing between others is known of these too, see `missing_units`.
        """
        return self._end is not None and self._end.units == len(self._units) and not self._gaps

    @property
    def missing_units(self) -> list[str]:
        """The names of the units that are not there, in order, as far as that is known.

        These are the units before the last one that is there, those that a journal lists, and, once a run of `extract`
        came to its end, all others. Only a store that was opened with ``partial=True`` can lack some.
        """
        return list(chain.from_iterable(self._gaps))

    @cached_property
    def row_numbers(self) -> Tensor:
        """Which row of the data set each row of the store is, counted from 0, ``(rows,)`` int64.

        They differ from the rows of the store where units are missing, or where the model could not run a row
        (``on_failure=``). Rows that ``append=True`` added come behind the others, whatever their place.

        Raises:
            StoreError: rows are behind a missing unit whose number of rows is not known, as in a store of with-blocks.
        """
        size = self.manifest.get(ROWS_PER_UNIT)
        return row_numbers(self.path, self._reader, self._units, self._gaps, size)

    @cached_property
    def ids(self) -> list[RowId]:
        """The ids of all rows; row numbers in a store without ids, those of `row_numbers` where units are missing.

        Raises:
            StoreError: a damaged shard; or what `row_numbers` raises.
        """
        if self.manifest["ids"] is None:
            if self._gaps:
                return list(self.row_numbers.tolist())
            counts = for_each(self.path, lambda path: self._reader.shard(path).rows, list(self._paths))
            return list(range(sum(counts)))
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
            return iter(self.row_numbers.tolist() if self._gaps else range(self.rows))
        kind = self.manifest["ids"]
        reads = (functools.partial(self._reader.ids, path, kind) for path in self._paths)
        is_remote = isinstance(self.path, RemotePath)
        ids = ahead((read, 0) for read in reads) if is_remote else (read() for read in reads)
        return chain.from_iterable(found or () for found in ids)

    @property
    def shards(self) -> list[ShardInfo]:
        """The files that hold the rows, in the order of the rows; none of them is opened."""
        sizes = zip(self._units.rows.tolist(), self._units.nbytes.tolist(), strict=True)
        return [ShardInfo(located(path), rows, nbytes) for path, (rows, nbytes) in zip(self._paths, sizes, strict=True)]

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
        return int(self._units.nbytes.sum())

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

    @property
    def _paths(self) -> Iterator[str]:
        return map(self._units.path, range(len(self._units)))

    def _column(self, entry: str) -> Column:
        field = self._fields.get(entry)
        if field is None:  # of a layer that first ran after the first unit
            which = self._units.of_entry(entry).which
            shard = self._reader.shard(self._units.path(0 if which is None else int(which[0])))
            if entry not in shard.extents:
                advice = "Remove the folder 'journal', which is made from shards."
                raise StoreError(shard.path, f"hold the column {entry!r}, since the journal lists it", "none", advice)
            field = shard.field(entry)
        rows = RemoteParts if isinstance(self.path, RemotePath) else Parts
        return Column(rows(field, self._reader, self._units))
