"""Reading values out of shards: exactly the bytes that are asked for, with few files open.

Files are read with ``pread`` rather than mapped: a file that is cut short while it is read raises an error, where a map
would crash the process; a random row costs one or two pages of the disk; and the kernel reads ahead where rows follow
one another.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache, partial
from itertools import pairwise
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from activation_extractor._files import open_regular, read_at
from activation_extractor._format._codecs import Codec
from activation_extractor._format._entry_names import IDS, OFFSETS, ROWS
from activation_extractor._format._fields import Field
from activation_extractor._format._headers import Extent
from activation_extractor._format._places import Places
from activation_extractor._format._shards import REPAIR, Shard, read_shard, unreadable
from activation_extractor._format._stored_rows import RowId
from activation_extractor._format._unit_table import UnitTable
from activation_extractor._requests import joined, run
from activation_extractor._storage import RemoteFile, RemotePath, located
from activation_extractor.errors import StoreError

_MAX_OPEN_FILES = 64
_MAX_HEADERS = 256


class Reader:
    """Reads the shards of one store. Threads may share it; a copy in another process opens its own files.

    A shard is refused that does not hold `store`, the store's name, or that differs from what `units` says of it.

    Its methods raise a StoreError where the shard is damaged, gone, or belongs to another store.
    """

    def __init__(self, codec: Codec, store: str, units: UnitTable | None = None) -> None:
        self._arguments = codec, store, units
        # The caches do not refer to the reader: it is gone, and its files are closed, when the last reference is.
        files = lru_cache(_MAX_OPEN_FILES)(_open)

        @lru_cache(_MAX_HEADERS)
        def shards(path: str) -> Shard:
            file = files(path) if codec.reads_open_files else None
            opened = (file.descriptor,) if isinstance(file, _File) else ()
            shard = read_shard(located(path), codec, *opened)
            if units is not None:
                units.check(shard)
            if shard.metadata.get("store") != store:
                raise StoreError(path, "belong to this store", "a shard of another one", "Take it out of the folder.")
            return shard

        @lru_cache(_MAX_OPEN_FILES)
        def open_values(path: str, entry: str) -> Values:
            extent = shards(path).extents[entry]
            return _values(extent, files(str(extent.path)))

        @lru_cache(_MAX_OPEN_FILES)
        def open_place(extent_of: Callable[[int], Extent], unit: int) -> Values:
            extent = extent_of(unit)
            return _values(extent, files(str(extent.path)))

        self._files, self._shards, self._values, self._places = files, shards, open_values, dict[Field, Places]()
        self.open_place = open_place  # what one of the methods of `Places` finds

    def __reduce__(self) -> Any:
        return Reader, self._arguments

    def shard(self, path: str) -> Shard:
        """The header of a shard."""
        return self._shards(path)

    def open(self, path: str, entry: str) -> Values:
        """The values of an entry that a shard has."""
        return self._values(path, entry)

    def places(self, field: Field, units: UnitTable) -> Places:
        """Where the values of a column lie; remembered for the units of the reader's own store."""
        places = self._places.get(field)
        if places is None or places.units is not units:
            places = Places(field, units, self._shards)
            if units is self._arguments[-1]:
                self._places[field] = places
        return places

    def ids(self, path: str, kind: str | None = None) -> list[RowId] | None:
        """The ids of a shard's rows, which must be of a kind, ``str`` or ``int``, if one is given; None without ids."""
        shard = self.shard(path)
        offsets = shard.extents.get(IDS + OFFSETS)
        found = None if IDS not in shard.extents else "int" if offsets is None else "str"
        if found is None and not shard.rows:  # of a unit whose rows could not be run
            return None if kind is None else []
        if kind not in (None, found):
            raise StoreError(path, f"hold ids of the manifest's kind, {kind}", found or "none", REPAIR)
        if found is None:
            return None
        if offsets is None:
            return list(memoryview(self._bytes(shard.extents[IDS])[0]).cast("q").tolist())
        data, at = self._bytes(shard.extents[IDS], offsets)
        ends = memoryview(at).cast("q").tolist()
        if ends[0] != 0 or ends[-1] != len(data) or ends != sorted(ends):
            raise StoreError(path, f"hold rising offsets of {IDS!r}", "other numbers", REPAIR)
        try:
            text = data.decode()
            if len(text) == len(data):  # ASCII alone: a letter a byte
                return [text[start:stop] for start, stop in pairwise(ends)]
            return [data[start:stop].decode() for start, stop in pairwise(ends)]
        except ValueError as error:
            raise StoreError(path, "hold ids that are UTF-8 text", "other bytes", REPAIR) from error

    def _bytes(self, *extents: Extent) -> list[bytes]:
        """All bytes of each of some entries of a shard."""
        file = self._files(str(extents[0].path))
        if isinstance(file, RemoteFile):
            parts = [bytearray(extent.stop - extent.start) for extent in extents]
            starts = [extent.start - extents[0].start for extent in extents]
            run(RemoteValues(extents[0], file).requests(zip(parts, starts, strict=True)))
            return list(map(bytes, parts))
        return [self._local_bytes(extent) for extent in extents]

    def _local_bytes(self, extent: Extent) -> bytes:
        file = self._files(str(extent.path))
        assert isinstance(file, _File)
        try:
            return read_at(file.descriptor, extent.start, extent.stop - extent.start)
        except (OSError, ValueError) as error:
            raise unreadable(extent.path, error) from error

    def offsets(self, path: str, entry: str, start: int, stop: int | None) -> Tensor:
        """Where the rows `start` to `stop` of a ragged column begin, and where the last one ends; they rise."""
        positions = self.shard(path).extents[entry].shape[0]
        return checked_offsets(path, entry, self.open(path, entry + OFFSETS), positions, start, stop)

    def row_numbers(self, path: str, entry: str) -> Tensor:
        """Which rows of its shard a column has, ``(rows,)`` int64; they rise."""
        shard = self.shard(path)
        if entry + ROWS not in shard.extents:
            return torch.arange(shard.rows)
        rows = self.open(path, entry + ROWS).whole()
        is_valid = not len(rows) or (rows[0] >= 0 and rows[-1] < shard.rows)
        if not is_valid or bool((rows[1:] <= rows[:-1]).any()):
            raise StoreError(path, f"hold rising row numbers of {entry!r}", "other numbers", REPAIR)
        return rows


def checked_offsets(path: str, entry: str, index: Values, positions: int, start: int, stop: int | None) -> Tensor:
    """The offsets `start` to `stop` of a ragged entry that has some positions, and the one after them; see `Reader`."""
    last = index.extent.shape[0] - 1
    stop = last if stop is None else stop
    offsets = index.rows(start, stop + 1)
    numbers = offsets.numpy()
    is_valid = numbers[0] >= 0 and numbers[-1] <= positions and not (numbers[1:] < numbers[:-1]).any()
    if not is_valid or (start == 0 and numbers[0] != 0) or (stop == last and numbers[-1] != positions):
        raise StoreError(path, f"hold rising offsets of {entry!r}", "other numbers", REPAIR)
    return offsets


class Values:
    """The values of one entry of a shard."""

    def __init__(self, extent: Extent, file: _File) -> None:
        self.extent, self.row_bytes, self._file = extent, extent.row_bytes, file

    def row(self, index: int) -> Tensor:
        """One row, new memory; `index` must be below the entry's number of rows."""
        size, extent = self.row_bytes, self.extent
        if not size:
            return torch.empty(extent.shape[1:], dtype=extent.dtype)
        buffer = bytearray(size)
        self._fill(buffer, extent.start + index * size)
        row = torch.frombuffer(buffer, dtype=extent.dtype)
        return row if len(extent.shape) == 2 else row.view(extent.shape[1:])

    def rows(self, start: int, stop: int) -> Tensor:
        """The rows from `start` up to `stop`, which the entry must have; new memory."""
        extent, size = self.extent, (stop - start) * self.row_bytes
        shape = (stop - start, *extent.shape[1:])
        if not size:
            return torch.empty(shape, dtype=extent.dtype)
        data = np.empty(size, np.uint8)
        self._fill(data, extent.start + start * self.row_bytes)
        return torch.from_numpy(data).view(extent.dtype).view(shape)

    def whole(self) -> Tensor:
        """All rows, new memory."""
        return self.rows(0, self.extent.shape[0])

    def read_into(self, out: Tensor, start: int) -> None:
        """Fill `out`, contiguous and of the entry's dtype, with the rows from `start` on."""
        self._fill(out.reshape(-1).view(torch.uint8).numpy(), self.extent.start + start * self.row_bytes)

    def read_bytes(self, data: memoryview, start: int) -> None:
        """Fill a buffer of bytes from a byte of the values on."""
        self._fill(data, self.extent.start + start)

    def mapped(self) -> Tensor:
        """All rows as a view of the file: nothing is read before it is touched, and writes stay in memory."""
        extent = self.extent
        if extent.start == extent.stop:
            return torch.empty(extent.shape, dtype=extent.dtype)
        if extent.start % extent.dtype.itemsize:  # possible in an npz file that another program has written
            return self.whole()
        try:
            storage = torch.UntypedStorage.from_file(str(extent.path), False, extent.stop)  # holds no file open
        except RuntimeError as error:
            raise unreadable(extent.path, ValueError("a file that was cut short, or is gone")) from error
        flat = torch.empty(0, dtype=torch.uint8).set_(storage)[extent.start :]  # type: ignore[arg-type]
        mapped: Tensor = flat.view(extent.dtype).view(extent.shape)
        return mapped

    def _fill(self, data: Any, position: int) -> None:
        """Fill a buffer of bytes from a position of the file on."""
        try:
            count = os.preadv(self._file.descriptor, [data], position)
            while count < len(data):  # at the end of the file, or since no call reads more than 2 GiB
                more = os.preadv(self._file.descriptor, [memoryview(data)[count:]], position + count)
                if not more:
                    raise ValueError("a file that was cut short")
                count += more
        except (OSError, ValueError) as error:
            raise unreadable(self.extent.path, error) from error


class RemoteValues(Values):
    """The values of one entry of a shard that is an object of a bucket."""

    def __init__(self, extent: Extent, file: RemoteFile) -> None:
        self.extent, self.row_bytes, self._object = extent, extent.row_bytes, file

    def mapped(self) -> Tensor:
        """Raises a StoreError, since there is no file."""
        advice = "Read it with column[...] or column.blocks(), or copy the store to a disk."
        raise StoreError(self.extent.path, "lie on this machine to be mapped", "an object in a bucket", advice)

    def fetch(self, start: int, stop: int) -> Any:
        """The bytes from one of the values up to another; a buffer that cannot be written."""
        try:
            return self._object.fetch(self.extent.start + start, stop - start)
        except StoreError:
            raise
        except (OSError, ValueError) as error:
            raise unreadable(self.extent.path, error) from error

    def requests(self, places: Iterable[tuple[Any, int]]) -> list[tuple[Callable[[], None], int]]:
        """What fills buffers from an object in a bucket, each from a byte of the values on, and how much each reads."""
        wanted = [(data, self.extent.start + start) for data, start in places if len(data)]
        return [(partial(self._fill_remotely, group), nbytes) for group, nbytes in joined(wanted)]

    def _fill_remotely(self, places: Sequence[tuple[Any, int]]) -> None:
        try:
            self._object.fill_many(places)
        except StoreError:
            raise
        except (OSError, ValueError) as error:
            raise unreadable(self.extent.path, error) from error

    def _fill(self, data: Any, position: int) -> None:
        run(self.requests([(data, position - self.extent.start)]))


class _File:
    """An open file, closed when the last reference to it is gone."""

    descriptor = -1
    _close = staticmethod(os.close)  # when the interpreter ends, `os` may be gone before the last reference is

    def __init__(self, path: str) -> None:
        try:
            self.descriptor = open_regular(path)
        except (OSError, ValueError) as error:
            raise unreadable(path, error) from error

    def __del__(self) -> None:
        if self.descriptor >= 0:
            self._close(self.descriptor)


def _values(extent: Extent, file: _File | RemoteFile) -> Values:
    return Values(extent, file) if isinstance(file, _File) else RemoteValues(extent, file)


def _open(path: str) -> _File | RemoteFile:
    if "://" not in path:
        return _File(path)
    return RemoteFile(cast("RemotePath", located(path)))
