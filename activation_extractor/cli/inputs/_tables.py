"""Tables as text: a line for each row, cells between commas, tabs or semicolons, quoted where they need it.

The csv module of Python reads them: pyarrow does not know the line of a row, and most of the time that it saves goes
into making Python's text of its columns.
"""

from __future__ import annotations

import csv
import sys
from collections.abc import Iterator
from itertools import chain
from typing import Any, TextIO

from activation_extractor.cli.inputs._bad_rows import BadRows
from activation_extractor.cli.inputs._files import InputFile
from activation_extractor.cli.inputs._lines import blank_note
from activation_extractor.cli.inputs._records import Columns
from activation_extractor.cli.inputs._source import Reader, Row
from activation_extractor.errors import ArgumentError

_TYPED = {"\\t": "\t", "tab": "\t"}  # how a separator is given that is hard to type
_OTHERS = ";\t|"  # separators of files that are called .csv nevertheless


class TableReader(Reader):
    """A row for each one below the header.

    Where the header has not the wanted columns between commas, but has them between semicolons, tabs or bars, these
    separate the cells.
    """

    cells_are_text = True

    def __init__(self, file: InputFile, columns: Columns, separator: str | None, default: str = ",") -> None:
        given = _TYPED.get(separator or default, separator or default)
        if len(given) != 1 or given in '"\r\n':
            raise ArgumentError("separator", "be one character, or \\t for a tab", separator)
        self._file, self._columns, self._blank, self._separator = file, columns, 0, given
        self.kept, self.has_ids = columns.keep, columns.id is not None
        self._others = "" if separator or default != "," else _OTHERS
        csv.field_size_limit(sys.maxsize)

    def rows(self, bad_rows: BadRows) -> Iterator[Row]:
        """The wanted cells of each row."""
        self._blank = 0
        with self._file.reading(), self._file.open_text(newline="") as text:
            above, records = self._records(text)
            header: list[str] = next(records, [])
            if not header:
                return
            self._columns.check(self._file.name, header)
            wanted = [header.index(name) for name in self._columns.among(header)]
            for number, (line, cells) in enumerate(self._lines(above, records, bad_rows), 1):
                place = f"line {line} (row {number})"
                if len(cells) == len(header):
                    row_id = cells[wanted[1]] if self.has_ids else None
                    yield Row(cells[wanted[0]], row_id, tuple(cells[at] for at in wanted[1 + self.has_ids :]), place)
                    continue
                condition = f"have a cell for each of the {len(header)} columns"
                error = ArgumentError(place, condition, cells, "Quote a cell that holds a separator.")
                bad_rows.report(place, None, error)

    def notes(self) -> tuple[str, ...]:
        """How many lines are blank, and what separates cells where that is no comma."""
        return blank_note(self._blank, self._file.name)

    def _records(self, text: TextIO) -> tuple[int, Any]:
        """How many lines stand above the header, and the records from there on."""
        above, separator = 0, self._separator
        for line in text:
            if line.strip().lower()[:4] == "sep=" and len(line.strip()) == 5:  # Excel's
                separator = line.strip()[4]
            elif line.strip():
                return above, csv.reader(chain([line], text), delimiter=self._fitting(line, separator), strict=True)
            above += 1
        return above, iter([])

    def _fitting(self, header: str, separator: str) -> str:
        """The separator between which the header has the wanted columns, or else the usual one."""
        for candidate in (separator, *self._others):
            names = next(csv.reader([header], delimiter=candidate))
            if {*self._columns.among(names)} <= {*names}:
                return str(candidate)
        return separator

    def _lines(self, above: int, records: Any, bad_rows: BadRows) -> Iterator[tuple[int, list[str]]]:
        """The cells of each record that is not blank, and the line where it begins."""
        while True:
            line = above + records.line_num + 1
            try:
                cells = next(records)
            except StopIteration:
                return
            except csv.Error as error:
                if "unexpected end" in str(error):
                    what = f"the quote that is opened behind line {line - 1}"
                    raise ArgumentError(what, "be closed", "the end of the file", "Close it, or double it.") from error
                place = f"line {line}"
                advice = "A cell that begins with a quote ends with one; quotes within it are doubled."
                bad_rows.report(place, None, ArgumentError(place, "be cells of a table", str(error), advice))
                continue
            if not any(cells) or (len(cells) == 1 and cells[0].isspace()):
                self._blank += 1
            else:
                yield line, cells
