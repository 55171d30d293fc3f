"""The one door for files, folders and pipes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from activation_extractor._display import examples
from activation_extractor.cli.inputs._arrays import ArrayReader
from activation_extractor.cli.inputs._bad_rows import BadRows
from activation_extractor.cli.inputs._files import InputFile, piped
from activation_extractor.cli.inputs._folders import ShardReader
from activation_extractor.cli.inputs._formats import SUFFIXES, check_format, format_of, looks_like
from activation_extractor.cli.inputs._hub_datasets import HubDatasetReader, is_hub_dataset
from activation_extractor.cli.inputs._images import set_pixel_limit
from activation_extractor.cli.inputs._lines import LineReader
from activation_extractor.cli.inputs._media import MEDIA, FolderReader, PathReader, is_media
from activation_extractor.cli.inputs._objects import ObjectReader
from activation_extractor.cli.inputs._parquet import ParquetReader
from activation_extractor.cli.inputs._records import Columns
from activation_extractor.cli.inputs._sequences import FastaReader, FastqReader
from activation_extractor.cli.inputs._source import Reader, Source
from activation_extractor.cli.inputs._tables import TableReader
from activation_extractor.errors import ArgumentError

_READERS: dict[str, Callable[[InputFile, Columns], Reader]] = {
    "text": LineReader,
    "jsonl": ObjectReader,
    "json": ObjectReader,
    "parquet": ParquetReader,
    "fasta": FastaReader,
    "fastq": FastqReader,
}


def open_source(
    name: str,
    *,
    text_column: str | None = None,
    path_column: str | None = None,
    id_column: str | None = None,
    keep: Sequence[str] = (),
    format: str | None = None,
    separator: str | None = None,
    encoding: str | None = None,
    max_pixels: int | None = None,
    bad_rows: BadRows | None = None,
) -> Source:
    """The rows of a file, a folder or a pipe (``-`` for standard input).

    Args:
        name: a file of lines (``.txt``), objects (``.jsonl``, ``.json``), a table (``.csv``, ``.tsv``, ``.parquet``),
            sequences (FASTA, FASTQ) or an array (``.npy``, a row for each index of the first axis); a folder of such
            files of one kind, or of images or sounds, or one of these alone; a data set of Hugging Face, as a folder of
            `save_to_disk` or an id of the hub with a split (``owner/name:train``). Text may be packed (``.gz``,
            ``.bz2``, ``.xz``, ``.zst``). What comes through a pipe is told by how it begins.
        text_column: the column with the text; by default ``text``, or else ``sequence``.
        path_column: the column of a table with paths of images or sounds, from where the table lies, or their bytes.
        id_column: the column with the ids. By default rows are numbered, but sequences and images have ids.
        keep: further columns; of files in a folder, ``folder``.
        format: what the file is, where its name does not say it.
        separator: what stands between the cells of a table; by default a comma, or a tab in a ``.tsv`` file.
        encoding: of text without a byte-order mark; by default UTF-8.
        max_pixels: how many an image may have; by default what Pillow allows.
        bad_rows: what becomes of rows that cannot be used; by default the first one is an error.

    Raises:
        ArgumentError: the source does not exist, is of no known kind, empty or damaged; a column does not exist; a row
            cannot be used.
        MissingExtraError: reading it needs a package that is not installed.
    """
    path, columns = Path(name), Columns(path_column or text_column, id_column, tuple(dict.fromkeys(keep)))
    bad_rows = bad_rows or BadRows()
    set_pixel_limit(max_pixels)
    if path_column and text_column:
        raise ArgumentError("path_column", "be left out with text_column", path_column)
    if is_hub_dataset(name):
        return Source(name, HubDatasetReader(name, columns.text, id_column, columns.keep), bad_rows)
    if format is not None:
        check_format(format)
    if not name or (name != "-" and not path.exists()):
        raise ArgumentError("input", "be an existing file or folder", name)
    if path.is_dir() and name != "-":
        bad_rows.check_outside(path)
    open_reader = partial(_reader, columns=columns, separator=separator)
    name, reader, notes = _opened(name, columns, format, encoding, open_reader)
    if path_column:
        reader = PathReader(reader, path_column, path if path.is_dir() else path.parent, bad_rows)
    return Source(name, reader, bad_rows, notes=notes)


def _opened(
    name: str,
    columns: Columns,
    format: str | None,
    encoding: str | None,
    open_reader: Callable[[InputFile, str | None], Reader],
) -> tuple[str, Reader, list[str]]:
    """What an input is called, what reads it, and what a user should know of it."""
    path = Path(name)
    is_media_file = format in MEDIA or (format is None and is_media(path))
    if name != "-" and (path.is_dir() or is_media_file):
        return name, _folder(path, columns, format, encoding, open_reader), []
    if name != "-" and path.is_file():
        file = InputFile(name, path, encoding)
        chosen = format or format_of(path)
        other = looks_like(file, columns.named) if format is None and chosen == "text" else "text"
        note = f"{name!r} looks like {other}, and its lines are read as text; --input-format {other} reads it so."
    else:
        file = piped(name, encoding)
        chosen = other = format or looks_like(file, columns.named)
        note = f"{file.name[0].upper()}{file.name[1:]} is read as {chosen}; --input-format text reads its lines."
    notes = [note] if format is None and other != "text" else []
    return file.name, open_reader(file, chosen), notes


def _reader(file: InputFile, format: str | None, columns: Columns, separator: str | None) -> Reader:
    """What reads a file of a format."""
    if format is None:
        kinds = f"{', '.join(suffixes[0] for suffixes in SUFFIXES.values())} or a folder"
        raise ArgumentError("input", f"be {kinds}", file.name, "Say input_format=text, or what it holds.")
    if format in ("csv", "tsv"):
        return TableReader(file, columns, separator, "\t" if format == "tsv" else ",")
    if separator is not None:
        raise ArgumentError("separator", "be left out where the input is no .csv or .tsv", separator)
    if format == "npy":
        _check_unnamed(columns, file.name)
        return ArrayReader(file)
    return _READERS[format](file, columns)


def _folder(
    folder: Path,
    columns: Columns,
    format: str | None,
    encoding: str | None,
    open_reader: Callable[[InputFile, str | None], Reader],
) -> Reader:
    """What reads the shards in a folder, or its images or sounds; or one of these alone."""
    if format in MEDIA or not folder.is_dir():
        return _media(folder, columns, format)
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and _is_visible(path.relative_to(folder))]
    formats = {path: format_of(path) for path in files}
    kinds = {*formats.values()} - {None, "npy"}  # a file of .npy may be meant as one row
    if format is not None:
        shards = [path for path in files if formats[path] == format] or files
    elif not kinds or (columns.text is None and any(map(is_media, files))):
        return _media(folder, columns, None)
    elif len(kinds) > 1:
        advice = f"It has {examples(sorted(map(str, kinds)))}: say which one with input_format=csv, or as it is called."
        raise ArgumentError("input", "be a folder of files of one kind", str(folder), advice)
    else:
        format = kinds.pop()
        shards = [path for path in files if formats[path] == format]
    return ShardReader(folder, shards, lambda path: open_reader(InputFile(str(path), path, encoding), format))


def _media(path: Path, columns: Columns, kind: str | None) -> Reader:
    """What reads files of images or sounds."""
    _check_unnamed(Columns(columns.text, columns.id), str(path))
    return FolderReader(path, columns.keep, kind)


def _is_visible(path: Path) -> bool:
    """Whether neither a file nor a folder above it is hidden, as logs and checksums of programs are."""
    return not any(part.startswith((".", "_")) for part in path.parts)


def _check_unnamed(columns: Columns, name: str) -> None:
    if columns.named:
        raise ArgumentError("a column", "be of a file that has columns", columns.named[0], f"{name!r} has none.")
