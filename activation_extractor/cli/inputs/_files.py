"""A file of an input: its bytes unpacked, its text decoded; standard input is copied to one."""

from __future__ import annotations

import codecs
import io
import os
import shutil
import sys
import tempfile
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any, BinaryIO, TextIO

from activation_extractor.errors import ActivationError, ArgumentError, MissingExtraError

_PACKED = {b"\x1f\x8b": "gz", b"BZh": "bz2", b"\xfd7zXZ\x00": "xz", b"\x28\xb5\x2f\xfd": "zst"}  # by their first bytes
_ZIP = b"PK\x03\x04"  # which office programs save too
_MARKS = {
    codecs.BOM_UTF32_LE: "utf-32",  # before UTF-16's, which it begins with
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
    codecs.BOM_UTF8: "utf-8-sig",
}
_COPIED_BYTES = 1 << 20  # of a pipe at once
PACKED_SUFFIXES = tuple(f".{name}" for name in _PACKED.values())


@dataclass(frozen=True)
class InputFile:
    """A file that can be opened as often as one likes.

    Attributes:
        name: as users know it.
        path: where it is.
        encoding: of its text; by default UTF-8. A byte-order mark is stronger.
    """

    name: str
    path: Path
    encoding: str | None = None
    _first_state: dict[str, tuple[int, int]] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        try:
            "".encode(self.encoding or "utf-8")
        except LookupError as error:
            advice = "Such as utf-8, utf-16, latin-1 or cp1252."
            raise ArgumentError("input_encoding", "be an encoding that Python knows", self.encoding, advice) from error

    @contextmanager
    def reading(self) -> Iterator[None]:
        """What goes wrong with the file in the block is one sentence; so is a change of it since the first block."""
        try:
            found = os.stat(self.path)
            state = (found.st_size, found.st_mtime_ns)
            if self._first_state.setdefault("", state) != state:
                advice = "Run it again when nothing is written to it."
                raise ArgumentError("input", "stay as it is while it is read", self.name, advice)
            yield
        except (ActivationError, GeneratorExit):
            raise
        except UnicodeError as error:
            advice = f"{error}. Say what it is in: input_encoding='latin-1'.".replace("..", ".")
            raise ArgumentError("input", f"be text in {self.encoding or 'UTF-8'}", self.name, advice) from error
        except Exception as error:  # each way of packing has an error of its own
            raise ArgumentError("input", "be a file that can be read", self.name, f"{error}.") from error

    @contextmanager
    def open_bytes(self) -> Iterator[BinaryIO]:
        """The file's bytes, unpacked."""
        with open(self.path, "rb") as file:
            start = file.peek(6)
            format = next((format for magic, format in _PACKED.items() if start.startswith(magic)), None)
            if start.startswith(_ZIP):
                advice = "It is a zip archive: unpack it, or save what it holds as text."
                raise ArgumentError("input", "be text, or packed as .gz, .bz2, .xz or .zst", self.name, advice)
            if format is None:
                yield file
                return
            if find_spec("xopen") is None:
                raise MissingExtraError(f"Reading a packed file ({format})", "cli", "xopen")
            from xopen import xopen

            with xopen(file, "rb", threads=0, format=format) as unpacked:
                yield unpacked

    @contextmanager
    def open_text(self, newline: str | None = None) -> Iterator[TextIO]:
        """The file's text; bytes that are none stand in it as halves of surrogate pairs, for which rows are checked.

        Line ends are those of Unix, Windows and old Macs, and all become that of Unix by default.
        """
        with self.open_bytes() as file:
            start = file.peek(4)  # type: ignore[attr-defined]
            encoding = next((name for mark, name in _MARKS.items() if start.startswith(mark)), self.encoding)
            if encoding is None and b"\0" in start:
                advice = "It has bytes that are 0, as UTF-16 has: say input_encoding='utf-16-le', or 'utf-16-be'."
                raise ArgumentError("input", "be text in UTF-8", self.name, advice)
            with io.TextIOWrapper(file, encoding or "utf-8", errors="surrogateescape", newline=newline) as text:
                yield text

    def start(self, size: int = 4096) -> str:
        """The beginning of its text, without white space before it."""
        with self.reading(), self.open_text() as file:
            return file.read(size).lstrip()


def piped(name: str, encoding: str | None) -> InputFile:
    """What comes through standard input (``-``) or a named pipe, as a shell's ``<(command)`` is, in a temporary file.

    Raises:
        ArgumentError: it cannot be read, or there is no room for it.
    """
    shown = "standard input" if name == "-" else name
    try:
        copy = tempfile.NamedTemporaryFile(prefix="activation_extractor.")  # noqa: SIM115 - closed with what is returned
        _copy_pipe(name, copy)
        copy.flush()
    except OSError as error:
        advice = f"{error}. It is copied to {tempfile.gettempdir()!r}, or where TMPDIR says."
        raise ArgumentError("input", "be a pipe that can be read", shown, advice) from error
    file = InputFile(shown, Path(copy.name), encoding)
    weakref.finalize(file, copy.close)  # also where it ends in a circle of references, which would leave it open
    return file


def _copy_pipe(name: str, copy: Any) -> None:
    if name != "-":
        with open(name, "rb") as pipe:
            shutil.copyfileobj(pipe, copy, _COPIED_BYTES)
    elif sys.stdin is None:
        raise OSError("Standard input is closed")
    elif hasattr(sys.stdin, "buffer"):
        shutil.copyfileobj(sys.stdin.buffer, copy, _COPIED_BYTES)
    else:
        copy.write(sys.stdin.read().encode())
