"""The ids of rows that came, 16 bytes for each, so that one that comes again is found."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt

from activation_extractor._format._stored_rows import RowId

DIGEST_BYTES = 16  # two of 10**12 ids have one digest with a probability of 10**-15
Digests = npt.NDArray[np.bytes_]  # ``(ids,)`` of 16 bytes each

_RECENT = 2**16  # ids in a set, of 110 bytes each, before they become a sorted array


def digest_of(row_id: RowId) -> bytes:
    """A digest of an id, the same in every process; an integer has that of its digits."""
    return hashlib.blake2b(str(row_id).encode("utf-8", "surrogatepass"), digest_size=DIGEST_BYTES).digest()


class SeenIds:
    """Ids that came, as digests: sorted arrays, of which each is much longer than the next, and a set of the last ones.

    10 million ids take 160 MB, and twice as much while two arrays become one; as a set of texts they took 1.2 GB.
    """

    def __init__(self) -> None:
        self._sorted: list[Digests] = []
        self._recent: set[bytes] = set()

    def __len__(self) -> int:
        return sum(map(len, self._sorted)) + len(self._recent)

    def has(self, ids: Sequence[RowId]) -> list[bool]:
        """Whether each of some ids came."""
        if not self._recent and not self._sorted:
            return [False] * len(ids)
        return self._has([digest_of(row_id) for row_id in ids])

    def add(self, ids: Iterable[RowId]) -> RowId | None:
        """Add ids; where one comes twice, add none and return that one."""
        listed = list(ids)
        digests = [digest_of(row_id) for row_id in listed]
        added: set[bytes] = set()
        for row_id, digest, is_known in zip(listed, digests, self._has(digests), strict=True):
            if is_known or digest in added:
                return row_id
            added.add(digest)
        self._recent |= added
        if len(self._recent) >= _RECENT:
            self._sort()
        return None

    def sorted(self) -> Digests:
        """All digests, in order; they stay."""
        return merged([*self._sorted, _array(self._recent)])

    def _has(self, digests: Sequence[bytes]) -> list[bool]:
        known = [digest in self._recent for digest in digests]
        if not self._sorted or not digests:
            return known
        asked = np.array(digests, dtype=f"S{DIGEST_BYTES}")
        found = np.array(known)
        for run in self._sorted:
            found |= contains(run, asked)
        return list(found.tolist())

    def _sort(self) -> None:
        """Make a sorted array of the last ids, and one of it and those before it that are not much longer."""
        last, self._recent = _array(self._recent), set()
        while self._sorted and len(self._sorted[-1]) <= 4 * len(last):
            last = merged([self._sorted.pop(), last])
        self._sorted.append(last)


def contains(run: Digests, asked: Digests) -> npt.NDArray[np.bool_]:
    """Which digests are in a sorted array that is not empty."""
    places = np.searchsorted(run, asked)
    found: npt.NDArray[np.bool_] = run[np.minimum(places, len(run) - 1)] == asked
    return found


def merged(runs: Sequence[Digests]) -> Digests:
    """Sorted arrays as one."""
    joined: Digests = np.concatenate(runs)
    joined.sort(kind="stable")  # which is quick where parts are sorted
    return joined


def _array(digests: Iterable[bytes]) -> Digests:
    found: Digests = np.frombuffer(b"".join(digests), dtype=f"S{DIGEST_BYTES}").copy()
    found.sort()
    return found
