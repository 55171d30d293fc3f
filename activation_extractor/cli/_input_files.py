"""Rows of a data set as they come in files: text, sequences, arrays, images."""

from __future__ import annotations

import csv
import gzip
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from typing import Any, Literal, TextIO

import numpy as np

from activation_extractor._display import examples, plural
from activation_extractor.errors import ArgumentError, ArgumentTypeError, MissingExtraError

Kind = Literal["text", "array", "image"]
Record = Mapping[str, Any]

_TEXT_COLUMNS = ("text", "sequence")  # where no column is named
_FASTA = (".fasta", ".fa", ".faa", ".fna", ".ffn")


@dataclass(frozen=True)
class Rows:
    """The rows of a data set: a value for each, ids (None where rows are numbered), further columns, notes for users.

    Values are strings (``"text"``), arrays (``"array"``) or paths of files (``"image"``).
    """

    kind: Kind
    values: Any
    ids: list[str] | list[int] | None = None
    keep: Mapping[str, list[Any]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.values)


def read_rows(
    source: str, *, text_column: str | None = None, id_column: str | None = None, keep: Sequence[str] = ()
) -> Rows:
    """Read all rows of a file, or of a folder of images.

    Lines of text (``.txt``, ``-`` for standard input), objects (``.jsonl``), tables (``.csv``, ``.parquet``),
    sequences (FASTA: ids are the first words of the headers; ``description`` can be kept), arrays (``.npy``, a row for
    each index of the first axis, mapped rather than read). Text files may be compressed (``.gz``).

    By default the text is in the column ``text``, or ``sequence``; and rows are numbered, but those of FASTA files and
    images have ids.

    Raises:
        ArgumentError: the source does not exist, is of no known kind, empty or damaged; a column does not exist; a text
            is empty; an id comes twice.
        MissingExtraError: reading it needs a package that is not installed.
    """
    if source == "-":
        rows = _texts(source, _lines(sys.stdin), text_column, id_column, keep)
    else:
        path = Path(source)
        if not path.exists():
            raise ArgumentError("input", "be an existing file or folder", source)
        rows = _images(path) if path.is_dir() else _file(path, text_column, id_column, keep)
    wanted = [name for name in (text_column, id_column, *keep) if name is not None]
    if rows.kind != "text" and wanted:
        raise ArgumentError("a column", "be of a file that has columns", wanted[0], f"{source!r} has none.")
    if not len(rows):
        raise ArgumentError("input", "hold at least one row", source)
    _check_ids(rows.ids)
    return rows


def _file(path: Path, text_column: str | None, id_column: str | None, keep: Sequence[str]) -> Rows:
    suffix = Path(path.stem).suffix if path.suffix == ".gz" else path.suffix
    if suffix == ".npy":
        return Rows("array", _array(path))
    if suffix == ".parquet":
        return _texts(str(path), _parquet(path), text_column, id_column, keep)
    readers: dict[str, Callable[[TextIO], Iterable[Record]]] = {".txt": _lines, ".jsonl": _objects, ".csv": _table}
    readers |= dict.fromkeys(_FASTA, _fasta)
    if suffix not in readers:
        kinds = ".txt, .jsonl, .csv, .parquet, .fasta, .npy or a folder of images"
        raise ArgumentError("input", f"be {kinds}", str(path))
    if suffix in _FASTA:
        id_column = id_column or "id"
    try:
        open_text: Any = gzip.open if path.suffix == ".gz" else open
        with open_text(path, "rt", encoding="utf-8-sig", newline="") as file:
            return _texts(str(path), readers[suffix](file), text_column, id_column, keep)
    except UnicodeDecodeError as error:
        raise ArgumentError("input", "be text in UTF-8", str(path), f"Byte {error.start} is not.") from error
    except (OSError, EOFError, csv.Error) as error:
        if isinstance(error, ArgumentError):
            raise
        raise ArgumentError("input", "be a file that can be read", str(path), f"{error}.") from error


def _texts(
    source: str, records: Iterable[Record], text_column: str | None, id_column: str | None, keep: Sequence[str]
) -> Rows:
    """The columns that are wanted, from records that have them."""
    texts: list[str] = []
    ids: list[Any] = []
    kept: dict[str, list[Any]] = {name: [] for name in keep}
    for number, record in enumerate(records):
        text_column = text_column or next((name for name in _TEXT_COLUMNS if name in record), "text")
        text = _cell(source, record, "text_column", text_column)
        what = f"{text_column!r} of row {number} (counted from 0)"
        if not isinstance(text, str):
            raise ArgumentTypeError(what, "be text", text)
        if not text.strip():
            raise ArgumentError(what, "hold text", text, "Remove that row.")
        texts.append(text)
        if id_column is not None:
            ids.append(_cell(source, record, "id_column", id_column))
        for name in keep:
            kept[name].append(_cell(source, record, "keep", name))
    kept = {name: values if None in values else as_numbers(values) for name, values in kept.items()}
    return Rows("text", texts, ids if id_column else None, kept)


def _cell(source: str, record: Record, argument: str, column: str) -> Any:
    if column not in record:
        advice = f"Its columns are {examples(record)}." if record else ""
        raise ArgumentError(argument, f"name a column of {source!r}", column, advice)
    return record[column]


def as_numbers(values: list[Any]) -> list[Any]:
    """Cells of a table as integers, else as floats, where all but None are written numbers; any others as they are."""
    if not all(value is None or isinstance(value, str) for value in values):
        return values
    for kind in (int, float):
        try:
            return [None if value is None else kind(value) for value in values]
        except ValueError:
            continue
    return values


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


def _array(path: Path) -> np.ndarray[Any, Any]:
    try:
        array: np.ndarray[Any, Any] = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise ArgumentError("input", "be a .npy file of numbers", str(path), f"{error}.") from error
    if not array.ndim:
        raise ArgumentError("input", "hold an array with a row for each sample", str(path))
    return array


def _images(folder: Path) -> Rows:
    if find_spec("PIL") is None:
        raise MissingExtraError("Reading images", "images", "pillow")
    from PIL import Image

    kinds = Image.registered_extensions()
    suffixes = {
        suffix for suffix, kind in kinds.items() if kind in Image.OPEN and Image.MIME.get(kind, "").startswith("image/")
    }
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    images = [path for path in files if path.suffix.lower() in suffixes]
    if not images:
        raise ArgumentError("input", "be a folder of images, such as .png and .jpg", str(folder))
    for path in images:
        open_image(path).close()
    others = len(files) - len(images)
    notes = (f"{plural(others, 'other file')} in {str(folder)!r} left out.",) if others else ()
    return Rows("image", images, [path.relative_to(folder).as_posix() for path in images], notes=notes)


def open_image(path: Path) -> Any:
    """An image of PIL, of which only the header was read.

    Raises:
        ArgumentError: the file is no image, or cannot be read.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        return Image.open(path)
    except (UnidentifiedImageError, OSError) as error:
        raise ArgumentError("an image", "be a file that can be read", str(path), "Remove or repair it.") from error


def _check_ids(ids: Sequence[Any] | None) -> None:
    earlier: set[Any] = set()
    for number, row_id in enumerate(ids or ()):
        what = f"the id of row {number} (counted from 0)"
        if not isinstance(row_id, str | int) or isinstance(row_id, bool):
            raise ArgumentTypeError(what, "be text or an integer", row_id)
        if row_id in earlier:
            raise ArgumentError(what, "be its own", row_id, "An earlier row has it.")
        earlier.add(row_id)
