"""Writing a store: steps become units, units become shards on a thread of their own."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from datetime import datetime, timezone
from functools import partial
from operator import or_
from pathlib import Path
from typing import Any

from torch import Tensor

from activation_extractor._creation import make_ready
from activation_extractor._format._codecs import Codec
from activation_extractor._format._headers import Entries
from activation_extractor._format._id_files import IdFiles
from activation_extractor._format._journal import Journal
from activation_extractor._format._manifest import (
    BATCHES_PER_UNIT,
    Manifest,
    make_manifest,
    read_manifest,
    store_name,
    write_manifest,
)
from activation_extractor._format._seen_ids import SeenIds, merged
from activation_extractor._format._shards import SHARDS, list_units, write_shard
from activation_extractor._format._stored_rows import RowId
from activation_extractor._requests import ahead
from activation_extractor._storage import RemotePath
from activation_extractor.errors import StoreError
from activation_extractor.sinks._background import Background
from activation_extractor.sinks._resume import check_same
from activation_extractor.sinks._schema import Schema
from activation_extractor.sinks._step import Step
from activation_extractor.sinks._transfer import Transfer
from activation_extractor.sinks._units import Unit
from activation_extractor.sinks._uploads import Uploads

_WRITER = "writer"  # in the manifest of a store in a bucket that no other writer shares
QUEUE_BYTES = 128 * 2**20
FEW_IDS, FEW_UNITS = 2**16, 64  # which are read from their shards in a tenth of a second

IsSame = Callable[[Entries], bool]


class StoreWriter:
    """Writes one run into one store.

    `rows` and `nbytes` count what was added. Units, finished ones and the current one, hold up to `queue_bytes`. With
    `shares_store` other writers of the same run may be at work in the folder. Units appear one after the other, unless
    a run that ends early `may_leave_gaps`: then several are on their way to a bucket at a time.

    Attributes:
        unit_size: the member of the manifest that says how large all units are; set it before the first `commit`.
        journal: what it says of the shards that it has written.
    """

    def __init__(
        self, folder: Path, codec: Codec, *, queue_bytes: int, shares_store: bool, may_leave_gaps: bool = False
    ) -> None:
        self.folder, self.codec = folder, codec
        codec.check_place(folder)
        # No other writer has this name, and names sort by the time at which writing began.
        self.name = f"{datetime.now(timezone.utc):%Y%m%dT%H%M%S%f}-{secrets.token_hex(4)}"
        self.journal = Journal(folder, self.name)
        self.rows = self.nbytes = 0
        self.unit_size: Mapping[str, int] = {}
        self._shares_store = shares_store
        self._fingerprint: dict[str, Any] = {}
        self._more: dict[str, Any] = {}
        self._manifest: Manifest | None = None
        self._transfer = Transfer()
        self._schema = Schema(codec)
        self._ids, self._stored_ids = SeenIds(), SeenIds()  # of rows that were added, and that the store held before
        self._id_files: IdFiles | None = None  # with further ids that it held
        self._has_folders = False
        self._published: Manifest | None = None
        self._background = Background(queue_bytes)
        self._uploads = Uploads(queue_bytes) if may_leave_gaps and isinstance(folder, RemotePath) else None
        self._held_back: list[tuple[Callable[[], None], int]] | None = None

    def new_unit(self) -> Unit:
        """A unit without rows, to add steps to."""
        return Unit(self._transfer)

    @property
    def hold_back(self) -> bool:
        """Whether finished units wait, in memory, until this is False again; what waits at the end is dropped."""
        return self._held_back is not None

    @hold_back.setter
    def hold_back(self, is_held_back: bool) -> None:
        waiting, self._held_back = self._held_back or [], [] if is_held_back else None
        for job, nbytes in waiting:
            self._submit(job, nbytes)

    def begin(self, fingerprint: Mapping[str, Any], more: Mapping[str, Any] | None = None) -> None:
        """Take what the values of the run depend on, the ``model``'s class among it, and members of the manifest."""
        self._fingerprint, self._more = dict(fingerprint), dict(more or {})

    def check_run(self) -> Manifest:
        """The manifest of the store in the folder.

        Raises:
            OtherRunError: the store is of another run.
            StoreError: there is no store, or one of another format.
        """
        return check_same(self.folder, self._make_manifest(Schema(self.codec)))

    def resume(self) -> None:
        """Resume the store in the folder: columns must stay what they are in it; raises what `check_run` raises."""
        self._manifest = self._published = manifest = self.check_run()
        self._schema = Schema.of(manifest, self.codec)

    def remember_ids(self, ids: Iterable[RowId] | None) -> None:
        """Remember ids of stored rows, so that none is added again; raises a StoreError where an id comes twice."""
        listed = list(ids or ())
        take_once(self.folder, self._stored_ids, listed)
        if True in (added := self._ids.has(listed)):
            raise _repeated(self.folder, listed[added.index(True)])

    def remember_units(self, units: Iterable[str], ids_of: Callable[[str], Iterable[RowId] | None]) -> None:
        """Remember the ids of units, which `ids_of` reads; raises what `remember_ids` raises."""
        is_remote = isinstance(self.folder, RemotePath)
        for ids in ahead((partial(ids_of, unit), 0) for unit in units) if is_remote else map(ids_of, units):
            self.remember_ids(ids)

    def take_ids(self, ids: Sequence[RowId]) -> None:
        """Note that rows of these ids came in this run; raises a StoreError where one is remembered, or comes twice."""
        stored = self._stored_ids.has(ids)
        if self._id_files is not None:
            stored = [*map(or_, stored, self._id_files.has(ids))]
        if True in stored:
            condition, got = "hold each id once", f"{ids[stored.index(True)]!r}, which it holds already"
            advice = "Leave out what open_store(path).ids has where a task runs again, as extract(append=True) does"
            raise StoreError(self.folder, condition, got, f"{advice}; else give every row an id of its own.")
        take_once(self.folder, self._ids, ids)

    def has_ids(self, ids: Sequence[RowId]) -> list[bool]:
        """Whether rows with these ids were added, or remembered."""
        return [*map(or_, self._ids.has(ids), self._stored_ids.has(ids))]

    def find_ids(self, ids_of: Callable[[str], Iterable[RowId] | None]) -> None:
        """Remember the ids of a store of with-blocks; `ids_of` reads those of units that no file of digests names."""
        self._id_files = IdFiles(self.folder, list_units(self.folder, self.codec))
        self.remember_units(self._id_files.left, ids_of)

    def keep_ids(self, units: Sequence[str]) -> bool:
        """Write a file of the digests that are in memory, unless they are few; returns whether it did.

        `units` are those of the rows that were added, since the last file.
        """
        files = self._id_files or IdFiles(self.folder, ())
        left, count = [*files.left, *units], len(self._ids) + len(self._stored_ids)
        if not count or (count < FEW_IDS and len(left) < FEW_UNITS):
            return False
        with suppress(StoreError):  # the rows are stored, and their ids can be read there
            files.add(units[-1], left, merged([self._ids.sorted(), self._stored_ids.sorted()]))
            files.left, self._id_files = [], files
            self._ids, self._stored_ids = SeenIds(), SeenIds()
            return True
        return False

    def add(self, step: Step, unit: Unit) -> int:
        """Add a step to a unit, whole or not at all; returns the size in bytes of its columns.

        Raises:
            StoreError: the folder cannot be written to, an id was seen before, a column changed its dtype or row
                shape, or an earlier unit could not be written.
            ArgumentError: a column has a dtype that the format lacks.
        """
        self._background.check()
        if not self._has_folders:  # a read-only folder raises at the first step, rather than at the first unit
            make_ready(self.folder, SHARDS)
            self._has_folders = True
        schema, columns = self._schema.fit(step)
        self.take_ids(step.ids or ())
        self._schema = schema  # a step that is refused above leaves it as it was
        nbytes = unit.add(columns, step)
        self.rows += step.rows
        self.nbytes += nbytes
        return nbytes

    def commit(
        self,
        unit: Unit,
        name: str,
        metadata: Mapping[str, str] | None = None,
        order: Tensor | None = None,
        is_same: IsSame = lambda _: False,
        data: str | None = None,
    ) -> None:
        """Hand a unit over to be written; waits while the queue is full.

        `order` says which of the rows is stored first, second, ..., ``(rows,)`` int64; None stores them as they came.
        `is_same` says whether a shard with other bytes that is there meanwhile is as good as these entries. `data` is
        that member of the journal's record.

        Raises:
            StoreError: an earlier unit could not be written.
        """
        if self._manifest is None:
            self._manifest = self._make_manifest(self._schema)
        metadata = {"store": store_name(self._manifest.fingerprint), "rows": str(unit.rows), **(metadata or {})}
        job = partial(self._write, self._manifest, name, unit, metadata, order, is_same, data)
        self._submit(job, unit.held_bytes)

    def _submit(self, job: Callable[[], None], nbytes: int) -> None:
        if self._held_back is not None:
            self._held_back.append((job, nbytes))
        else:
            self._background.submit(job, nbytes, reserved_bytes=nbytes)  # the next unit will be as large

    def check(self) -> None:
        """Raise what writing an earlier unit raised, a StoreError."""
        self._background.check()

    def then(self, job: Callable[[], object]) -> None:
        """Do something once the units that were committed so far are on the disk; nothing, where one could not be."""
        self._submit(partial(self._do, job), 0)

    def finish(self) -> None:
        """Wait until everything is written; raises a StoreError where a unit could not be."""
        self._background.finish()
        self._end_uploads()
        self.journal.close()

    def _make_manifest(self, schema: Schema) -> Manifest:
        model = self._fingerprint.get("model")
        run = {"fingerprint": self._fingerprint, BATCHES_PER_UNIT: None, **self.unit_size, "model": model, **self._more}
        if isinstance(self.folder, RemotePath) and not self._shares_store:
            run[_WRITER] = self.name
        return make_manifest(self.codec, run, schema.columns, schema.keep, schema.ids)

    def _write(
        self,
        manifest: Manifest,
        name: str,
        unit: Unit,
        metadata: Mapping[str, str],
        order: Tensor | None,
        is_same: IsSame,
        data: str | None,
    ) -> None:
        """Write a unit; the writer's thread does this."""
        if self._published is None:
            self._published = self._publish(manifest)
        store = partial(self._store, name, unit.entries(order), metadata, is_same, data)
        if self._uploads is None:
            store()
        else:
            self._uploads.put(store, unit.held_bytes)

    def _store(
        self, name: str, entries: Entries, metadata: Mapping[str, str], is_same: IsSame, data: str | None
    ) -> None:
        written = write_shard(self.folder, self.codec, name, entries, metadata, is_same)
        if written is not None and self._published is not None:
            shard, nbytes = written
            self.journal.add(replace(shard.record(nbytes, self._published.entries), data=data))

    def _do(self, job: Callable[[], object]) -> None:
        """Do something that may ask what the journal says of the units so far."""
        self._end_uploads()
        self.journal.close()
        job()

    def _end_uploads(self) -> None:
        if self._uploads is not None:
            self._uploads.finish()

    def _publish(self, manifest: Manifest) -> Manifest:
        """Write the manifest; returns the one in the folder, which another writer of the run may have written."""
        if write_manifest(self.folder, manifest):
            return manifest
        if _WRITER in manifest.content and manifest.content == read_manifest(self.folder).content:
            return manifest  # the bucket's first answer was lost
        if not self._shares_store:
            got = "one that another writer began"
            raise StoreError(self.folder, "be this writer's own store", got, "Use a new folder, or append=True.")
        found = check_same(self.folder, manifest)
        Schema.of(found).check(Schema.of(manifest))
        return found


def take_once(folder: Path, known: SeenIds, ids: Iterable[RowId]) -> None:
    """Add ids of a store to those that are known; a StoreError where one comes twice."""
    repeated = known.add(ids)
    if repeated is not None:
        raise _repeated(folder, repeated)


def _repeated(folder: Path, row_id: RowId) -> StoreError:
    return StoreError(folder, "hold each id once", f"{row_id!r} again", "Give every row an id of its own.")
