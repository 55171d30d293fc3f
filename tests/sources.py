"""Sources of rows that stand in a test."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from activation_extractor.cli.inputs import BadRows, Kind, Reader, Row, Source, open_source


class ListReader(Reader):
    def __init__(self, kind: Kind, values: Any, ids: Sequence[Any] | None, keep: Mapping[str, Sequence[Any]]) -> None:
        self.kind, self.has_ids, self.kept = kind, ids is not None, tuple(keep)
        self._values, self._ids, self._keep = values, ids, keep

    def rows(self, bad_rows: BadRows) -> Iterator[Row]:
        for index, value in enumerate(self._values):
            row_id = None if self._ids is None else self._ids[index]
            yield Row(value, row_id, tuple(column[index] for column in self._keep.values()), f"row {index + 1}")


def source_of(kind: Kind, values: Any, ids=None, keep=None, bad_rows: BadRows | None = None) -> Source:
    """A source of these values, with ids and kept columns."""
    return Source("rows", ListReader(kind, values, ids, keep or {}), bad_rows)


class Columns(NamedTuple):
    values: list[Any]
    ids: list[Any] | None
    keep: dict[str, list[Any]]
    places: list[str]
    notes: tuple[str, ...]


def read(name: Any, **options: Any) -> Columns:
    """All rows of an input, by columns; it is gone through twice, which must give the same."""
    source = open_source(str(name), **options)
    rows = list(source)
    assert repr([row[1:] for row in rows]) == repr([row[1:] for row in source])
    assert len(rows) == source.rows
    keep = {name: [row.kept[index] for row in rows] for index, name in enumerate(source.kept)}
    ids = [row.id for row in rows] if source.has_ids else None
    return Columns([row.value for row in rows], ids, keep, [row.place for row in rows], source.notes)
