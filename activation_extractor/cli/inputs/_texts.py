"""Rows of text: lines, objects, tables, sequences."""

from __future__ import annotations

import csv
import gzip
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from typing import Any, TextIO

from activation_extractor._display import examples
from activation_extractor.cli.inputs._bad_rows import BadRows
from activation_extractor.cli.inputs._source import Reader, Row
from activation_extractor.errors import ArgumentError, ArgumentTypeError, MissingExtraError

Record = Mapping[str, Any]

_TEXT_COLUMNS = ("text", "sequence")  # where no column is named
_FASTA = (".fasta", ".fa", ".faa", ".fna", ".ffn")


class TextReader(Reader):
    """Rows of a file of text, or of a table."""

    def __init__(self, name: str, text_column: str | None, id_column: str | None, keep: Sequence[str]) -> None:
        self._name, self._text_column, self.kept = name, text_column, tuple(keep)
        path = Path(name)
        self._suffix = Path(path.stem).suffix if path.suffix == ".gz" else path.suffix
        known = (".txt", ".jsonl", ".csv", ".parquet", *_FASTA)
        if name != "-" and self._suffix not in known:
            kinds = ".txt, .jsonl, .csv, .parquet, .fasta, .npy or a folder of images"
            raise ArgumentError("input", f"be {kinds}", name)
        self._id_column = id_column or ("id" if self._suffix in _FASTA else None)
        self.has_ids, self.cells_are_text = self._id_column is not None, self._suffix == ".csv"
        self._held = list(_lines(sys.stdin)) if name == "-" else None

    def rows(self, bad_rows: BadRows) -> Iterator[Row]:
        """The wanted cells of each record."""
        try:
            yield from self._rows()
        except UnicodeDecodeError as error:
            raise ArgumentError("input", "be text in UTF-8", self._name, f"Byte {error.start} is not.") from error
        except (OSError, EOFError, csv.Error) as error:
            if isinstance(error, ArgumentError):
                raise
            raise ArgumentError("input", "be a file that can be read", self._name, f"{error}.") from error

    def _rows(self) -> Iterator[Row]:
        with self._opened() as file:
            for number, record in enumerate(self._records(file), 1):
                column = self._text_column or next((name for name in _TEXT_COLUMNS if name in record), "text")
                text = self._cell(record, "text_column", column)
                row_id = None if self._id_column is None else self._cell(record, "id_column", self._id_column)
                kept = tuple(self._cell(record, "keep", name) for name in self.kept)
                yield Row(text, row_id, kept, f"row {number}")

    def _opened(self) -> Any:
        if self._held is not None or self._suffix == ".parquet":
            return nullcontext()
        open_text: Any = gzip.open if self._name.endswith(".gz") else open
        return open_text(self._name, "rt", encoding="utf-8-sig", newline="")

    def _records(self, file: TextIO) -> Iterable[Record]:
        if self._held is not None:
            return self._held
        if self._suffix == ".parquet":
            return _parquet(Path(self._name))
        readers: dict[str, Callable[[TextIO], Iterable[Record]]] = {".txt": _lines, ".jsonl": _objects, ".csv": _table}
        return readers.get(self._suffix, _fasta)(file)

    def _cell(self, record: Record, argument: str, column: str) -> Any:
        if column not in record:
            advice = f"Its columns are {examples(record)}." if record else ""
            raise ArgumentError(argument, f"name a column of {self._name!r}", column, advice)
        return record[column]


def _lines(file: TextIO) -> Iterator[Record]:
    for line in file:
        yield {"text": line.rstrip("\r\n")}


def _objects(file: TextIO) -> Iterator[Record]:
    for number, line in enumerate(file):
        try:
            record = json.loads(line)
        except ValueError as error:
            raise ArgumentError(f"line {number + 1}", "hold a JSON object", line.rstrip(), f"{error}.") from error
        if not isinstance(record, dict):
            raise ArgumentTypeError(f"line {number + 1}", "hold a JSON object", record)
        yield record


def _table(file: TextIO) -> Iterator[Record]:
    reader = csv.DictReader(file, strict=True)
    for record in reader:
        if None in record or None in record.values():
            condition = f"have a cell for each of the {len(reader.fieldnames or ())} columns"
            raise ArgumentError(f"line {reader.line_num}", condition, list(record.values()))
        yield record


def _fasta(file: TextIO) -> Iterator[Record]:
    """Records of FASTA: a header line that begins with ``>``, and lines of the sequence."""
    header, parts = "", list[str]()
    for number, line in enumerate(chain(file, [">"])):  # a last header ends the last record
        line = line.strip()
        if line.startswith(">"):
            if header:
                name, _, description = header[1:].strip().partition(" ")
                sequence = "".join(parts).removesuffix("*")  # the stop codon, which is no residue
                if not sequence:
                    raise ArgumentError(f"the sequence of {name!r}", "hold residues", sequence, "Remove that record.")
                yield {"id": name, "sequence": sequence, "description": description.strip()}
            header, parts = line, []
        elif line and not header:
            raise ArgumentError(f"line {number + 1}", "come after a header that begins with '>'", line)
        elif line:
            parts.append("".join(line.split()))


def _parquet(path: Path) -> Iterator[Record]:
    if find_spec("pyarrow") is None:
        raise MissingExtraError("Reading .parquet", "parquet", "pyarrow")
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    try:
        with ParquetFile(path) as file:
            for batch in file.iter_batches():
                yield from batch.to_pylist()
    except (ArrowException, OSError) as error:
        raise ArgumentError("input", "be a file that can be read", str(path), f"{error}") from error
