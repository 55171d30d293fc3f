"""The one door for files, folders and pipes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from activation_extractor.cli.inputs._arrays import ArrayReader
from activation_extractor.cli.inputs._bad_rows import BadRows
from activation_extractor.cli.inputs._images import ImageReader
from activation_extractor.cli.inputs._source import Reader, Source
from activation_extractor.cli.inputs._texts import TextReader
from activation_extractor.errors import ArgumentError


def open_source(
    name: str,
    *,
    text_column: str | None = None,
    id_column: str | None = None,
    keep: Sequence[str] = (),
    format: str | None = None,
    separator: str | None = None,
    encoding: str | None = None,
    bad_rows: BadRows | None = None,
) -> Source:
    """The rows of a file, a folder or standard input (``-``).

    Lines of text (``.txt``), objects (``.jsonl``), tables (``.csv``, ``.parquet``), sequences (FASTA: ids are the first
    words of the headers; ``description`` can be kept), arrays (``.npy``, a row for each index of the first axis, mapped
    rather than read), a folder of images. Text files may be compressed (``.gz``).

    By default the text is in the column ``text``, or ``sequence``; and rows are numbered, but those of FASTA files and
    images have ids.

    Raises:
        ArgumentError: the source does not exist, is of no known kind, empty or damaged; a column does not exist; a text
            is empty; an id comes twice.
        MissingExtraError: reading it needs a package that is not installed.
    """
    path = Path(name)
    if name != "-" and not path.exists():
        raise ArgumentError("input", "be an existing file or folder", name)
    reader: Reader
    if name != "-" and path.is_dir():
        reader = ImageReader(path)
    elif path.suffix == ".npy":
        reader = ArrayReader(path)
    else:
        reader = TextReader(name, text_column, id_column, keep)
    wanted = [column for column in (text_column, id_column, *keep) if column is not None]
    if reader.kind != "text" and wanted:
        raise ArgumentError("a column", "be of a file that has columns", wanted[0], f"{name!r} has none.")
    return Source(name, reader, bad_rows)
