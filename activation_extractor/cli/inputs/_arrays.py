"""Arrays: a row for each index of the first axis of a ``.npy`` file, which is mapped."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from activation_extractor.cli.inputs._bad_rows import BadRows
from activation_extractor.cli.inputs._source import Kind, Reader, Row
from activation_extractor.errors import ArgumentError


class ArrayReader(Reader):
    """The rows of a ``.npy`` file."""

    kind: Kind = "array"

    def __init__(self, path: Path) -> None:
        try:
            self._array: np.ndarray[Any, Any] = np.load(path, mmap_mode="r", allow_pickle=False)
        except (ValueError, OSError, EOFError) as error:
            raise ArgumentError("input", "be a .npy file of numbers", str(path), f"{error}.") from error
        if not self._array.ndim:
            raise ArgumentError("input", "hold an array with a row for each sample", str(path))

    def rows(self, bad_rows: BadRows) -> Iterator[Row]:
        """The array at each index, a view of the file."""
        for number, value in enumerate(self._array):
            yield Row(value, None, (), f"index {number}")
