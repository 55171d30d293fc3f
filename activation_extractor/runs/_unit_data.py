"""What the journal says of the part of a data set that a unit was made from, so that its shard need not be opened."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

from activation_extractor._format._journal import JournalRecord
from activation_extractor._format._stored_rows import RowId


@dataclass(frozen=True)
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

    def to_json(self) -> dict[str, Any]:
        """The member ``data`` of a journal's record."""
        members = {"items": self.items, "begins": self.begins, "ends": self.ends, "ids": self.ids, "first": self.first}
        return {name: value for name, value in members.items() if value not in (None, "")}

    @classmethod
    def of(cls, record: JournalRecord) -> UnitData | None:
        """What a record says; None where it says nothing, or something of another form."""
        data = record.data or {}
        items, ids, first = data.get("items"), data.get("ids", ""), data.get("first")
        begins, ends = _position(data.get("begins")), _position(data.get("ends"))
        if type(items) is not int or items < 1 or type(ids) is not str or type(first) is not str:
            return None
        return cls(items, begins, ends, ids, first)


def _position(value: Any) -> tuple[int, int] | None:
    is_pair = type(value) is list and len(value) == 2 and type(value[0]) is type(value[1]) is int
    return (value[0], value[1]) if is_pair else None


def ids_digest(before: str, ids: Iterable[RowId], places: Iterable[int]) -> str:
    """The digest of a unit's ids, in hexadecimal, after ids at these of its places; `before` is that of the others."""
    texts = (f"{place} {row_id!r}" for place, row_id in zip(places, ids, strict=True))
    digests = (blake2b(text.encode(), digest_size=8).digest() for text in texts)
    return f"{(int(before or '0', 16) + sum(int.from_bytes(digest, 'big') for digest in digests)) % 2**64:016x}"
