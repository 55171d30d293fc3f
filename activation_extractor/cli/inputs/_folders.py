"""Folders of files of one kind: the shards of a data set."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from activation_extractor._display import plural
from activation_extractor.cli.inputs._bad_rows import BadRows
from activation_extractor.cli.inputs._source import Reader, Row

_MOST_NOTES = 3


class ShardReader(Reader):
    """The rows of several files, one after another, in the order of their names."""

    def __init__(self, folder: Path, files: Sequence[Path], open_file: Callable[[Path], Reader]) -> None:
        self._readers = {path.relative_to(folder).as_posix(): open_file(path) for path in files}
        first = next(iter(self._readers.values()))
        self.kind, self.kept, self.has_ids = first.kind, first.kept, first.has_ids
        self.cells_are_text = first.cells_are_text
        self.unsigned = tuple({name for reader in self._readers.values() for name in reader.unsigned})

    def rows(self, bad_rows: BadRows) -> Iterator[Row]:
        """The rows of each file."""
        for name, reader in self._readers.items():
            for row in reader.rows(_OfFile(bad_rows, name)):
                yield row._replace(place=f"{row.place} of {name!r}")

    def notes(self) -> tuple[str, ...]:
        """Those of each file, or the first few where there are many."""
        notes = [note for reader in self._readers.values() for note in reader.notes()]
        more = len(notes) - _MOST_NOTES
        return (*notes[:_MOST_NOTES], *([f"The same is so of {plural(more, 'other file')}."] if more > 0 else []))


class _OfFile(BadRows):
    """Reports the bad rows of one file among others, with its name."""

    def __init__(self, bad_rows: BadRows, name: str) -> None:
        self._bad_rows, self._name = bad_rows, name

    @property
    def are_skipped(self) -> bool:
        return self._bad_rows.are_skipped

    def report(self, place: str, row_id: str | int | None, error: Exception) -> None:
        error.args = (f"{self._name}: {error}",)
        self._bad_rows.report(f"{place} of {self._name!r}", row_id, error)
