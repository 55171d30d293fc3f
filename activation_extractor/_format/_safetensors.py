"""The safetensors format, written as a stream and read by its header.

A file (https://github.com/huggingface/safetensors#format) is eight bytes of header length, little endian; a JSON header
of dtype, shape and byte range for each tensor; then the bytes. It is written header first and then each chunk's own
memory, so that nothing is concatenated or copied on the way.
"""

from __future__ import annotations

import functools
import json
import math
import os
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from activation_extractor._display import dtype_name
from activation_extractor._files import TruncatedError, open_regular, read_at, replacing, sync
from activation_extractor._format._checksum_threads import beside
from activation_extractor._format._headers import (
    SEAL,
    Entries,
    Extent,
    Form,
    Header,
    bytes_of,
    check_shape,
    crc32_of,
    sealed,
    shape_of,
    unique,
)
from activation_extractor._storage import RemoteFile, RemotePath, beginning
from activation_extractor.errors import ArgumentError

_ALIGNMENT = 64
_FIRST_BYTES = 4096
_LONGEST_HEADER = 100_000_000  # as in the reference reader
_METADATA = "__metadata__"
_CRC32 = "crc32:"  # in front of an entry's name, in the metadata
_HEAD = f'{{"{_METADATA}":{{'
_DECODER = json.JSONDecoder(object_pairs_hook=unique)
_DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e4m3fnuz: "F8_E4M3FNUZ",
    torch.float8_e5m2: "F8_E5M2",
    torch.float8_e5m2fnuz: "F8_E5M2FNUZ",
    torch.complex64: "C64",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.uint16: "U16",
    torch.uint32: "U32",
    torch.uint64: "U64",
    torch.bool: "BOOL",
}
STORED_DTYPES = tuple(_DTYPE_NAMES)
_DTYPES = {name: dtype for dtype, name in _DTYPE_NAMES.items()}


def write_safetensors(
    path: Path, tensors: Mapping[str, Tensor | Sequence[Tensor]], metadata: Mapping[str, str] | None = None
) -> None:
    """Write a safetensors file that appears whole or not at all, in place of one that is there.

    `tensors` holds, by entry name, a tensor or its chunks along axis 0, on any device.

    Raises:
        ArgumentError: a dtype that the format does not have.
        StoreError: the file cannot be written.
    """
    with replacing(path) as file:
        stream_safetensors(file, tensors, metadata)


def stream_safetensors(
    file: BinaryIO, tensors: Mapping[str, Tensor | Sequence[Tensor]], metadata: Mapping[str, str] | None = None
) -> None:
    """Write the bytes of a safetensors file; the arguments are those of `write_safetensors`."""
    entries = {name: [value] if isinstance(value, Tensor) else list(value) for name, value in tensors.items()}
    header, chunks = arranged(entries, metadata)
    file.write(header)
    for chunk in chunks:
        file.write(bytes_of(chunk))


def write_safetensors_shard(path: Path, entries: Entries, metadata: Mapping[str, str]) -> str:
    """Write a shard at a free path, with a checksum for each entry in its metadata; returns its seal.

    The checksums are taken on another thread while the values are written, and filled in at the end.
    """
    none = dict.fromkeys(entries, 0)
    with open(path, "xb") as file:
        take_crcs = beside(lambda: {name: crc32_of(chunks) for name, chunks in entries.items()}, entries)
        try:
            stream_safetensors(file, entries, _with_crc32(sealed(metadata, entries, none), none))
        finally:  # the other thread reads the values, which the caller may write to
            crcs = take_crcs()
        metadata = sealed(metadata, entries, crcs)
        header, _ = arranged(entries, _with_crc32(metadata, crcs))
        file.seek(0)
        file.write(header)  # as long as before: a checksum always has eight digits
        sync(file)
    return metadata[SEAL]


def shard_in_chunks(entries: Entries, metadata: Mapping[str, str]) -> tuple[str, list[Any]]:
    """The seal of a shard, and the buffers of its bytes, which are those that `write_safetensors_shard` writes."""
    crcs = {name: crc32_of(chunks) for name, chunks in entries.items()}
    metadata = sealed(metadata, entries, crcs)
    header, chunks = arranged(entries, _with_crc32(metadata, crcs))
    return metadata[SEAL], [header, *map(bytes_of, chunks)]


def _with_crc32(metadata: Mapping[str, str], crcs: Mapping[str, int]) -> dict[str, str]:
    return {**metadata, **{_CRC32 + name: f"{crc:08x}" for name, crc in crcs.items()}}


def arranged(entries: Entries, metadata: Mapping[str, str] | None) -> tuple[bytes, list[Tensor]]:
    """The header of a file, and the chunks in the order in which they follow it."""
    header: dict[str, object] = {_METADATA: dict(metadata)} if metadata else {}
    chunks: list[Tensor] = []
    offset = 0
    # Widest elements first, as the reference writer does, so that every tensor starts on a multiple of its element.
    for name, parts in sorted(entries.items(), key=lambda entry: (-entry[1][0].element_size(), entry[0])):
        size = sum(part.numel() * part.element_size() for part in parts)
        dtype = _DTYPE_NAMES[check_dtype(parts[0].dtype)]
        header[name] = {"dtype": dtype, "shape": shape_of(parts), "data_offsets": [offset, offset + size]}
        offset += size
        chunks += parts
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % _ALIGNMENT)
    return struct.pack("<Q", len(text)) + text, chunks


def read_safetensors_shard(path: Path, opened: int | tuple[bytes, int] | None = None) -> Header:
    """The header of a shard, each number of it checked against the file.

    The file may be open already, by a descriptor; or its header and its size may be known.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is damaged, or has another format.
    """
    if isinstance(opened, tuple):
        text, data_start, size = _text_in(*opened, lambda start, size: opened[0][start : start + size])
    else:
        text, data_start, size = _read_text(path) if opened is None else _text_of(opened)
    if text.startswith(_HEAD):  # as the library writes it; what follows is often the same in all shards of a store
        listed, end = _DECODER.raw_decode(text, len(_HEAD) - 1)
        layout = _layout(text[end:])
    else:
        header = json.loads(text, object_pairs_hook=unique)
        listed = header.pop(_METADATA)
        layout = _Layout(header)
    layout.check_size(size - data_start)
    crcs = {name: _crc32(listed.pop(_CRC32 + name)) for name in layout.form.entries}
    metadata = {key: value for key, value in listed.items() if not key.startswith(_CRC32)}
    return Header(metadata, _Extents(path, data_start, layout, crcs), layout.form, crcs)


def read_header(path: Path) -> tuple[Any, int, int]:
    """The JSON header of a file, the first byte of the tensors after it, and the file's size.

    Raises:
        OSError: the file cannot be read.
        ValueError: it does not begin with a header.
    """
    text, data_start, size = _read_text(path)
    return json.loads(text, object_pairs_hook=unique), data_start, size


def _read_text(path: Path) -> tuple[str, int, int]:
    if isinstance(path, RemotePath):
        head, size = beginning(path)
        return _text_in(head, size, RemoteFile(path).read)
    descriptor = open_regular(path)
    try:
        return _text_of(descriptor)
    finally:
        os.close(descriptor)


def _text_of(descriptor: int) -> tuple[str, int, int]:
    head = os.pread(descriptor, _FIRST_BYTES, 0)  # all of a small header, in one call
    size = os.fstat(descriptor).st_size if len(head) == _FIRST_BYTES else len(head)
    return _text_in(head, size, functools.partial(read_at, descriptor))


def _text_in(head: bytes, size: int, read: Callable[[int, int], bytes]) -> tuple[str, int, int]:
    """The text of a header, from the first bytes of a file and what reads others; and what `read_header` returns."""
    (length,) = struct.unpack("<Q", head[:8] if size >= 8 else read(0, 8))
    if length > _LONGEST_HEADER:
        raise ValueError(f"a header of {length} bytes")
    data = head[8 : 8 + length] if 8 + length <= len(head) else read(8, length)
    return data.decode(), 8 + length, size


def check_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype itself; refuses one that safetensors does not have."""
    if dtype not in _DTYPE_NAMES:
        known = ", ".join(dtype_name(known) for known in _DTYPE_NAMES)
        advice = "Convert it in a reducer, or use NpySink or NpzSink if numpy has it."
        raise ArgumentError("the dtype of a tensor in a safetensors file", f"be one of {known}", dtype, advice)
    return dtype


class _Layout:
    """The entries in a header: what they are, and which bytes after it they take, without a gap from the first on."""

    def __init__(self, listed: Mapping[str, Any]) -> None:
        entries, self.starts, end = {}, {}, 0
        for name, entry in sorted(listed.items(), key=lambda item: _range(item[1])):
            first, last = _range(entry)
            if first != end or last < first:
                raise ValueError("entries whose bytes overlap or leave a gap")
            dtype, shape = _DTYPES[entry["dtype"]], check_shape(entry["shape"])
            if dtype.itemsize * math.prod(shape) != last - first:
                raise ValueError("a shape that does not fit its bytes")
            entries[name], self.starts[name], end = (dtype, shape), first, last
        self.form, self._size = Form({name: entries[name] for name in listed}), end

    def check_size(self, size: int) -> None:
        """Raise a ValueError where the file holds more or fewer bytes after its header."""
        if self._size > size:
            raise TruncatedError(f"a file that ends {self._size - size} bytes too early")
        if self._size < size:
            raise ValueError(f"{size - self._size} bytes after its last entry")


@functools.lru_cache(32)
def _layout(text: str) -> _Layout:
    """The layout in the JSON that follows the metadata."""
    listed = json.loads("{" + text[1:] if text.startswith(",") else "{" + text, object_pairs_hook=unique)
    if _METADATA in listed:
        raise ValueError(f"the name {_METADATA!r} twice")
    return _Layout(listed)


class _Extents(Mapping[str, Extent]):
    """The extents of a shard, each made when it is asked for."""

    def __init__(self, path: Path, data_start: int, layout: _Layout, crcs: Mapping[str, int]) -> None:
        self._path, self._data_start, self._layout, self._crcs = path, data_start, layout, crcs

    def __getitem__(self, name: str) -> Extent:
        dtype, shape = self._layout.form.entries[name]
        start = self._data_start + self._layout.starts[name]
        return Extent(self._path, start, dtype, shape, self._crcs[name], start)

    def __contains__(self, name: object) -> bool:
        return name in self._layout.form.entries

    def __iter__(self) -> Iterator[str]:
        return iter(self._layout.form.entries)

    def __len__(self) -> int:
        return len(self._layout.form.entries)


def _crc32(text: str) -> int:
    number = int(text, 16)
    if f"{number:08x}" != text:
        raise ValueError("a checksum that is not eight hexadecimal digits")
    return number


def _range(entry: Mapping[str, Any]) -> tuple[int, int]:
    first, last = entry["data_offsets"]
    if type(first) is not int or type(last) is not int:
        raise ValueError("offsets that are not integers")
    return first, last
