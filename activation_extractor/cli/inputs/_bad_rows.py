"""What becomes of rows that cannot be read or run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NoReturn

from activation_extractor.errors import ActivationError, ArgumentError


class BadRows:
    """Where rows that cannot be used are reported: the first one is an error, or each is a line of a file.

    Args:
        path: a file that gets an object for each of them, ``{"place": ..., "id": ..., "error": ...}``; the list of an
            earlier run is replaced. By default the first bad row raises its error.

    Attributes:
        count: how many were reported, each counted once.

    Raises:
        ArgumentError: the file cannot be written, or holds something else.
    """

    def __init__(self, path: Path | None = None) -> None:
        self._path, self._places = path, set[str]()
        if path is not None:
            try:
                if path.exists() and _start(path) not in (b"", b'{"place":'):
                    advice = "Choose another name: it would be overwritten."
                    raise ArgumentError(
                        "skip_bad_rows", "be a new file, or the list of an earlier run", str(path), advice
                    )
                path.write_bytes(b"")
            except OSError as error:
                self._fail(error)

    @property
    def count(self) -> int:
        return len(self._places)

    @property
    def are_skipped(self) -> bool:
        """Whether a bad row is left out, and does not end the run."""
        return self._path is not None

    def check_outside(self, folder: Path) -> None:
        """Refuse a file in a folder that is read: it would be taken for one of its files.

        Raises:
            ArgumentError: that is so.
        """
        if self._path is not None and folder.resolve() in self._path.resolve().parents:
            self._path.unlink()  # which was made empty
            raise ArgumentError("skip_bad_rows", "lie outside of the folder that is read", str(self._path))

    def report(self, place: str, row_id: str | int | None, error: Exception) -> None:
        """Raise the error of a row, or list the row, once, however often its source is gone through."""
        if self._path is None:
            raise error
        if place in self._places:
            return
        self._places.add(place)
        line = json.dumps({"place": place, "id": row_id, "error": str(error)})
        try:
            with open(self._path, "a", encoding="utf-8") as file:
                file.write(f"{line}\n")
        except OSError as trouble:
            self._fail(trouble)

    def _fail(self, error: OSError) -> NoReturn:
        if isinstance(error, ActivationError):
            raise error
        raise ArgumentError("skip_bad_rows", "be a file that can be written", str(self._path), f"{error}.") from error


def _start(path: Path) -> bytes:
    with open(path, "rb") as file:
        return file.read(9)
