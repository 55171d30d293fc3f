"""The header of a shard: its entries, where their bytes lie, and their checksums."""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Iterable, Mapping, Sequence
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from activation_extractor._files import TruncatedError
from activation_extractor._tensors import ordinary

Entries = Mapping[str, Sequence[Tensor]]  # by entry name, chunks along axis 0, on the CPU
SEAL = "seal"
_encode = json.JSONEncoder(sort_keys=True).encode


class Extent(NamedTuple):  # made in a quarter of the time that a frozen dataclass takes
    """Where the values of one entry lie, and what they are."""

    path: Path
    start: int  # the first byte of the values
    dtype: torch.dtype  # on disk
    shape: tuple[int, ...]  # rows, or positions, first
    crc32: int  # over the bytes from `crc_start` to the end of the values
    crc_start: int  # `start`, or the beginning of a header that the checksum includes

    @property
    def row_bytes(self) -> int:
        """The size of one row."""
        return self.dtype.itemsize * math.prod(self.shape[1:])

    @property
    def stop(self) -> int:
        """The first byte after the values."""
        return self.start + self.dtype.itemsize * math.prod(self.shape)


class Form:
    """What the entries of a shard are: dtype and shape of each, by name, in the order of the file.

    Shards of one store often have one form; what is found out about it is remembered with it.
    """

    def __init__(self, entries: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]) -> None:
        self.entries = entries
        self.known: dict[Any, Any] = {}

    def seal(self, metadata: Mapping[str, str], crcs: Mapping[str, int]) -> str:
        """What `seal` gives for entries of this form."""
        heads = self.known.get("heads")
        if heads is None:
            heads = self.known["heads"] = [
                (name, f'[{json.dumps(name)}, "{dtype}", {list(shape)}, ')
                for name, (dtype, shape) in sorted(self.entries.items(), key=itemgetter(0))
            ]
        listed = ", ".join([f"{head}{crcs[name]}]" for name, head in heads])
        return _seal_of(f"[{_encode(_without_seal(metadata))}, [{listed}]]")


class Header(NamedTuple):
    """The header of a shard."""

    metadata: Mapping[str, str]  # the unit, its rows, the store that it belongs to, and the seal
    extents: Mapping[str, Extent]  # by entry name
    form: Form | None = None  # of the entries, where it is known already
    crcs: Mapping[str, int] | None = None  # of the entries, where they are known already

    def check_seal(self) -> None:
        """Raise a ValueError if something in the header was changed, so that the seal is not its checksum."""
        crcs = self.crcs or {name: extent.crc32 for name, extent in self.extents.items()}
        if self.metadata.get(SEAL) != (self.form or form_of(self.extents)).seal(self.metadata, crcs):
            raise ValueError("a header that does not match its seal")


def form_of(extents: Mapping[str, Extent]) -> Form:
    """The form of entries."""
    return Form({name: (extent.dtype, extent.shape) for name, extent in extents.items()})


def seal(metadata: Mapping[str, str], entries: Iterable[tuple[str, torch.dtype, Sequence[int], int]]) -> str:
    """A checksum over all that a header holds but the seal itself, in hexadecimal; the same for every format."""
    listed = sorted((name, str(dtype), list(shape), crc) for name, dtype, shape, crc in entries)
    return _seal_of(_encode([_without_seal(metadata), listed]))


def _without_seal(metadata: Mapping[str, str]) -> dict[str, str]:
    return {key: value for key, value in metadata.items() if key != SEAL}


def _seal_of(text: str) -> str:
    return f"{zlib.crc32(text.encode()):08x}"


def sealed(metadata: Mapping[str, str], entries: Entries, crcs: Mapping[str, int]) -> dict[str, str]:
    """The metadata of a shard, with the seal over it and over the entries and their checksums."""
    listed = ((name, chunks[0].dtype, shape_of(chunks), crcs[name]) for name, chunks in entries.items())
    return {**metadata, SEAL: seal(metadata, listed)}


def bytes_of(tensor: Tensor) -> memoryview:
    """The bytes of a tensor's values in row-major order: its own memory where it is a contiguous one on the CPU."""
    host = ordinary(tensor.detach()).cpu().contiguous()
    flat = host.as_strided((host.numel(),), (1,))  # an axis of one element may have any stride, which `view` refuses
    return memoryview(flat.view(torch.uint8).numpy())  # type: ignore[arg-type]


def crc32_of(chunks: Iterable[Tensor], start: int = 0) -> int:
    """The CRC-32 (of zlib) of the bytes of chunks, one after another, continued from `start`."""
    for chunk in chunks:
        start = zlib.crc32(bytes_of(chunk), start)
    return start


def shape_of(chunks: Sequence[Tensor]) -> list[int]:
    """The shape of chunks along axis 0 as one tensor."""
    return [sum(chunk.shape[0] for chunk in chunks), *chunks[0].shape[1:]] if chunks[0].dim() else []


def check_shape(shape: Any) -> tuple[int, ...]:
    """The shape in a file's header, as a tuple; raises a ValueError where it is not a list of sizes."""
    if not isinstance(shape, list | tuple) or not all(type(size) is int and 0 <= size < 2**63 for size in shape):
        raise ValueError("a shape that is not a list of sizes")
    return tuple(shape)


def unique(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """A dict of the members of a JSON object, none of which may come twice."""
    members: dict[str, Any] = {}
    for name, value in pairs:
        if name in members:
            raise ValueError(f"the name {name!r} twice")
        members[name] = value
    return members


def check_apart(spans: Iterable[tuple[int, int]], stop: int) -> None:
    """Raise a ValueError where two spans of bytes overlap, and a TruncatedError where one ends after `stop`."""
    end = 0
    for first, last in sorted(spans):
        if first < end or last < first:
            raise ValueError("entries whose bytes overlap")
        if last > stop:
            raise TruncatedError(f"a file that ends at byte {stop} of {last}")
        end = last
