"""numpy's formats: npz files, and folders of npy files. Read by their headers, so that slices need no copy of the rest.

An npz file is a zip archive of npy files, here uncompressed. The metadata of a shard stands in the archive's comment,
or in ``about.json`` of the folder. Nothing is ever pickled or unpickled.
"""

from __future__ import annotations

import io
import json
import os
import re
import struct
import threading
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.lib import format as npy
from torch import Tensor

from activation_extractor._files import TruncatedError, open_regular, read_at, read_whole, replacing, sync, sync_folder
from activation_extractor._format._headers import (
    SEAL,
    Entries,
    Extent,
    Header,
    bytes_of,
    check_apart,
    check_shape,
    sealed,
    shape_of,
    unique,
)
from activation_extractor._tensors import as_numpy_has

METADATA_FILE = "about.json"
_SUFFIX = ".npy"
_LOCAL_HEADER = struct.Struct("<4s22xHH")
_LONGEST_HEADER = 1 << 16
_ALIGNMENT = 64
_PADDING_ID = 0xD935  # registered for this purpose by Android's zipalign
_ZIP64_BYTES = 20  # the extra field that zipfile adds for sizes over 4 GiB
_IS_UTF8 = 0x800
_PARSING = threading.Lock()  # Python 3.11 may fail where two threads parse literals at once
_NO_DATE = (1980, 1, 1, 0, 0, 0)  # the same run gives the same bytes


def write_npz(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write an uncompressed npz file that appears whole or not at all; bfloat16 and float8 become float32."""
    with replacing(path) as file, zipfile.ZipFile(file, "w", allowZip64=True) as archive:
        _fill(archive, {name: [as_numpy_has(tensor).cpu()] for name, tensor in tensors.items()})


def write_npz_shard(path: Path, entries: Entries, metadata: Mapping[str, str]) -> str:
    """Write a shard as an npz file at a free path; returns its seal."""
    with open(path, "xb") as file:
        with zipfile.ZipFile(file, "w", allowZip64=True) as archive:
            crcs = _fill(archive, entries)
            metadata = sealed(metadata, entries, crcs)
            archive.comment = json.dumps(metadata).encode()
        sync(file)
    return metadata[SEAL]


def read_npz_shard(path: Path) -> Header:
    """The header of an npz shard; see `activation_extractor._format._safetensors.read_safetensors_shard`."""
    descriptor = open_regular(path)
    with open(descriptor, "rb") as file, zipfile.ZipFile(file) as archive:
        end = struct.pack("<H", len(archive.comment)) + archive.comment
        if read_at(descriptor, os.fstat(descriptor).st_size - len(end), len(end)) != end:
            raise ValueError("bytes after its end")
        metadata = json.loads(archive.comment, object_pairs_hook=unique)
        members = {member.filename.removesuffix(_SUFFIX): member for member in archive.infolist()}
        if len(members) < len(archive.infolist()):
            raise ValueError("an entry twice")
        starts = {name: _member_start(descriptor, member) for name, member in members.items()}
        check_apart(((start, start + members[name].file_size) for name, start in starts.items()), archive.start_dir)
        extents = {
            name: _extent(path, descriptor, starts[name], member.file_size, member.CRC)
            for name, member in members.items()
        }
    return Header(metadata, extents)


def write_npy_shard(folder: Path, entries: Entries, metadata: Mapping[str, str]) -> str:
    """Write a shard as a new folder of npy files, ``about.json`` beside them; returns its seal."""
    folder.mkdir()
    crcs = {}
    for number, (name, chunks) in enumerate(entries.items()):
        with open(folder / npy_file(number, name), "xb") as file:
            crcs[name] = _write_array(file.write, chunks)
            sync(file)
    metadata = sealed(metadata, entries, crcs)
    with open(folder / METADATA_FILE, "xb") as file:
        file.write(json.dumps({"about": metadata, "crc32": crcs}).encode())
        sync(file)
    sync_folder(folder)
    return metadata[SEAL]


def read_npy_shard(folder: Path) -> Header:
    """The header of a folder of npy files; see `activation_extractor._format._safetensors.read_safetensors_shard`."""
    if folder.is_symlink():
        raise ValueError("a link")
    content = json.loads(read_whole(folder / METADATA_FILE), object_pairs_hook=unique)
    extents = {}
    for number, (name, crc) in enumerate(content["crc32"].items()):
        path = folder / npy_file(number, name)  # never a path out of the file
        descriptor = open_regular(path)
        try:
            extents[name] = _extent(path, descriptor, 0, os.fstat(descriptor).st_size, crc)
        finally:
            os.close(descriptor)
    return Header(content["about"], extents)


def npy_file(number: int, entry: str) -> str:
    """The name of an entry's file: its number, and up to 100 letters of its name, those that every disk allows."""
    readable = re.sub(r"[^A-Za-z0-9._+()-]", "_", entry)
    return f"{number:04d}-{readable[:100]}{_SUFFIX}"


def _fill(archive: zipfile.ZipFile, entries: Entries) -> dict[str, int]:
    """Write each entry as a member; returns the members' checksums."""
    # Not np.savez, which takes no entry that is called as one of its own arguments.
    for name, chunks in entries.items():
        member = zipfile.ZipInfo(name + _SUFFIX, _NO_DATE)
        header_bytes = _LOCAL_HEADER.size + len(member.filename.encode()) + _ZIP64_BYTES
        # An extra field that moves the array to a multiple of 64 bytes, so that it can be mapped.
        padding = -(archive.start_dir + header_bytes + 4) % _ALIGNMENT  # start_dir is where the archive ends so far
        member.extra = struct.pack("<HH", _PADDING_ID, padding) + bytes(padding)
        with archive.open(member, "w", force_zip64=True) as file:
            _write_array(file.write, chunks)
    return {member.filename.removesuffix(_SUFFIX): member.CRC for member in archive.infolist()}


def _write_array(write: Callable[[Any], Any], chunks: Sequence[Tensor]) -> int:
    """Write chunks along axis 0 as one npy array; returns the CRC-32 of all bytes."""
    header = io.BytesIO()
    dtype = chunks[0][:0].numpy().dtype if chunks[0].dim() else chunks[0].numpy().dtype
    description = {"descr": npy.dtype_to_descr(dtype), "fortran_order": False, "shape": tuple(shape_of(chunks))}
    npy.write_array_header_1_0(header, description)
    crc = 0
    for data in chain([header.getbuffer()], map(bytes_of, chunks)):
        write(data)
        crc = zlib.crc32(data, crc)
    return crc


def _member_start(descriptor: int, member: zipfile.ZipInfo) -> int:
    """The first byte of an archive's member, which must be stored as it is."""
    if member.compress_type != zipfile.ZIP_STORED or member.flag_bits & 1 or member.file_size != member.compress_size:
        raise ValueError("a compressed or encrypted entry")
    header = read_at(descriptor, member.header_offset, _LOCAL_HEADER.size)
    signature, name_length, extra_length = _LOCAL_HEADER.unpack(header)
    name = read_at(descriptor, member.header_offset + _LOCAL_HEADER.size, name_length)
    encoding = "utf-8" if member.flag_bits & _IS_UTF8 else "cp437"
    if signature != b"PK\3\4" or name != member.orig_filename.encode(encoding):
        raise ValueError("an entry that is not where the archive says")
    return int(member.header_offset) + _LOCAL_HEADER.size + int(name_length) + int(extra_length)


def _extent(path: Path, descriptor: int, first: int, size: int, crc: int) -> Extent:
    """The extent of an npy array that takes `size` bytes from byte `first` on."""
    head = io.BytesIO(read_at(descriptor, first, min(size, _LONGEST_HEADER)))
    if npy.read_magic(head) != (1, 0):
        raise ValueError("an npy file of another version")
    with _PARSING:
        shape, is_fortran, dtype = npy.read_array_header_1_0(head)
    if is_fortran or dtype.hasobject or not dtype.isnative:
        raise ValueError(f"an array of dtype {dtype}, or not in row-major order")
    start = first + head.tell()
    extent = Extent(path, start, torch.from_numpy(np.empty(0, dtype)).dtype, check_shape(shape), crc, first)
    if extent.stop > first + size:
        raise TruncatedError(f"a file that ends at byte {first + size} of {extent.stop}")
    if extent.stop < first + size:
        raise ValueError("bytes after the end of an array")
    return extent
