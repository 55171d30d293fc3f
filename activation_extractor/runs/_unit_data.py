"""What the journal says of the part of a data set that a unit was made from, so that its shard need not be opened."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from hashlib import blake2b

from activation_extractor._format._journal import JournalRecord
from activation_extractor._format._stored_rows import RowId

_NOWHERE, _WORDS = (-1, -1), 7


@dataclass(slots=True)  # not frozen, which would take four times as long to make
class UnitData:
    """The part of a data set that a unit was made from.

    Attributes:
        items: how many rows of the data set it has, those that were left out too; or how many batches.
        begins: the number of the batch that holds its first item, and which of that batch's items this is; None where
            items came in another order than that of the data set.
        ends: the same of its last item.
        ids: a digest of the ids of its rows, in hexadecimal; empty where they have none.
        first: a digest of what those of its items are made from that came with the first one, in hexadecimal.
    """

    items: int
    begins: tuple[int, int] | None
    ends: tuple[int, int] | None
    ids: str
    first: str

    def to_text(self) -> str:
        """The member ``data`` of a journal's record."""
        positions = [*(self.begins or _NOWHERE), *(self.ends or _NOWHERE)]
        return " ".join(map(str, [self.items, *positions, self.ids or "-", self.first]))

    @classmethod
    def of(cls, record: JournalRecord) -> UnitData | None:
        """What a record says; None where it says nothing, or something of another form."""
        words = (record.data or "").split()
        if len(words) != _WORDS:
            return None
        try:
            items, *numbers = map(int, words[:5])
        except ValueError:
            return None
        begins, ends = (None if pair[0] < 0 else (pair[0], pair[1]) for pair in (numbers[:2], numbers[2:]))
        return cls(items, begins, ends, words[5].strip("-"), words[6]) if items > 0 else None


def ids_digest(before: str, ids: Iterable[RowId], places: Iterable[int]) -> str:
    """The digest of a unit's ids, in hexadecimal, after ids at these of its places; `before` is that of the others."""
    texts = (f"{place} {row_id!r}" for place, row_id in zip(places, ids, strict=True))
    digests = (blake2b(text.encode(), digest_size=8).digest() for text in texts)
    return f"{(int(before or '0', 16) + sum(int.from_bytes(digest, 'big') for digest in digests)) % 2**64:016x}"
