"""Sinks: where finished steps go."""

from __future__ import annotations

import os
import threading
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from activation_extractor._steps import Ragged, RowId, Step
from activation_extractor._units import Unit, check_free, make_folder
from activation_extractor.errors import ArgumentError, ArgumentTypeError, StoreError

__all__ = ["MemorySink", "Ragged", "SafetensorsSink", "Sink", "Step"]

_UNIT_BYTES = 64 * 2**20


class Sink(ABC):
    """Where finished steps go.

    A sink of one's own implements `write`; ``capture(..., sink=MySink())`` calls it after each step that ended well,
    in the thread of the step, and `close` when the block is left. A capture that is entered again goes on writing.
    """

    @abstractmethod
    def write(self, step: Step) -> None:
        """Take a finished step; its tensors are the sink's from now on."""

    def close(self) -> None:  # noqa: B027 - most sinks have nothing to do here
        """Bring what was written to safety; called whenever a block is left, also after an error."""


class MemorySink(Sink):
    """Keeps every step in memory, on the device where it was reduced.

    Attributes:
        steps: the steps in order.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from activation_extractor import MemorySink, capture
        >>> model, sink = nn.Sequential(nn.Linear(4, 8)), MemorySink()
        >>> with capture(model, "0", sink=sink):
        ...     for _ in range(3):
        ...         _ = model(torch.randn(2, 4))
        >>> sink["0", "full"].shape
        torch.Size([6, 8])
    """

    def __init__(self) -> None:
        self.steps: list[Step] = []

    def write(self, step: Step) -> None:
        """Keep the step."""
        self.steps.append(step)

    def __getitem__(self, key: tuple[str, str]) -> Tensor | list[Tensor]:
        """The rows of a layer and reducer over all steps: one tensor, or a list with a tensor for each ragged row.

        Raises:
            KeyError: no step holds it.
        """
        parts = [step.values[key] for step in self.steps if key in step.values]
        if not parts:
            raise KeyError(key)
        if isinstance(parts[0], Ragged):
            return [row for part in parts if isinstance(part, Ragged) for row in part.rows()]
        return torch.cat([part for part in parts if isinstance(part, Tensor)])

    @property
    def ids(self) -> list[RowId]:
        """The ids of all rows."""
        return [one for step in self.steps for one in step.ids or ()]


class SafetensorsSink(Sink):
    """Writes a store: a folder of safetensors shards that `open_store` reads.

    Steps are gathered, on the CPU, into units of whole steps. A unit becomes a shard that appears complete or not at
    all. The last unit is written when the block is left, also when that is by an exception.

    Attributes:
        rows: how many rows it was given.
        nbytes: how many bytes of columns they had.

    Args:
        path: a new or empty folder; made when the first step is written.
        about: what to note in the manifest beside the columns, anything that JSON holds.
        unit_bytes: from how many bytes on a unit is written.
        rows_per_unit: write a unit from this many rows on instead.

    Raises:
        StoreError: the folder holds something.
        ArgumentError: a size that is not positive.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        about: Mapping[str, Any] | None = None,
        unit_bytes: int = _UNIT_BYTES,
        rows_per_unit: int | None = None,
    ) -> None:
        for name, size in (("unit_bytes", unit_bytes), ("rows_per_unit", rows_per_unit)):
            if size is not None and (not isinstance(size, int) or isinstance(size, bool) or size < 1):
                raise ArgumentError(name, "be a positive integer", size)
        if "\0" in os.fspath(path):
            raise ArgumentError("path", "be a path without NUL", os.fspath(path))
        self.path = Path(path)
        self.rows = self.nbytes = 0
        check_free(self.path)
        self._about = dict(about or {})
        self._unit_bytes, self._rows_per_unit = unit_bytes, rows_per_unit
        self._unit = Unit(0)
        self._ids: set[RowId] = set()
        self._is_made = False
        self._lock = threading.Lock()

    def write(self, step: Step) -> None:
        """Add the step to the unit; write the unit when it is large enough.

        Raises:
            StoreError: the folder cannot be made, an id was seen before, a column changed its dtype or row shape, or
                the disk refuses.
        """
        with self._lock:
            if not self._is_made:
                make_folder(self.path)
                self._is_made = True
            self._check_ids(step)
            self.nbytes += self._unit.add(step)
            self.rows += step.rows
            self._ids.update(step.ids or ())
            if self._is_whole():
                self._commit()

    def close(self) -> None:
        """Write the unit that is under way, if it holds anything."""
        with self._lock:
            if self._unit.rows:
                self._commit()

    def drop_unit(self) -> None:
        """Forget the unit that is under way."""
        with self._lock:
            self._unit = self._unit.next(is_same=True)

    def _is_whole(self) -> bool:
        if self._rows_per_unit is not None:
            return self._unit.rows >= self._rows_per_unit
        return self._unit.nbytes >= self._unit_bytes

    def _commit(self) -> None:
        self._unit.commit(self.path, self._about)
        self._unit = self._unit.next()

    def _check_ids(self, step: Step) -> None:
        repeated = [one for one, count in Counter(step.ids or ()).items() if count > 1 or one in self._ids]
        if repeated:
            raise StoreError(
                self.path, "hold each id once", f"{repeated[0]!r} again", "Give every row an id of its own."
            )


def open_sink(sink: Sink | str | os.PathLike[str] | None, about: Mapping[str, Any]) -> Sink | None:
    """The sink that ``sink=`` means: a `Sink` as it is, a path as a `SafetensorsSink`."""
    if sink is None or isinstance(sink, Sink):
        return sink
    if isinstance(sink, str | os.PathLike):
        return SafetensorsSink(sink, about=about)
    raise ArgumentTypeError("sink", "be a Sink or a folder's path", sink)
