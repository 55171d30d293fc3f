"""Lines of text."""

from __future__ import annotations

from collections.abc import Iterator

from activation_extractor._display import plural
from activation_extractor.cli.inputs._bad_rows import BadRows
from activation_extractor.cli.inputs._files import InputFile
from activation_extractor.cli.inputs._records import Columns
from activation_extractor.cli.inputs._source import Reader, Row


class LineReader(Reader):
    """A row for each line that is not blank."""

    def __init__(self, file: InputFile, columns: Columns) -> None:
        columns.check(file.name, ["text"], advice="Its rows are lines; say input_format=csv, or what it holds.")
        self._file, self._blank = file, 0
        self.kept, self.has_ids = columns.keep, columns.id is not None

    def rows(self, bad_rows: BadRows) -> Iterator[Row]:
        """The lines, without their ends."""
        self._blank = 0
        cells = len(self.kept)
        with self._file.reading(), self._file.open_text() as file:
            for number, line in enumerate(file, 1):
                text = line.rstrip("\n")
                if not text or text.isspace():
                    self._blank += 1
                else:
                    yield Row(text, text if self.has_ids else None, (text,) * cells, f"line {number}")

    def notes(self) -> tuple[str, ...]:
        """How many lines are blank."""
        return blank_note(self._blank, self._file.name)


def blank_note(count: int, name: str) -> tuple[str, ...]:
    """A sentence about blank lines, if there are any."""
    return (f"{plural(count, 'blank line')} of {name!r} left out.",) if count else ()
