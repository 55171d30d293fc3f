"""Which row ids a store holds."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from hashlib import blake2b

import numpy as np

from activation_extractor._format._rows import RowId

_RECENT = 1 << 16
_DIGEST_BYTES = 16  # two different ids of a thousand million share one with a probability of 1e-21


class SeenIds:
    """The ids that were seen, at 16 bytes each, however long they are."""

    def __init__(self) -> None:
        self._recent: set[bytes] = set()
        self._sorted: list[np.ndarray[tuple[int], np.dtype[np.bytes_]]] = []  # each at least twice the next one's size

    def add(self, ids: Sequence[RowId]) -> RowId | None:
        """Note ids, unless one of them comes twice or was seen before: that one is returned, and none is noted."""
        digests = [blake2b(str(one).encode(), digest_size=_DIGEST_BYTES).digest() for one in ids]
        repeated = self._first_repeated(digests)
        if repeated is not None:
            return ids[repeated]
        self._recent.update(digests)
        if len(self._recent) >= _RECENT:
            self._settle()
        return None

    def _first_repeated(self, digests: Sequence[bytes]) -> int | None:
        is_old = np.zeros(len(digests), dtype=bool)
        wanted = _array(digests)
        for known in self._sorted:
            places = np.searchsorted(known, wanted)
            is_old |= known[np.minimum(places, len(known) - 1)] == wanted
        new: set[bytes] = set()
        for index, digest in enumerate(digests):
            if is_old[index] or digest in self._recent or digest in new:
                return index
            new.add(digest)
        return None

    def _settle(self) -> None:
        """Move what is recent to the sorted ids, merging where the sizes are alike, as a counter carries over."""
        settled = np.sort(_array(self._recent))
        while self._sorted and len(self._sorted[-1]) < 2 * len(settled):
            settled = np.sort(np.concatenate([self._sorted.pop(), settled]), kind="stable")
        self._sorted.append(settled)
        self._recent.clear()


def _array(digests: Iterable[bytes]) -> np.ndarray[tuple[int], np.dtype[np.bytes_]]:
    return np.fromiter(digests, dtype=f"S{_DIGEST_BYTES}")
