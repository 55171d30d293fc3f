"""The journal of a store: what its writers say of the shards that they have published.

It is a cache, which spares a reader from opening each shard. Each writer has a file of its own,
``journal/<writer>.jsonl``, with a line for each shard; in a bucket it has several, see `Journal`. A shard whose line is
torn or missing is opened instead.
"""

from __future__ import annotations

import json
import os
import re
import threading
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from activation_extractor._creation import create
from activation_extractor._files import sync_folder
from activation_extractor._format._headers import SEAL
from activation_extractor._requests import concurrently
from activation_extractor._storage import RemotePath, names_in, read_whole
from activation_extractor.errors import StoreError

JOURNAL = "journal"
_AT_ONCE = 64  # records that are written to a bucket together: of a writer that is killed, that many shards are opened
_PART = re.compile(r"(?P<writer>.+)\.(?P<first>[0-9]{8})-(?P<end>[0-9]{8})\.jsonl")
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


class Journal:
    """The journal of one writer.

    On a disk each record is appended to its file, and there at once. In a bucket, where nothing can be appended to,
    records are written as objects that never change, ``journal/<writer>.<first>-<end>.jsonl``: when there are
    `_AT_ONCE` new ones, and in `close`. One that is not much longer than an earlier one has its records too, so that a
    reader needs few of them, however many there are.
    """

    def __init__(self, folder: Path, writer: str) -> None:
        self._folder, self._writer = folder / JOURNAL, writer
        self._lines: list[bytes] = []  # all of them, for a bucket
        self._parts: list[tuple[int, int]] = []  # the first and the end of those that are to be read there
        self._lock = threading.Lock()

    def add(self, record: JournalRecord) -> None:
        """Add a record; raises a StoreError where it cannot be written."""
        line = json.dumps(record.to_json()).encode() + b"\n"
        if not isinstance(self._folder, RemotePath):
            _append(self._folder / f"{self._writer}.jsonl", line)
            return
        with self._lock:
            self._lines.append(line)
            if len(self._lines) - self._stored >= _AT_ONCE:
                self._write_part()

    def close(self) -> None:
        """Write what waits; further records may be added behind. Raises a StoreError where it cannot be written."""
        with self._lock:
            if len(self._lines) > self._stored:
                self._write_part()

    @property
    def _stored(self) -> int:
        return self._parts[-1][1] if self._parts else 0

    def _write_part(self) -> None:
        first, end, parts = self._stored, len(self._lines), self._parts.copy()
        while parts and parts[-1][1] - parts[-1][0] <= 2 * (end - first):
            first = parts.pop()[0]
        name = f"{self._writer}.{first:08d}-{end:08d}.jsonl"
        create(self._folder / name, [b"".join(self._lines[first:end])])
        self._parts = [*parts, (first, end)]


def _append(path: Path, line: bytes) -> None:
    try:
        path.parent.mkdir(exist_ok=True)
        is_new = not path.exists()
        descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        try:
            os.write(descriptor, line)
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
            return [folder / name for name in _needed(names_in(folder)) if name.endswith(".jsonl")]
    return []


def _needed(names: Iterable[str]) -> list[str]:
    """The names without those of parts whose records a longer part has."""
    needed, ends = [], dict[str, int]()
    found = {name: _PART.fullmatch(name) for name in names}
    for name in sorted(found, key=lambda name: _order(name, found[name])):
        if part := found[name]:
            if int(part["end"]) <= ends.get(part["writer"], 0):
                continue
            ends[part["writer"]] = int(part["end"])
        needed.append(name)
    return needed


def _order(name: str, part: re.Match[str] | None) -> tuple[str, int, int]:
    """By writer; a part before those that begin behind it, or end before it."""
    return (part["writer"], int(part["first"]), -int(part["end"])) if part else (name, 0, 0)


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
