"""The journal of a store: what its writers say of the shards that they have published.

It is a cache, which spares a reader from opening each shard. Each writer has a file of its own,
``journal/<writer>.jsonl``, with a line for each shard. A shard whose line is torn or missing is opened instead.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from activation_extractor._files import sync_folder
from activation_extractor._format._headers import SEAL
from activation_extractor._requests import concurrently
from activation_extractor._storage import RemotePath, names_in, read_whole
from activation_extractor.errors import StoreError

JOURNAL = "journal"
_MAX_COUNT = 2**46  # of rows, or bytes (64 TiB), of a shard: the sum over 100,000 shards can be counted in 64 bits


@dataclass(slots=True)  # not frozen, which would take four times as long to make
class JournalRecord:
    """What a journal says of a shard.

    `counts` holds the rows of each column, by entry. It is None where the shard has the columns that the manifest lists
    and each of them has all rows. `data` says of a unit of `extract` what part of the data set it was made from, so
    that a run that is resumed need not open the shard. It is checked where it is used; a shard need not agree with it.
    """

    unit: str
    rows: int
    nbytes: int  # on disk
    seal: str  # the checksum over the shard's header
    counts: Mapping[str, int] | None = None
    data: str | None = field(default=None, compare=False)  # as one text, which is read as fast as none

    def to_json(self) -> dict[str, Any]:
        """The record as a line of the journal has it."""
        record: dict[str, Any] = {"unit": self.unit, "rows": self.rows, "bytes": self.nbytes, SEAL: self.seal}
        more = {"counts": self.counts, "data": self.data}
        return record | {name: value for name, value in more.items() if value is not None}

    @classmethod
    def from_json(cls, content: Any) -> JournalRecord:
        """The record that a line of a journal holds, each member checked.

        Raises:
            LookupError, TypeError or ValueError: a member is missing, of another type, or out of range.
        """
        unit, rows, nbytes, seal = content["unit"], content["rows"], content["bytes"], content[SEAL]
        is_valid = type(unit) is type(seal) is str and type(rows) is type(nbytes) is int
        if not is_valid or not (0 <= rows < _MAX_COUNT and 0 <= nbytes < _MAX_COUNT):
            raise ValueError("a member of another type, or out of range")
        if len(content) == 4:
            return cls(unit, rows, nbytes, seal)
        data = content.get("data")
        if data is not None and type(data) is not str:
            raise TypeError("data that are no text")
        if "counts" not in content:
            return cls(unit, rows, nbytes, seal, None, data)
        counts = content["counts"]
        if type(counts) is not dict or not all(
            type(count) is int and 0 <= count < _MAX_COUNT for count in counts.values()
        ):
            raise ValueError("counts that are not numbers of rows")
        return cls(unit, rows, nbytes, seal, counts, data)


def append_record(folder: Path, writer: str, record: JournalRecord) -> None:
    """Add a line to a writer's journal, and bring it to the disk.

    Raises:
        StoreError: it cannot be written.
    """
    path = folder / JOURNAL / f"{writer}.jsonl"
    try:
        path.parent.mkdir(exist_ok=True)
        is_new = not path.exists()
        descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        try:
            os.write(descriptor, json.dumps(record.to_json()).encode() + b"\n")
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        if is_new:
            sync_folder(path.parent)
    except OSError as error:
        advice = "The shard is complete; make room, and go on."
        raise StoreError(path, "be writable", error.strerror or str(error), advice) from error


def read_records(folder: Path) -> dict[str, JournalRecord]:
    """The records in the journals of a store, by unit; a line that is not a record is passed over."""
    records: dict[str, JournalRecord] = {}
    paths = _journals(folder / JOURNAL)
    is_remote = bool(paths) and isinstance(paths[0], RemotePath)
    for journal in concurrently(_read_journal, paths) if is_remote else map(_read_journal, paths):
        for content in _parsed(journal):
            try:
                record = JournalRecord.from_json(content)
            except (LookupError, TypeError, ValueError):
                continue
            records[record.unit] = record
    return records


def _journals(folder: Path) -> list[Path]:
    """The journals in the folder of a store, which may be missing, but is no link."""
    with suppress(OSError):
        if not folder.is_symlink():
            return [folder / name for name in sorted(names_in(folder)) if name.endswith(".jsonl")]
    return []


def _read_journal(path: Path) -> bytes:
    with suppress(OSError, ValueError):  # a journal that cannot be read: its shards are opened instead
        return read_whole(path)
    return b""


def _parsed(journal: bytes) -> list[Any]:
    """The JSON values of a journal's lines; a line that is not JSON is passed over."""
    try:  # all lines as one array: a quarter of the time that line by line takes
        return list(json.loads(b"[" + journal.rstrip().replace(b"\n", b",") + b"]"))
    except (ValueError, RecursionError):
        values = []
        for line in journal.splitlines():
            with suppress(ValueError, RecursionError):
                values.append(json.loads(line))
        return values
