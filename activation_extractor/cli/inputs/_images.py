"""Pictures: a row for each file of a folder."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from activation_extractor._display import plural
from activation_extractor.cli.inputs._bad_rows import BadRows
from activation_extractor.cli.inputs._source import Kind, Reader, Row
from activation_extractor.errors import ArgumentError, MissingExtraError


class ImageReader(Reader):
    """The images in a folder and those below it; their ids are their paths."""

    kind: Kind = "image"
    has_ids = True

    def __init__(self, folder: Path) -> None:
        if find_spec("PIL") is None:
            raise MissingExtraError("Reading images", "images", "pillow")
        self._folder = folder
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        self._images = [path for path in files if path.suffix.lower() in _suffixes()]
        if not self._images:
            raise ArgumentError("input", "be a folder of images, such as .png and .jpg", str(folder))
        self._others = len(files) - len(self._images)

    def rows(self, bad_rows: BadRows) -> Iterator[Row]:
        """The paths of the images, of which the headers are read."""
        for path in self._images:
            name = path.relative_to(self._folder).as_posix()
            try:
                open_image(path).close()
            except ArgumentError as error:
                bad_rows.report(name, name, error)
            else:
                yield Row(path, name, (), name)

    def notes(self) -> tuple[str, ...]:
        """How many files are no images."""
        return (f"{plural(self._others, 'other file')} in {str(self._folder)!r} left out.",) if self._others else ()


def holds_images(files: Iterable[Path]) -> bool:
    """Whether one of these files is an image, which only PIL knows."""
    return find_spec("PIL") is not None and not _suffixes().isdisjoint(path.suffix.lower() for path in files)


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


def _suffixes() -> set[str]:
    """Suffixes of the files that PIL can decode."""
    from PIL import Image

    return {
        suffix
        for suffix, kind in Image.registered_extensions().items()
        if kind in Image.OPEN and Image.MIME.get(kind, "").startswith("image/")
    }
