"""The units of a store in the order of its rows: what is known of each before it is opened, without an object for each.

A hundred thousand units take 4 MB, and a pickled copy, as a worker of a DataLoader gets one, less than 1 MB.
"""

from __future__ import annotations

import re
import zlib
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from activation_extractor._format._headers import SEAL
from activation_extractor._format._journal import JournalRecord
from activation_extractor._format._shards import Shard
from activation_extractor.errors import StoreError

_DIGITS = 8  # of the number that a unit's name ends in
_UNITS = 10**_DIGITS
_NO_SEAL = -1  # in a journal, text that is no checksum

Numbers = NDArray[np.int64]


@dataclass(frozen=True)
class EntryUnits:
    """The units that hold rows of an entry.

    Attributes:
        which: their indices, ``(units,)`` int64; None where they are all units.
        counts: how many rows of the entry each has, ``(units,)``.
        starts: which row of the entry each begins with, and the number of all, ``(units + 1,)``.
    """

    which: Numbers | None
    counts: Numbers
    starts: Numbers


class UnitTable:
    """The units of a store.

    Args:
        start: of the path of each shard.
        suffix: of the names of shards.
        units: their names, in order.
        records: what each holds, from the journal or its header.
        regular: the entries of the columns that the manifest lists.

    Attributes:
        rows: how many rows each has, ``(units,)`` int64.
        nbytes: their sizes on disk.
        starts: the first row of each, and the number of all rows, ``(units + 1,)``.
    """

    def __init__(
        self, start: str, suffix: str, units: Sequence[str], records: Iterable[JournalRecord], regular: frozenset[str]
    ) -> None:
        prefixes, keys = _keys(units)
        records = list(records)
        counts = {place: record.counts for place, record in enumerate(records) if record.counts is not None}
        sizes = [one.rows for one in records], [one.nbytes for one in records]
        arrays = [np.array(column, dtype=np.int64) for column in sizes]
        self._fill(start, suffix, prefixes, [keys, *arrays, _seals([one.seal for one in records])], counts, regular)

    def _fill(
        self,
        start: str,
        suffix: str,
        prefixes: Sequence[str],
        arrays: Sequence[Numbers],
        counts: Mapping[int, Mapping[str, int]],
        regular: frozenset[str],
    ) -> None:
        self._start, self._suffix, self._prefixes, self._regular = start, suffix, prefixes, regular
        self._counts = counts  # by place, where columns are not the regular ones, or short of rows
        keys, self.rows, self.nbytes, self._seals = arrays
        self._keys = keys.data  # of each unit: the place of its prefix, and eight digits

    @classmethod
    def of_shard(cls, shard: Shard) -> UnitTable:
        """A shard that is read alone."""
        suffix, start = shard.path.suffix, f"{shard.path.parent}/"
        return cls(start, suffix, [shard.metadata["unit"]], [shard.record(0, frozenset())], frozenset())

    def __reduce__(self) -> Any:
        steps = np.diff(np.asarray(self._keys), prepend=0)
        packed = [_packed(array) for array in (steps, self.rows, self.nbytes, self._seals)]
        return _unpacked, (self._start, self._suffix, self._prefixes, packed, self._counts, self._regular)

    def __len__(self) -> int:
        return len(self._keys)

    @cached_property
    def starts(self) -> Numbers:
        return _starts(self.rows)

    @property
    def numbers(self) -> Numbers:
        """The number of each unit in its data set."""
        numbers: Numbers = np.asarray(self._keys) % _UNITS
        return numbers

    @property
    def checksum(self) -> str:
        """A CRC-32 over the seals of all shards, and so over all values, as 8 hexadecimal digits."""
        return f"{zlib.crc32(self._seals.astype('<i8').tobytes()):08x}"

    def path(self, place: int) -> str:
        """The path of the shard of the unit at a place."""
        prefix, number = divmod(self._keys[place], _UNITS)
        return f"{self._start}{self._prefixes[prefix]}{number:08d}{self._suffix}"

    @cached_property
    def entries(self) -> list[str]:
        """The entries that some unit has rows of beside the regular ones."""
        found = (entry for rows in self._counts.values() for entry, count in rows.items() if count)
        return [entry for entry in dict.fromkeys(found) if entry not in self._regular]

    def of_entry(self, entry: str) -> EntryUnits:
        """The units that hold rows of an entry."""
        is_regular = entry in self._regular
        if is_regular and not self._counts:
            return self._of_regular
        counts = self.rows.copy() if is_regular else np.zeros_like(self.rows)
        for place, rows in self._counts.items():
            counts[place] = rows.get(entry, 0)
        return _held(counts)

    @cached_property
    def _of_regular(self) -> EntryUnits:
        return _held(self.rows)

    def check(self, shard: Shard) -> None:
        """Raise a StoreError where a shard is another one than is known of its unit."""
        place = self._place(shard.metadata["unit"])
        if place is None:
            return
        counts = None if shard.is_regular(self._regular) else shard.counts
        is_same = shard.rows == self.rows[place] and _seal(shard.metadata[SEAL]) == self._seals[place]
        if not is_same or counts != self._counts.get(place):
            advice = "Remove the folder 'journal': every shard is opened in its place."
            raise StoreError(shard.path, "agree with the journal", "other rows or columns", advice)

    def _place(self, unit: str) -> int | None:
        prefix = bisect_left(self._prefixes, unit[:-_DIGITS])
        if self._prefixes[prefix : prefix + 1] != [unit[:-_DIGITS]]:
            return None
        key = prefix * _UNITS + int(unit[-_DIGITS:])
        place = bisect_left(self._keys, key)
        return place if place < len(self._keys) and self._keys[place] == key else None


def _keys(units: Sequence[str]) -> tuple[list[str], Numbers]:
    """The prefixes of names, which are in order, and of each name the place of its prefix and its number."""
    if units and units[0][:-_DIGITS] == units[-1][:-_DIGITS] and int(units[-1][-_DIGITS:]) == len(units) - 1:
        return [units[0][:-_DIGITS]], np.arange(len(units))  # as many numbers as units: each there is
    prefixes = sorted({unit[:-_DIGITS] for unit in units})
    places = {prefix: _UNITS * place for place, prefix in enumerate(prefixes)}
    keys = [places[unit[:-_DIGITS]] + int(unit[-_DIGITS:]) for unit in units]
    return prefixes, np.array(keys, dtype=np.int64)


def _unpacked(
    start: str,
    suffix: str,
    prefixes: Sequence[str],
    packed: Sequence[bytes],
    counts: Mapping[int, Mapping[str, int]],
    regular: frozenset[str],
) -> UnitTable:
    table = UnitTable.__new__(UnitTable)
    steps, *others = [_unpacked_numbers(data) for data in packed]
    table._fill(start, suffix, prefixes, [steps.cumsum(), *others], counts, regular)
    return table


def _packed(numbers: Numbers) -> bytes:
    """Numbers in little memory: their first bytes, their second ones, ...; bytes that are all alike take none."""
    return zlib.compress(numbers.view(np.uint8).reshape(-1, 8).T.tobytes(), 1)


def _unpacked_numbers(data: bytes) -> Numbers:
    planes = np.frombuffer(zlib.decompress(data), dtype=np.uint8)
    return np.ascontiguousarray(planes.reshape(8, -1).T).view(np.int64).reshape(-1)


def _held(counts: Numbers) -> EntryUnits:
    which = np.flatnonzero(counts)
    if len(which) == len(counts):
        return EntryUnits(None, counts, _starts(counts))
    return EntryUnits(which, counts[which], _starts(counts[which]))


def _starts(counts: Numbers) -> Numbers:
    return np.concatenate([np.zeros(1, dtype=np.int64), counts.cumsum()])


def _seals(texts: Sequence[str]) -> Numbers:
    """Checksums as numbers."""
    joined = "".join(texts)
    if set(map(len, texts)) <= {8} and joined == joined.lower():
        with suppress(ValueError):  # a tenth of the time of one after the other
            data = bytes.fromhex(joined)
            if len(data) == 4 * len(texts):  # no spaces
                return np.frombuffer(data, dtype=">u4").astype(np.int64)
    return np.array([_seal(text) for text in texts], dtype=np.int64)


def _seal(text: str) -> int:
    """A checksum as a number."""
    return int(text, 16) if re.fullmatch("[0-9a-f]{8}", text) else _NO_SEAL
