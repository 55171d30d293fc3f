"""Verifying a store: everything is read and compared with its checksums."""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any, Literal

from activation_extractor._files import TruncatedError, is_draft, open_regular, read_at
from activation_extractor._format._codecs import Codec
from activation_extractor._format._end import End, is_own, read_end
from activation_extractor._format._entry_names import OFFSETS
from activation_extractor._format._gaps import find_gaps, with_gaps
from activation_extractor._format._headers import Extent
from activation_extractor._format._journal import JournalRecord, read_records
from activation_extractor._format._manifest import Manifest, read_manifest, store_name
from activation_extractor._format._numpy import METADATA_FILE
from activation_extractor._format._reader import Reader
from activation_extractor._format._seen_ids import SeenIds
from activation_extractor._format._shards import SHARDS, Shard, is_shard, is_unit, scan_shards, shard_path, size_of
from activation_extractor._format._stored_rows import RowId
from activation_extractor._requests import REQUEST_BYTES, ahead
from activation_extractor._storage import RemoteFile, RemotePath, for_each, located, scan
from activation_extractor.errors import StoreError

Kind = Literal["altered", "foreign", "missing", "repeated id", "truncated", "unfinished", "unreadable"]
_CHUNK_BYTES = 1 << 22
_MOST_MISSING = 1000  # units that are named one by one


@dataclass(frozen=True)
class Damage:
    """Something in a store that should not be so.

    Attributes:
        path: the file or folder.
        kind: ``"truncated"`` (shorter than it says), ``"altered"`` (not what was written), ``"unreadable"`` (no header,
            or one that contradicts itself), ``"missing"`` (a unit that the journal lists, or before another one or the
            data's end), ``"repeated id"``, ``"foreign"`` (a file that the library did not write here) or
            ``"unfinished"`` (left by a writer that is at work or was killed; removed when an hour old by the next one).
        detail: what was found.
    """

    path: Path
    kind: Kind
    detail: str

    def __str__(self) -> str:
        return f"{self.path}: {self.kind}, {self.detail}"


class Verification(list[Damage]):
    """The damages of a store, a list that is empty when all is well.

    Attributes:
        shards: how many shards were read.
        nbytes: their size on disk.
    """

    def __init__(self, damages: Iterable[Damage], shards: int, nbytes: int) -> None:
        super().__init__(damages)
        self.shards, self.nbytes = shards, nbytes


def verify_store(path: str | os.PathLike[str]) -> Verification:
    """Read a store whole and list what is damaged, missing or not its own.

    It reports every damage rather than the first, and needs memory for the ids of all rows, the header of one shard and
    a few MiB; in a bucket, where several shards are read at a time, 128 MiB.

    Args:
        path: the folder.

    Raises:
        StoreError: it is not a store, or its manifest cannot be used.
    """
    folder = located(path)
    manifest = read_manifest(folder)
    found, end = _end(folder)
    records = read_records(folder)  # before the shards are listed, of which a writer may add more meanwhile
    codec = manifest.codec
    strays = [_stray(entry) for entry in scan(folder) if not is_own(entry.name)]
    strays += [_stray(entry) for entry in scan_shards(folder) if entry.is_symlink() or not is_shard(entry.name, codec)]
    count = end.units if end else 0
    units, gaps = with_gaps(partial(_units, folder, codec), records, count)
    shards = {unit: folder / SHARDS / (unit + codec.suffix) for unit in units}
    rows: dict[str, int] = {}
    damages = list(_damages(shards, manifest, records, rows))
    missing = list(_missing(folder, codec, [*rows], {*units}, records, count)) if gaps else []
    if end and not (missing or damages) and len(units) == end.units and sum(rows.values()) != end.rows:
        text = f"it says {end.rows:,} rows where the shards have {sum(rows.values()):,}"
        found.append(Damage(folder / end.name, "altered", text))
    return Verification(
        [*strays, *found, *missing, *damages], len(shards), sum(for_each(folder, _size, list(shards.values())))
    )


def _end(folder: Path) -> tuple[list[Damage], End | None]:
    """Where the data set ends, and what is wrong with that."""
    try:
        return [], read_end(folder)
    except StoreError as error:
        return [Damage(located(str(error.path)), "unreadable", str(error))], None


def _units(folder: Path, codec: Codec) -> list[str]:
    """The units that have a shard, which is no link."""
    entries = [entry for entry in scan_shards(folder) if is_shard(entry.name, codec) and not entry.is_symlink()]
    return [entry.name.removesuffix(codec.suffix) for entry in entries]


def _missing(
    folder: Path,
    codec: Codec,
    readable: Sequence[str],
    there: AbstractSet[str],
    records: Mapping[str, JournalRecord],
    count: int,
) -> Iterator[Damage]:
    """The units that are not there: all before the last one that is readable; no more of them than anybody reads."""
    gaps = find_gaps(readable, filter(is_unit, records.keys() - there), count)
    units = (unit for unit in chain.from_iterable(gaps) if unit not in there)
    for unit in islice(units, _MOST_MISSING):
        detail = "the journal lists it" if unit in records else "it comes before the last one"
        yield Damage(shard_path(folder, unit, codec), "missing", detail)
    more = sum(map(len, gaps)) - _MOST_MISSING
    if more > 0:
        yield Damage(folder / SHARDS, "missing", f"up to {more:,} more units")


def _size(shard: Path) -> int:
    try:
        return size_of(shard)
    except OSError:  # the shard was removed meanwhile, or its folder cannot be listed: _damages reports it
        return 0


def _stray(entry: Any) -> Damage:
    """A file that is not of the store's own kinds."""
    if is_draft(entry.name):
        return Damage(located(entry.path), "unfinished", "a shard or manifest that was never published")
    return Damage(located(entry.path), "foreign", "not written by this library")


def _damages(
    shards: Mapping[str, Path], manifest: Manifest, records: Mapping[str, JournalRecord], rows: dict[str, int]
) -> Iterator[Damage]:
    """What is wrong within shards, by unit; notes in `rows` how many rows each has that can be read."""
    reader, ids = Reader(manifest.codec, store_name(manifest.fingerprint)), SeenIds()
    checks = (partial(_check, reader, manifest, path, records.get(unit)) for unit, path in shards.items())
    if any(isinstance(path, RemotePath) for path in shards.values()):
        sizes = (records[unit].nbytes if unit in records else REQUEST_BYTES for unit in shards)
        # A chunk is held twice: while one is received, the one before it is not freed.
        found = ahead((check, 2 * min(size, REQUEST_BYTES)) for check, size in zip(checks, sizes, strict=True))
    else:
        found = (check() for check in checks)
    for (unit, path), (count, damages, unit_ids) in zip(shards.items(), found, strict=True):
        if count is not None:
            rows[unit] = count
        yield from damages
        repeated = ids.add(unit_ids)
        if repeated is not None:
            yield Damage(path, "repeated id", f"{repeated!r} is the id of another row too")


def _check(
    reader: Reader, manifest: Manifest, path: Path, record: JournalRecord | None
) -> tuple[int | None, list[Damage], Sequence[RowId]]:
    """How many rows a shard has, where that can be read; what is wrong with it; and its ids, where it is readable."""
    rows, damages = None, list[Damage]()
    try:
        shard = reader.shard(str(path))
        rows = shard.rows
        damages += altered(shard, record, manifest.entries)
        for entry in shard.columns:
            reader.row_numbers(str(path), entry)
            if entry + OFFSETS in shard.extents:
                reader.offsets(str(path), entry, 0, None)
        return rows, damages, reader.ids(str(path), manifest.ids) or ()
    except (OSError, ValueError) as error:
        is_short = isinstance(error, TruncatedError) or isinstance(error.__cause__, TruncatedError)
        return rows, [*damages, Damage(path, "truncated" if is_short else "unreadable", str(error))], ()


def altered(
    shard: Shard, record: JournalRecord | None = None, regular: frozenset[str] = frozenset()
) -> Iterator[Damage]:
    """What is not as it was written: values, by their checksums; a header that differs from the journal's record."""
    for entry, crc in _crc32s(shard):
        extent = shard.extents[entry]
        if crc != extent.crc32:
            yield Damage(extent.path, "altered", f"other bytes in {entry!r} than were written")
    if record is not None and record != shard.record(record.nbytes, regular):
        yield Damage(shard.path, "altered", "another shard than the journal lists")
    if shard.path.is_dir():
        known = {extent.path.name for extent in shard.extents.values()} | {METADATA_FILE}
        yield from (_stray(entry) for entry in list(os.scandir(shard.path)) if entry.name not in known)


def _crc32s(shard: Shard) -> Iterator[tuple[str, int]]:
    """The checksum of each entry."""
    if isinstance(shard.path, RemotePath):
        yield from _crc32s_of_object(shard, RemoteFile(shard.path))
        return
    for entry, extent in shard.extents.items():
        descriptor = open_regular(extent.path)
        try:
            yield entry, _crc32(extent, descriptor)
        finally:
            os.close(descriptor)


def _crc32(extent: Extent, descriptor: int) -> int:
    crc = 0
    for start in range(extent.crc_start, extent.stop, _CHUNK_BYTES):
        crc = zlib.crc32(read_at(descriptor, start, min(_CHUNK_BYTES, extent.stop - start)), crc)
    return crc


def _crc32s_of_object(shard: Shard, file: RemoteFile) -> Iterator[tuple[str, int]]:
    """The same, where entries that follow one another are read at once."""
    end, chunk, first = max((extent.stop for extent in shard.extents.values()), default=0), memoryview(b""), 0
    for entry, extent in sorted(shard.extents.items(), key=lambda item: item[1].crc_start):
        crc, position = 0, extent.crc_start
        while position < extent.stop:
            if not first <= position < first + len(chunk):
                chunk = memoryview(file.fetch(position, min(REQUEST_BYTES, end - position)))
                first = position
            part = chunk[position - first : extent.stop - first]
            crc, position = zlib.crc32(part, crc), position + len(part)
        yield entry, crc
