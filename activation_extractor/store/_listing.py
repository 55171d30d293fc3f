"""The shards of a store, in the order of its rows, without opening those that the journal lists."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from activation_extractor._format._end import End
from activation_extractor._format._gaps import Gap, with_gaps
from activation_extractor._format._journal import JournalRecord
from activation_extractor._format._manifest import Manifest, store_name
from activation_extractor._format._reader import Reader
from activation_extractor._format._shards import SHARDS, list_units, size_of
from activation_extractor._format._unit_table import UnitTable
from activation_extractor._storage import for_each, located
from activation_extractor.errors import StoreError


@dataclass(frozen=True)
class ShardInfo:
    """A file of a store, or with the format ``"npy"`` a folder, that holds the rows of one unit.

    Attributes:
        path: the file or folder.
        rows: how many rows of the store it holds.
        nbytes: its size on disk.
    """

    path: Path
    rows: int
    nbytes: int


def list_shards(
    folder: Path, manifest: Manifest, records: Mapping[str, JournalRecord], end: End | None
) -> tuple[UnitTable, list[Gap]]:
    """The units that have a shard, in the order of the rows; and those that are missing.

    What a shard holds is known from the journal, else from its header.

    Raises:
        StoreError: a shard is of another kind of store, or damaged.
    """
    codec, is_of_data = manifest.codec, manifest.unit_size is not None
    units, gaps = with_gaps(partial(list_units, folder, codec), records, end.units if end else 0)
    foreign = [unit for unit in units if ("-" in unit) is is_of_data]
    if foreign:
        kinds = ("a data set", "a with-block")
        got = f"the shard {foreign[0]!r} of {kinds[is_of_data]}"
        raise StoreError(folder, f"hold shards of {kinds[not is_of_data]}", got, "Take it out of the folder.")
    reader, start = Reader(codec, store_name(manifest.fingerprint)), os.path.join(folder, SHARDS, "")

    def record(unit: str) -> JournalRecord:
        path = start + unit + codec.suffix
        return reader.shard(path).record(size_of(located(path)), manifest.entries)

    unlisted = [unit for unit in units if unit not in records]
    known = {**records, **dict(zip(unlisted, for_each(folder, record, unlisted), strict=True))}
    return UnitTable(start, codec.suffix, units, [known[unit] for unit in units], manifest.entries), gaps
