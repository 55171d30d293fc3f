"""Files: names that are safe on disk, whole-or-nothing publication, safetensors and npz.

The safetensors format (https://github.com/huggingface/safetensors#format) is eight bytes of header length, little
endian; a JSON header of dtype, shape and byte range for each tensor; then the bytes. Written here as a stream, header
first and then each chunk's own memory, so that nothing is concatenated or copied on the way.
"""

from __future__ import annotations

import json
import os
import struct
import uuid
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor

from activation_extractor._values import ordinary, to_numpy
from activation_extractor.errors import ArgumentError, StoreError

_ALIGNMENT = 64
_UNSAFE = "%:#/\\\0"
_DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
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


def escape(name: str) -> str:
    """A name that is safe on disk: `%`, `:`, `#`, path separators and NUL in percent form."""
    return "".join(f"%{ord(one):02X}" if one in _UNSAFE else one for one in name)


def unescape(name: str) -> str:
    """What `escape` was given."""
    head, *parts = name.split("%")
    return head + "".join(chr(int(part[:2], 16)) + part[2:] for part in parts)


def entry_name(layer: str, reducer: str | None = None) -> str:
    """The name of an entry in a file: ``layer`` or ``layer:reducer``, each escaped."""
    return escape(layer) if reducer is None else f"{escape(layer)}:{escape(reducer)}"


def write_safetensors(
    path: Path, tensors: Mapping[str, Tensor | Sequence[Tensor]], metadata: Mapping[str, str] | None = None
) -> None:
    """Write a safetensors file that appears whole or not at all, in place of one that is there.

    Args:
        path: the file.
        tensors: by entry name, a tensor or its chunks along axis 0, on any device.
        metadata: what goes into the header beside them.

    Raises:
        ArgumentError: a dtype that the format does not have.
        StoreError: the file cannot be written.
    """
    with replacing(path) as file:
        stream_safetensors(file, tensors, metadata)


def write_npz(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write an uncompressed npz file, likewise; bfloat16 and float8 become float32."""
    # Not np.savez, which takes no entry that is called as one of its own arguments.
    with replacing(path) as file, zipfile.ZipFile(file, "w", allowZip64=True) as archive:
        for name, tensor in tensors.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as entry:
                np.lib.format.write_array(entry, to_numpy(tensor), allow_pickle=False)


def stream_safetensors(
    file: BinaryIO, tensors: Mapping[str, Tensor | Sequence[Tensor]], metadata: Mapping[str, str] | None = None
) -> None:
    """Write the bytes of a safetensors file; what is given is as for `write_safetensors`."""
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    chunks: list[Tensor] = []
    offset = 0
    # Widest elements first, as the reference writer does, so that every tensor starts on a multiple of its element.
    entries = {name: [value] if isinstance(value, Tensor) else list(value) for name, value in tensors.items()}
    for name, parts in sorted(entries.items(), key=lambda entry: (-entry[1][0].element_size(), entry[0])):
        size = sum(part.numel() * part.element_size() for part in parts)
        shape = [sum(part.shape[0] for part in parts), *parts[0].shape[1:]] if parts[0].dim() else []
        header[name] = {"dtype": _dtype_name(parts[0]), "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
        chunks += parts
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % _ALIGNMENT)
    file.write(struct.pack("<Q", len(text)))
    file.write(text)
    for chunk in chunks:
        file.write(_bytes(chunk))


def make_folders(folder: Path) -> None:
    """Make a folder and those above it, with the process's umask; harmless when it is there.

    Raises:
        StoreError: it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        got = error.strerror or str(error)
        raise StoreError(folder, "be a folder that can be written to", got, "Choose another folder.") from error


def sync_folder(folder: Path) -> None:
    """Make what was just added to a folder survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def temporary(path: Path) -> Iterator[tuple[BinaryIO, Path]]:
    """A new file beside `path`, synced when the block ends and removed afterwards unless it was renamed.

    Raises:
        StoreError: it cannot be written.
    """
    draft = path.with_name(f".{uuid.uuid4().hex}.tmp")
    try:
        with open(draft, "xb") as file:
            yield file, draft
    except OSError as error:
        if isinstance(error, StoreError):
            raise
        advice = "Check the folder, its permissions and the room on the disk."
        raise StoreError(path, "be writable", error.strerror or str(error), advice) from error
    finally:
        with suppress(OSError):
            draft.unlink(missing_ok=True)


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    with temporary(path) as (file, draft):
        yield file
        file.flush()
        os.fsync(file.fileno())
        os.replace(draft, path)
        sync_folder(path.parent)


def _bytes(tensor: Tensor) -> memoryview:
    host = ordinary(tensor.detach()).cpu().contiguous()
    return memoryview(host.reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]


def _dtype_name(tensor: Tensor) -> str:
    check_dtype(tensor.dtype)
    return _DTYPE_NAMES[tensor.dtype]


def check_dtype(dtype: torch.dtype) -> None:
    """Refuse a dtype that safetensors does not have."""
    if dtype not in _DTYPE_NAMES:
        known = ", ".join(str(known).removeprefix("torch.") for known in _DTYPE_NAMES)
        raise ArgumentError("the dtype of a stored tensor", f"be one of {known}", dtype, "Convert it in a reducer.")
