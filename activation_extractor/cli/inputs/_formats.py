"""What an input is: by the end of its name, or by what it begins with."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from activation_extractor.cli.inputs._files import PACKED_SUFFIXES, InputFile
from activation_extractor.errors import ArgumentError

SUFFIXES = {
    "text": (".txt", ".text"),
    "jsonl": (".jsonl", ".ndjson"),
    "json": (".json",),
    "csv": (".csv",),
    "tsv": (".tsv", ".tab"),
    "parquet": (".parquet", ".pq"),
    "fasta": (".fasta", ".fa", ".faa", ".fna", ".ffn", ".frn", ".fas", ".fsa", ".pep", ".seq", ".mpfa"),
    "fastq": (".fastq", ".fq"),
    "npy": (".npy",),
}
_MEDIA = ("image", "audio")
_BY_SUFFIX = {suffix: format for format, suffixes in SUFFIXES.items() for suffix in suffixes}


def format_of(path: Path) -> str | None:
    """The format that the end of a file's name says, whatever it is packed with; None where it says none."""
    packed = path.suffix.lower() in PACKED_SUFFIXES
    return _BY_SUFFIX.get(Path(path.stem).suffix.lower() if packed else path.suffix.lower())


def check_format(format: str) -> str:
    """The format that a user asks for.

    Raises:
        ArgumentError: there is none of this name.
    """
    if format not in (*SUFFIXES, *_MEDIA):
        raise ArgumentError("input_format", f"be one of {', '.join((*SUFFIXES, *_MEDIA))}", format)
    return format


def looks_like(file: InputFile, names: Sequence[str] = ()) -> str:
    """The format that the first bytes of a file are of: lines of text where they are of none.

    A table is told by its header, which has the columns of these names.
    """
    with file.reading(), file.open_bytes() as content:
        magic = content.read(6)
    if magic.startswith(b"PAR1"):
        return "parquet"
    if magic == b"\x93NUMPY":
        return "npy"
    start = file.start()
    lines = [line for line in start.split("\n") if line.strip()]
    if start.startswith(">") and not all(line.startswith(">") for line in lines[:2]):
        return "fasta"
    if start.startswith("@") and len(lines) > 3 and lines[2].startswith("+"):
        return "fastq"
    if start.startswith("[") and start[1:].lstrip().startswith("{"):
        return "json"
    if start.startswith("{") and _is_object(lines[0], is_whole=len(lines) > 1):
        return "jsonl"
    cells = max((lines[0].split(separator) for separator in ",;\t|"), key=len) if lines else []
    is_table = names and len(cells) > 1 and {*names} <= {cell.strip().strip('"') for cell in cells}
    return "csv" if is_table else "text"


def _is_object(line: str, *, is_whole: bool) -> bool:
    """Whether a line is an object of JSON; where it goes on behind what was read, whether it begins like one."""
    if not is_whole:
        return line[1:].lstrip().startswith(('"', "}"))
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False
