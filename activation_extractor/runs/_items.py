"""What the units of a run are counted in: the rows of its data set, or its batches where rows are not known."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import final

import numpy as np
from torch import Tensor

from activation_extractor._display import plural
from activation_extractor._format._fingerprints import inputs_crc32
from activation_extractor._format._manifest import BATCHES_PER_UNIT, ROWS_PER_UNIT
from activation_extractor._format._stored_rows import RowId
from activation_extractor.errors import ArgumentError, ArgumentTypeError, StepError
from activation_extractor.runs._batch_rows import Digests, combined
from activation_extractor.runs._batches import Batch
from activation_extractor.runs._padding import Padding
from activation_extractor.sinks._unit_policy import UNIT_BYTES, UNIT_ROWS


@dataclass(frozen=True)
class Arrived:
    """A batch with its items.

    Attributes:
        batch: the batch.
        places: of its items in the data set.
        items: what the items are.
        number: of the batch in the data set.
        failed: what was raised for rows that are left out, by their number in the batch.
    """

    batch: Batch
    places: Sequence[int]
    items: Items
    number: int
    failed: dict[int, Exception] = field(default_factory=dict)

    @cached_property
    def digests(self) -> Digests:
        """A digest of what each item is made from."""
        return self.items.digests(self.batch, self.places)

    @property
    def is_in_order(self) -> bool:
        """Whether its items follow each other, and those of the batch before."""
        return isinstance(self.places, range)

    def relative_to(self, start: int) -> str:
        """A digest of the places of its items, counted from a unit's first one: the same for the same batch."""
        return self.batch.relative_to(start, self.places)


@dataclass
class Expected:
    """Where the items of the next batch must be in the data set.

    Attributes:
        places: of the items; None where they may have any.
        is_lenient: whether a batch with others is passed, and `was_other` becomes true; else it is an error.
    """

    places: Sequence[int] | None = None
    is_lenient: bool = False
    was_other: bool = False

    def fits(self, arrived: Arrived) -> bool:
        """Whether a batch is one that is expected; raises an ArgumentError where it is not, and must be."""
        if self.places is None or [*arrived.places] == [*self.places]:
            return True
        if not self.is_lenient:
            condition = f"hold {plural(len(self.places), 'row')}, as its sampler or the first batch says"
            advice = "With share=None, or where they come from a generator, batches may have any rows."
            raise ArgumentError(f"batch {arrived.number}", condition, len(arrived.places), advice)
        self.was_other = True
        return False


class Items(ABC):
    """Counts the items of a data set from 0, and says how many make a unit."""

    size_member: str  # of the manifest
    places_from = "order"  # the argument that names the field with places, for errors

    def __init__(self, size: int | None, rows_per_unit: int | None, unit_bytes: int | None) -> None:
        self.size = size  # of all units; None until the first batch has chosen it
        self._rows_per_unit, self._count, self._batches = rows_per_unit, 0, 0
        self._unit_bytes = unit_bytes

    def in_batches(self) -> Items:
        """The same data set, counted in batches, of which none has come."""
        return BatchItems(self._rows_per_unit, self._unit_bytes)

    def arrive(self, batch: Batch) -> Arrived:
        """The next batch of the data set."""
        self._batches += 1
        return Arrived(batch, self.places(batch), self, self._batches - 1)

    def go_to(self, batch: int, place: int) -> None:
        """Go to a batch, whose first item has this place in the data set: it is the next one."""
        self._batches, self._count = batch, place

    @abstractmethod
    def places(self, batch: Batch) -> Sequence[int]:
        """The places of a batch's items in the data set."""

    @abstractmethod
    def digests(self, batch: Batch, places: Sequence[int]) -> Digests:
        """A digest of what each item is made from."""

    @abstractmethod
    def digest(self, before: str, digests: Digests, places: Sequence[int]) -> str:
        """The digest of a unit, in hexadecimal, after items at these of its places; `before` is that of the others."""

    @abstractmethod
    def ids(self, batch: Batch, indices: Sequence[int]) -> list[RowId] | None:
        """The ids of the rows of some items of a batch; None where they have none."""

    @abstractmethod
    def choose_size(self, rows: int, nbytes: int) -> None:
        """Choose the size by the first batch, which has so many rows and bytes, where it is not known."""

    def _most(self, count: int, nbytes: int, most: int) -> int:
        """How many items are in `unit_bytes`, where `count` have `nbytes`; by default in 64 MiB, but at most `most`.

        Rows are hours of work where a model is large: only who gives a number of bytes may lose more than 4,096.
        """
        if self._unit_bytes is not None:
            return self._unit_bytes * count // nbytes
        return min(UNIT_BYTES * count // nbytes, most)


@final
class RowItems(Items):
    """Rows: how they are divided into batches does not matter. `padding` does not count."""

    size_member = ROWS_PER_UNIT

    def __init__(
        self,
        rows_per_unit: int | None,
        padding: Padding | None,
        group: str | None = None,
        unit_bytes: int | None = None,
    ) -> None:
        super().__init__(rows_per_unit, rows_per_unit, unit_bytes)
        self._padding, self.places_from = padding, "group" if group else "order"

    def places(self, batch: Batch) -> Sequence[int]:
        """The places of a batch's rows.

        Raises:
            ArgumentTypeError: a place is not an integer.
            ArgumentError: how many rows there are cannot be told.
        """
        if batch.places is not None:
            given = batch.places
            listed = given.tolist() if isinstance(given, Tensor | np.ndarray) else list(given)
            if not all(type(place) is int for place in listed):
                raise ArgumentTypeError("order", "hold the place of each row, counted from 0", given)
            if batch.rows != len(listed):
                got, advice = f"{batch.rows} rows for {len(listed)} places", "Check order=, and give each row an id."
                raise StepError("have a row for each place in order", got, advice)
            return listed
        rows = batch.rows
        if rows is None:
            condition, advice = "have arguments of one length, its rows", "Give each row an id, with ids=."
            raise ArgumentError("a batch", condition, "several lengths, or none", advice)
        self._count += rows
        return range(self._count - rows, self._count)

    def digests(self, batch: Batch, places: Sequence[int]) -> Digests:
        return batch.digests(len(places), self._padding)

    def digest(self, before: str, digests: Digests, places: Sequence[int]) -> str:
        return f"{(int(before, 16) + combined(digests, places)) % 2**64:016x}"

    def ids(self, batch: Batch, indices: Sequence[int]) -> list[RowId] | None:
        return None if batch.ids is None else [batch.ids[index] for index in indices]

    def choose_size(self, rows: int, nbytes: int) -> None:
        """A power of two, so that batches of any size choose the same: up to `unit_bytes`, or 64 MiB and 4,096 rows."""
        if self.size is None:
            self.size = 1 << max(self._most(rows, nbytes, UNIT_ROWS).bit_length() - 1, 0)


@final
class BatchItems(Items):
    """Batches, which are always the same ones."""

    size_member = BATCHES_PER_UNIT

    def __init__(self, rows_per_unit: int | None, unit_bytes: int | None = None) -> None:
        super().__init__(None, rows_per_unit, unit_bytes)
        self._crc32 = 0

    def places(self, batch: Batch) -> Sequence[int]:  # noqa: ARG002
        self._count += 1
        return range(self._count - 1, self._count)

    def digests(self, batch: Batch, places: Sequence[int]) -> Digests:
        """A CRC over the batch and those before it in its unit."""
        begins = self.size is not None and places[0] % self.size == 0
        self._crc32 = inputs_crc32(batch.inputs, 0 if begins else self._crc32)
        return np.array([self._crc32], dtype=np.uint64)

    def digest(self, before: str, digests: Digests, places: Sequence[int]) -> str:  # noqa: ARG002
        return f"{int(digests[-1]):08x}"

    def ids(self, batch: Batch, indices: Sequence[int]) -> list[RowId] | None:  # noqa: ARG002
        return batch.ids

    def choose_size(self, rows: int, nbytes: int) -> None:
        """As many batches as make `rows_per_unit` or about `unit_bytes`; or about 64 MiB, and at most 4,096 rows."""
        if self.size is None:
            wanted = self._rows_per_unit
            size = -(-wanted // rows) if wanted else max(1, self._most(1, nbytes, UNIT_ROWS // rows))
            self.size = max(size, self._count)  # batches before it may have had nothing to store
