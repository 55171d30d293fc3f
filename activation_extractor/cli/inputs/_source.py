"""A data set that can be gone through row by row, as often as one likes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any, Literal, NamedTuple

import numpy as np

from activation_extractor.cli.inputs._bad_rows import BadRows
from activation_extractor.cli.inputs._checks import check_cell, check_id, check_text, is_plain_text
from activation_extractor.cli.inputs._columns import ColumnKind, Survey
from activation_extractor.cli.inputs._ids import Ids
from activation_extractor.errors import ArgumentError

Kind = Literal["text", "array", "image", "audio"]


class Row(NamedTuple):
    """A row as it was read.

    Attributes:
        value: text, an array, or the path of a picture or a sound.
        id: what it is called; None where rows are numbered.
        kept: its cells of the kept columns, in their order.
        place: where it stands, for people: "line 17", "record 'P1' at line 33", "cats/1.png".
    """

    value: Any
    id: str | int | None
    kept: tuple[Any, ...]
    place: str


class Reader(ABC):
    """Reads rows of one kind of input; a class for each.

    Attributes:
        kind: of the rows' values.
        kept: the names of kept columns.
        has_ids: whether rows have ids.
        cells_are_text: whether kept cells are written numbers, as in a .csv file, or have types of their own.
        unsigned: the kept columns whose integers are stored as uint64.
        count: how many rows there are, where that is known without reading them and they have neither ids nor cells.
    """

    kind: Kind = "text"
    kept: tuple[str, ...] = ()
    has_ids = False
    cells_are_text = False
    unsigned: tuple[str, ...] = ()
    count: int | None = None

    @abstractmethod
    def rows(self, bad_rows: BadRows) -> Iterator[Row]:
        """All rows, read anew each time; one that cannot be read is reported and left out.

        Values that are no text, empty texts and ids are checked by `Source`.
        """

    def notes(self) -> tuple[str, ...]:
        """What a user should know of what was read, a sentence each; asked for after the rows."""
        return ()


class Source:
    """The rows of a data set; iterating reads them anew, and holds a bounded piece of them.

    All rows are gone through once when it is made: they are counted, ids are compared, and the kinds of kept columns
    are decided.

    Attributes:
        name: the file, folder or pipe.
        kind: of the rows' values.
        rows: how many there are.
        has_ids: whether rows have ids.
        kept: the names of kept columns.
        longest: the two longest rows, by characters; the first two where the rows are no text.
        characters: of all rows; None where they are no text.
        notes: what a user should know, a sentence each.

    Raises:
        ArgumentError: there is no row, or a row cannot be used and `bad_rows` skips none.
    """

    def __init__(
        self, name: str, reader: Reader, bad_rows: BadRows | None = None, *, notes: Sequence[str] = ()
    ) -> None:
        self.name, self.kind, self.kept, self.has_ids = name, reader.kind, tuple(reader.kept), reader.has_ids
        self._reader, self._bad_rows, self._ids = reader, bad_rows or BadRows(), Ids()
        self.longest, self.notes = list[Row](), tuple[str, ...]()
        self._survey()
        if self._ids.find_twins():
            self._survey()  # in which rows with the id of an earlier one are reported
        if not self.rows:
            raise ArgumentError("input", "hold at least one row", name)
        self.longest = list(map(self._converted, self.longest))
        self.notes = (*notes, *reader.notes(), *self.notes, *self._ids.notes())

    def _survey(self) -> None:
        """Go through all rows, unless all there is to know is known."""
        self.rows, self.characters, self.longest = 0, 0 if self.kind == "text" else None, list[Row]()
        columns = Survey(self.kept, cells_are_text=self._reader.cells_are_text, unsigned=self._reader.unsigned)
        self._kinds = list[ColumnKind]()
        for row in self._usable() if self._reader.count is None else islice(self._usable(), 2):
            self.rows += 1
            self._measure(row)
            columns.add(row.kept, row.place)
            if self.has_ids:
                self._ids.add(row.id)
        self.rows = self.rows if self._reader.count is None else self._reader.count
        self._kinds, self.notes = columns.kinds(), columns.notes

    def __iter__(self) -> Iterator[Row]:
        is_as_read = not self._ids.are_converted and all(kind.convert is str for kind in self._kinds)
        return self._usable() if is_as_read else map(self._converted, self._usable())

    def entries(self, rows: Sequence[Row]) -> dict[str, Any]:
        """The kept columns of some rows, as batches of `extract` hold them: arrays of their dtypes, or texts."""
        return {
            name: cells if kind.dtype is None else np.array(cells, dtype=kind.dtype)
            for index, (name, kind) in enumerate(zip(self.kept, self._kinds, strict=True))
            for cells in [[row.kept[index] for row in rows]]
        }

    def _converted(self, row: Row) -> Row:
        cells = tuple([kind.convert(cell) for kind, cell in zip(self._kinds, row.kept, strict=True)])
        return Row(row.value, self._ids.convert(row.id), cells, row.place)

    def _usable(self) -> Iterator[Row]:
        """The rows without those that cannot be used, which are reported."""
        check = self._checker()
        for row in self._reader.rows(self._bad_rows):
            try:
                check(row)
            except ArgumentError as error:
                self._bad_rows.report(row.place, row.id, error)
            else:
                yield row

    def _checker(self) -> Callable[[Row], None]:
        """What refuses a row that cannot be used; most rows are ASCII, for which one question is enough."""
        is_text, has_ids, twins = self.kind == "text", self.has_ids, self._ids.twins()

        def check(row: Row) -> None:
            if is_text and not is_plain_text(row.value):
                check_text(row.value, row.place)
            for name, cell in zip(self.kept, row.kept, strict=True):
                if not (type(cell) is str and cell.isascii()):
                    check_cell(cell, name, row.place)
            if has_ids and not is_plain_text(row.id):
                check_id(row.id, row.place)
            if twins is not None:
                twins.check(row.id, row.place)

        return check

    def _measure(self, row: Row) -> None:
        if self.characters is None:
            if len(self.longest) < 2:
                self.longest.append(row)
            return
        self.characters += len(row.value)
        if len(self.longest) < 2 or len(row.value) > len(self.longest[1].value):
            self.longest = sorted([*self.longest, row], key=lambda row: -len(row.value))[:2]
