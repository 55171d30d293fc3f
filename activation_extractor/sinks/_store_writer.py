"""Writing a store: steps become units, units become shards on a thread of their own."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from activation_extractor._files import check_writable, is_draft, make_folders, sweep
from activation_extractor._format._codecs import Codec
from activation_extractor._format._fingerprints import differences
from activation_extractor._format._journal import JOURNAL, append_record
from activation_extractor._format._manifest import (
    Manifest,
    has_manifest,
    make_manifest,
    read_manifest,
    store_name,
    write_manifest,
)
from activation_extractor._format._rows import RowId
from activation_extractor._format._seen_ids import SeenIds
from activation_extractor._format._shards import SHARDS, read_shard, shard_path, write_shard
from activation_extractor.errors import OtherRunError, StoreError
from activation_extractor.sinks._background import Background
from activation_extractor.sinks._schema import Schema
from activation_extractor.sinks._steps import Step
from activation_extractor.sinks._transfer import Transfer
from activation_extractor.sinks._units import Unit

UNIT_BYTES = 64 * 2**20
UNIT_ROWS = 4096  # rows are hours of work where a model is large, and a unit that is under way is lost with its process
QUEUE_BYTES = 128 * 2**20


_APPEND = "Choose another folder, or add to it with a sink such as SafetensorsSink(path, append=True)."


def check_free(path: Path, advice: str = _APPEND) -> None:
    """Make sure that a folder can become a new store, without touching it.

    Args:
        path: the folder.
        advice: what to do about a store that is there.

    Raises:
        StoreError: it is a file, or holds something.
    """
    try:
        is_free = not path.exists() or all(map(_is_bare, path.iterdir()))
    except OSError as error:
        raise StoreError(path, "be a folder", error.strerror or str(error), "Choose another folder.") from error
    if is_free:
        return
    if has_manifest(path):
        raise StoreError(path, "be a new or empty folder", "one that holds a store", advice)
    raise StoreError(path, "be a new or empty folder", "one that holds something", "Choose another folder.")


def _is_bare(path: Path) -> bool:
    """Whether this is what a run leaves that ended before its first unit."""
    if path.is_symlink() or path.name not in (SHARDS, JOURNAL):
        return is_draft(path.name)
    return path.is_dir() and all(is_draft(one.name) for one in path.iterdir())


class StoreWriter:
    """Writes one run into one store.

    Attributes:
        rows: how many rows were added.
        nbytes: how many bytes of columns they had.

    Args:
        folder: the store.
        codec: the format of its shards.
        writer: a name of this run's own, for its journal.
        queue_bytes: how many bytes units may hold, finished ones and the one that is under way.
        shares_store: whether other writers of the same run may be at work in this folder.
    """

    def __init__(self, folder: Path, codec: Codec, writer: str, queue_bytes: int, *, shares_store: bool) -> None:
        self.folder, self.codec = folder, codec
        self.rows = self.nbytes = 0
        self._writer, self._shares_store = writer, shares_store
        self._run: dict[str, Any] = {}
        self._manifest: Manifest | None = None
        self._transfer = Transfer()
        self._schema, self._unit = Schema(codec), Unit(self._transfer)
        self._seen = SeenIds()
        self._is_ready = False
        self._published: Manifest | None = None
        self._background = Background(queue_bytes)

    @property
    def unit(self) -> Unit:
        """The unit that is under way."""
        return self._unit

    def begin(self, run: Mapping[str, Any]) -> None:
        """Say what the run is: ``fingerprint``, its unit's size and what else its manifest is to hold."""
        self._run = dict(run)

    def check_run(self) -> Manifest:
        """The manifest of the store that is there, when its run is this one.

        Raises:
            OtherRunError: it is not.
        """
        return check_same(self.folder, make_manifest(self.codec, self._run, [], [], None))

    def go_on(self) -> None:
        """Go on with the store that is there.

        Raises:
            OtherRunError: its run is another one.
        """
        manifest = self.check_run()
        self._manifest = self._published = manifest
        self._schema = Schema.of(manifest)

    def see(self, ids: Iterable[RowId] | None) -> None:
        """Note ids that the store holds or is to hold.

        Raises:
            StoreError: one of them comes twice.
        """
        repeated = self._seen.add(list(ids or ()))
        if repeated is not None:
            advice = "Give every row an id of its own."
            raise StoreError(self.folder, "hold each id once", f"{repeated!r} again", advice)

    def add(self, step: Step) -> int:
        """Add a step to the unit that is under way, whole or not at all; returns the size in bytes of its columns.

        Raises:
            StoreError: the folder cannot be written to, an id was seen before, a column changed its dtype or row
                shape, or an earlier unit could not be written.
            ArgumentError: a column has a dtype that the format lacks.
        """
        self._background.check()
        if not self._is_ready:
            self._make_ready()
        schema, columns = self._schema.fit(step)
        self.see(step.ids)
        self._schema = schema  # only now that nothing refuses the step
        nbytes = self._unit.add(columns, step)
        self.rows += step.rows
        self.nbytes += nbytes
        return nbytes

    def commit(self, name: str, about: Mapping[str, str] | None = None, order: Tensor | None = None) -> None:
        """Hand the unit that is under way over to be written; waits while the queue is full.

        Args:
            name: the unit's.
            about: what its shard is to note.
            order: as for `Unit.entries`.

        Raises:
            StoreError: an earlier unit could not be written.
        """
        unit, self._unit = self._unit, Unit(self._transfer)
        if self._manifest is None:
            schema = self._schema
            self._manifest = make_manifest(self.codec, self._run, schema.columns, schema.keep, schema.ids)
        noted = {"store": store_name(self._manifest.fingerprint), "rows": str(unit.rows), **(about or {})}
        job = partial(self._write, self._manifest, name, unit, noted, order)
        self._background.submit(job, unit.nbytes, reserved_bytes=unit.nbytes)  # the next unit will be as large

    def finish(self) -> None:
        """Wait until everything is written.

        Raises:
            StoreError: a unit could not be written.
        """
        self._background.finish()

    def _make_ready(self) -> None:
        """Make the folders, and see early that they can be written to."""
        shards = self.folder / SHARDS
        make_folders(shards)
        sweep(self.folder)
        sweep(shards)
        check_writable(shards)
        self._is_ready = True

    def _write(self, manifest: Manifest, name: str, unit: Unit, about: Mapping[str, str], order: Tensor | None) -> None:
        if self._published is None:
            self._published = self._publish(manifest)
        nbytes = write_shard(self.folder, self.codec, name, unit.entries(order), about)
        if nbytes is not None:
            shard = read_shard(shard_path(self.folder, name, self.codec), self.codec)
            append_record(self.folder, self._writer, shard.record(nbytes, self._published.entries))

    def _publish(self, manifest: Manifest) -> Manifest:
        """Write the manifest; where another writer was faster, that one's, if it says the same."""
        if write_manifest(self.folder, manifest):
            return manifest
        if not self._shares_store:
            got = "one that another writer began"
            raise StoreError(self.folder, "be this writer's own store", got, "Use a new folder, or append=True.")
        found = check_same(self.folder, manifest)
        Schema.of(found).check(Schema.of(manifest))
        return found


def check_same(folder: Path, wanted: Manifest) -> Manifest:
    """The manifest of a store, when its run is the same as this one.

    Raises:
        OtherRunError: it is not.
    """
    found = read_manifest(folder)
    if found.codec != wanted.codec:
        advice = "Use the sink or format= that it was begun with."
        raise StoreError(folder, f"be a store of {wanted.codec.name} shards", f"one of {found.codec.name}", advice)
    there, now = ({**one.fingerprint, "unit size": one.unit_size} for one in (found, wanted))
    found_differences = differences(there, now)
    if found_differences:
        raise OtherRunError(folder, found_differences)
    return found
