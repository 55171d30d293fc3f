"""Sequences: FASTA and FASTQ."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from typing import TextIO

from activation_extractor.cli.inputs._bad_rows import BadRows
from activation_extractor.cli.inputs._files import InputFile
from activation_extractor.cli.inputs._records import Columns
from activation_extractor.cli.inputs._source import Reader, Row
from activation_extractor.errors import ArgumentError, MissingExtraError

_COLUMNS = ["sequence", "id", "description"]


class _SequenceReader(Reader):
    """A row for each record; its id is the header's first word, its description the rest."""

    cells_are_text = True
    has_ids = True

    def __init__(self, file: InputFile, columns: Columns) -> None:
        columns = Columns(columns.text, columns.id or "id", columns.keep)
        columns.check(file.name, _COLUMNS)
        self._file, self.kept = file, columns.keep
        self._wanted = [_COLUMNS.index(name) for name in columns.among(_COLUMNS)]

    def _row(self, header: str, sequence: str, line: int) -> Row:
        name, description = (*header.split(None, 1), "", "")[:2]
        record = (sequence, name, description)
        text, row_id, *kept = (record[index] for index in self._wanted)
        return Row(text, row_id, tuple(kept), f"record {name!r} at line {line}")


class FastaReader(_SequenceReader):
    """Records of FASTA: a header line that begins with ``>``, and lines of the sequence.

    Lines that begin with ``;`` or ``#`` are comments. White space in a sequence and the ``*`` at its end, the stop
    codon, are no part of it. dnaio's reader is not used, since it takes comments for residues, does not know the line
    of a record, and refuses headers that are not ASCII.
    """

    def rows(self, bad_rows: BadRows) -> Iterator[Row]:
        """The records."""
        with self._file.reading(), self._file.open_text() as file:
            for header, parts, line in _records(file):
                sequence = "".join("".join(parts).split()).removesuffix("*")
                row = self._row(header, sequence, line)
                problem, advice = "", ""
                if not sequence:
                    problem, advice = "hold residues", "Remove that record."
                elif ">" in sequence:
                    problem, advice = "hold '>' at the start of a line only", "A line end is missing before it."
                if problem:
                    bad_rows.report(row.place, row.id, ArgumentError(row.place, problem, sequence, advice))
                else:
                    yield row


def _records(file: TextIO) -> Iterator[tuple[str, list[str], int]]:
    """The header of each record, the lines behind it, and the line of the header."""
    header, parts, start = "", list[str](), 0
    for number, line in enumerate(file, 1):
        line = line.strip()
        if line.startswith(">"):
            if start:
                yield header, parts, start
            header, parts, start = line[1:].strip(), [], number
        elif line and line[0] not in ";#":
            if not start:
                raise ArgumentError(f"line {number}", "come after a header that begins with '>'", line)
            parts.append(line)
    if start:
        yield header, parts, start


class FastqReader(_SequenceReader):
    """Records of FASTQ, four lines each, which dnaio reads; qualities are left out."""

    def __init__(self, file: InputFile, columns: Columns) -> None:
        if find_spec("dnaio") is None:
            raise MissingExtraError("Reading FASTQ", "sequences", "dnaio")
        super().__init__(file, columns)

    def rows(self, bad_rows: BadRows) -> Iterator[Row]:
        """The records."""
        import dnaio

        with self._file.reading(), self._file.open_bytes() as file, dnaio.open(file, fileformat="fastq") as records:
            for number, record in enumerate(records):
                yield self._row(record.name, record.sequence, 4 * number + 1)
