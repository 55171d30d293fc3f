"""Files of pictures or sounds: those in a folder, or those that a table names."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from activation_extractor._display import plural
from activation_extractor.cli.inputs._audio import check_audio, check_sound, sound_suffixes
from activation_extractor.cli.inputs._bad_rows import BadRows
from activation_extractor.cli.inputs._images import check_image, check_images, image_suffixes
from activation_extractor.cli.inputs._media_file import MediaFile
from activation_extractor.cli.inputs._source import Kind, Reader, Row
from activation_extractor.errors import ArgumentError, ArgumentTypeError

FOLDER = "folder"  # what can be kept of files: the folder that holds them, within the input
MEDIA: tuple[Kind, ...] = ("image", "audio")
_CHECKS: dict[Kind, Callable[[MediaFile], None]] = {"image": check_image, "audio": check_sound}


class FolderReader(Reader):
    """The pictures, or the sounds, in a folder and those below it, or one alone; their ids are their paths in it.

    ``folder`` can be kept: the path of the folder that holds a file, ``.`` at the top.
    """

    has_ids = True

    def __init__(self, path: Path, keep: Sequence[str], kind: str | None = None) -> None:
        unknown = next((name for name in keep if name != FOLDER), None)
        if unknown is not None:
            raise ArgumentError("keep", f"be {FOLDER!r} where rows are files, the folder that holds them", unknown)
        self._top, self.kept = path if path.is_dir() else path.parent, tuple(keep)
        files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
        seen = [file for file in files if not _is_hidden(file.relative_to(self._top))]
        by_kind = {each: [file for file in seen if _kind_of(file) == each] for each in MEDIA}
        found = [each for each in MEDIA if (by_kind[each] if kind is None else each == kind)]
        if len(found) > 1:
            advice = "Pass input_format=image or input_format=audio."
            raise ArgumentError("input", "hold images or sounds, and not both", str(path), advice)
        self._files = [file for each in found for file in by_kind[each]]
        if not self._files:
            what = "a folder of images, such as .png and .jpg, or of sounds, such as .wav and .flac"
            raise ArgumentError("input", f"be {what}", str(path))
        self.kind = found[0]
        check_packages(self.kind)
        self._others = len(files) - len(self._files)

    def rows(self, bad_rows: BadRows) -> Iterator[Row]:
        """The files, of which the headers are read."""
        for path in self._files:
            within = path.relative_to(self._top)
            row = Row(MediaFile(within.as_posix(), path), within.as_posix(), (), within.as_posix())
            row = row._replace(kept=tuple(within.parent.as_posix() for _ in self.kept))
            if (made := check_media(row, row.value, self.kind, bad_rows)) is not None:
                yield made

    def notes(self) -> tuple[str, ...]:
        """How many files are of another kind."""
        return (f"{plural(self._others, 'other file')} in {str(self._top)!r} left out.",) if self._others else ()


class PathReader(Reader):
    """The files that a column of a table names, by paths that start at the table's folder, or holds as bytes."""

    def __init__(self, table: Reader, column: str, folder: Path, bad_rows: BadRows) -> None:
        self._table, self._column, self._folder = table, column, folder
        self.kept, self.has_ids, self.cells_are_text = table.kept, table.has_ids, table.cells_are_text
        first = next(iter(table.rows(bad_rows)), None)
        file = None if first is None else self._file(first)
        kind = None if file is None else _kind_of(file.path) or _kind_of_content(file)
        if kind is None:
            got = None if first is None else first.value
            raise ArgumentError(f"the column {column!r}", "name files of images or sounds", got)
        self.kind = kind
        check_packages(kind)

    def rows(self, bad_rows: BadRows) -> Iterator[Row]:
        """The rows of the table, with files in place of paths; their headers are read."""
        for row in self._table.rows(bad_rows):
            if (made := check_media(row, self._file(row), self.kind, bad_rows)) is not None:
                yield made

    def notes(self) -> tuple[str, ...]:
        """What the table's reader says."""
        return self._table.notes()

    def _file(self, row: Row) -> MediaFile | None:
        if isinstance(row.value, str) and row.value.strip():
            return MediaFile(row.value, self._folder / row.value.strip())
        return as_media_file(row.value, row.place)


def as_media_file(cell: Any, place: str) -> MediaFile | None:
    """The file in a cell ``{"bytes": ..., "path": ...}``, as data sets of the hub have them; None for another cell."""
    if not isinstance(cell, dict) or not {"bytes", "path"} <= cell.keys():
        return None
    path, content = cell["path"], cell["bytes"]
    if path is None and content is None:
        return None
    return MediaFile(f"{path or place}", Path(path or ""), content)


def check_packages(kind: Kind) -> None:
    """Make sure that what reads files of a kind is installed.

    Raises:
        MissingExtraError: it is not.
    """
    if kind == "image":
        check_images()
    elif kind == "audio":
        check_audio()


def is_media(path: Path) -> bool:
    """Whether a file is a picture or a sound by its suffix."""
    return _kind_of(path) is not None


def _kind_of(path: Path) -> Kind | None:
    suffix = path.suffix.lower()
    return "image" if suffix in image_suffixes() else "audio" if suffix in sound_suffixes() else None


def _is_hidden(path: Path) -> bool:
    """Whether a file is one that programs leave behind: thumbnails, checkpoints, what macOS puts beside each file."""
    return any(part.startswith(".") or part == "__MACOSX" for part in path.parts)


def _kind_of_content(file: MediaFile) -> Kind | None:
    """What the bytes of a file without a suffix are."""
    for kind, check in _CHECKS.items():
        with suppress(ArgumentError):
            check_packages(kind)
            check(file)
            return kind
    return None


def check_media(row: Row, file: MediaFile | None, kind: Kind, bad_rows: BadRows) -> Row | None:
    """A row with a file whose header can be read; None where there is none, which is reported."""
    try:
        if file is None:
            raise ArgumentTypeError(f"the file of {row.place}", "be a path, or hold one or bytes", row.value)
        if file.content is None and not file.path.is_file():
            raise ArgumentError(f"the file of {row.place}", "exist", str(file.path))
        _CHECKS[kind](file)
    except ArgumentError as error:
        bad_rows.report(row.place, row.id, error)
        return None
    return row._replace(value=file)
