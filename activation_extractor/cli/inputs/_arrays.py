"""Arrays: a row for each index of the first axis of a ``.npy`` file, which is mapped."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from activation_extractor.cli.inputs._bad_rows import BadRows
from activation_extractor.cli.inputs._files import InputFile
from activation_extractor.cli.inputs._source import Kind, Reader, Row
from activation_extractor.errors import ArgumentError

_NUMBERS = "biufc"  # kinds of dtypes that torch has
_WIDEST = {"f": 8, "c": 16}


class ArrayReader(Reader):
    """The rows of a ``.npy`` file, in the byte order of this machine."""

    kind: Kind = "array"

    def __init__(self, file: InputFile) -> None:
        try:
            self._array: np.ndarray[Any, Any] = np.load(file.path, mmap_mode="r", allow_pickle=False)
        except (ValueError, OSError, EOFError) as error:
            raise ArgumentError("input", "be a .npy file of numbers", file.name, f"{error}.") from error
        dtype = self._array.dtype
        if dtype.kind not in _NUMBERS or dtype.itemsize > _WIDEST.get(dtype.kind, 8):
            advice = f"Convert what is in {file.name!r}."
            raise ArgumentError("input", "be a .npy file of numbers that torch has", str(dtype), advice)
        if not self._array.ndim:
            raise ArgumentError("input", "hold an array with a row for each sample", file.name)
        self.count, self._file = len(self._array), file

    def rows(self, bad_rows: BadRows) -> Iterator[Row]:
        """The array at each index; a view of the file where the byte order is this machine's."""
        native = self._array.dtype.newbyteorder("=")
        for number, value in enumerate(self._array):
            yield Row(value.astype(native, copy=False), None, (), f"index {number}")
