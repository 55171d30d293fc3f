"""Objects of JSON: one a line, or those of one array."""

from __future__ import annotations

import json
from collections.abc import Iterator
from decimal import Decimal
from itertools import count
from typing import Any, TextIO

from activation_extractor._display import examples
from activation_extractor.cli.inputs._bad_rows import BadRows
from activation_extractor.cli.inputs._files import InputFile
from activation_extractor.cli.inputs._lines import blank_note
from activation_extractor.cli.inputs._records import Columns
from activation_extractor.cli.inputs._source import Reader, Row
from activation_extractor.errors import ArgumentError, ArgumentTypeError

_CHUNK = 1 << 18  # characters that are read at once
_BETWEEN = " \t\r\n,"  # what stands between the elements of an array
_ADVICE = "Repair or remove it."


class ObjectReader(Reader):
    """A row for each object."""

    def __init__(self, file: InputFile, columns: Columns) -> None:
        self._file, self._columns, self._blank = file, columns, 0
        self.kept, self.has_ids = columns.keep, columns.id is not None
        start = file.start(64)
        self._is_array = start[:1] == "[" and start[1:].lstrip()[:1] in "{]"

    def rows(self, bad_rows: BadRows) -> Iterator[Row]:
        """The wanted values of each object."""
        wanted: list[str] = []
        seen: set[str] = set()
        with self._file.reading(), self._file.open_text() as file:
            for place, record in self._elements(file, bad_rows) if self._is_array else self._lines(file, bad_rows):
                if not isinstance(record, dict):
                    bad_rows.report(place, None, ArgumentTypeError(place, "hold a JSON object", record, _ADVICE))
                    continue
                wanted = wanted or self._columns.among(record)
                seen |= record.keys() & {*wanted}
                missing = next((name for name in wanted if name not in record), None)
                if missing is None:
                    cells = [record[name] for name in wanted]
                    yield Row(cells[0], cells[1] if self.has_ids else None, tuple(cells[1 + self.has_ids :]), place)
                    continue
                if missing not in seen and not bad_rows.are_skipped:
                    self._columns.check(self._file.name, list(record), f" ({place})")
                advice = f"It has {examples(record)}." if record else "It is empty."
                bad_rows.report(place, None, ArgumentError(place, f"have the key {missing!r}", "none", advice))
            if wanted and not seen >= {*wanted}:
                self._columns.check(self._file.name, sorted(seen))

    def notes(self) -> tuple[str, ...]:
        """How many lines are blank."""
        return blank_note(self._blank, self._file.name)

    def _lines(self, file: TextIO, bad_rows: BadRows) -> Iterator[tuple[str, Any]]:
        self._blank = 0
        for number, line in enumerate(file, 1):
            if not line or line.isspace():
                self._blank += 1
                continue
            place = f"line {number}"
            try:
                yield place, _DECODER.decode(line)
            except (ValueError, RecursionError) as error:
                text = line.rstrip("\n")
                bad_rows.report(place, None, ArgumentError(place, "hold a JSON object", text, f"{error}."))

    def _elements(self, file: TextIO, bad_rows: BadRows) -> Iterator[tuple[str, Any]]:
        """The elements of an array, read piece by piece."""
        text, size = self._more("", file).removeprefix("["), _CHUNK
        for number in count(1):
            text = self._more(text.lstrip(_BETWEEN), file)
            if text.startswith("]") and not (text[1:] + file.read(_CHUNK)).strip():
                return
            if not text or text[0] == "]":
                condition = "end with its array" if text else "end with the ']' of its array"
                raise ArgumentError("input", condition, self._file.name)
            value, text, size = self._element(text, file, number, size)
            yield f"row {number}", value

    def _more(self, text: str, file: TextIO) -> str:
        """A text, or else what comes next in the file; nothing at its end."""
        while not text and (text := file.read(_CHUNK)):
            text = text.lstrip(_BETWEEN)
        return text

    def _element(self, text: str, file: TextIO, number: int, size: int) -> tuple[Any, str, int]:
        """One element from the start of a text, to which as much is read as it needs; the text behind it."""
        while True:
            try:
                value, end = _DECODER.raw_decode(text)
                if end < len(text):  # or else a number might go on
                    return value, text[end:], _CHUNK
            except ValueError as error:
                problem, whole = error, None
            else:
                problem, whole = ValueError("It has no end"), value
            more = file.read(size)
            if not more and whole is not None:
                return whole, "", _CHUNK
            if not more:
                what = f"row {number}"
                raise ArgumentError(what, "hold a JSON object", text[:200], f"{problem}.") from problem
            text, size = text + more, 2 * size


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object whose keys stand in it once."""
    record = dict(pairs)
    if len(record) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"The key {next(name for name in names if names.count(name) > 1)!r} stands in it twice")
    return record


def _number(text: str) -> float | Decimal:
    """A number with a fraction or an exponent; as it is written where no float is so large."""
    value = float(text)
    return Decimal(text) if value in (float("inf"), float("-inf")) else value


_DECODER = json.JSONDecoder(object_pairs_hook=_once, parse_float=_number)
