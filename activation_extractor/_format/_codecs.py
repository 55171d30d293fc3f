"""Codecs: the formats that a shard can have."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from activation_extractor._display import dtype_name
from activation_extractor._format._headers import Entries, Header
from activation_extractor._format._numpy import (
    read_npy_shard,
    read_npz_shard,
    write_npy_shard,
    write_npz_shard,
)
from activation_extractor._format._safetensors import check_dtype, read_safetensors_shard, write_safetensors_shard
from activation_extractor._storage import RemotePath
from activation_extractor._tensors import IN_FILE, as_numpy_has, as_plain
from activation_extractor.errors import ArgumentError, ArgumentTypeError, StoreError

_STORED_AS = (torch.float16, torch.bfloat16, torch.float32)


@dataclass(frozen=True)
class Codec:
    """A format of shards."""

    name: str  # in a manifest
    suffix: str  # of a shard's name
    # To a plain tensor of a dtype that the format has, on the same device, else an ArgumentError or a TensorKindError
    # that names the layer.
    convert: Callable[..., Tensor]
    write: Callable[[Path, Entries, Mapping[str, str]], str]  # a shard at a free path, synced; returns its seal
    read: Callable[..., Header]  # of a path; and a descriptor, where a shard is one file that may be open already
    reads_open_files: bool = False
    # In which floating point numbers of activations are stored; None for as they were computed.
    dtype: torch.dtype | None = field(default=None, compare=False)

    def check_place(self, folder: Path) -> None:
        """Raise a StoreError where shards cannot be written: those that are not one stream of bytes to a bucket."""
        if isinstance(folder, RemotePath) and self != SAFETENSORS:
            got, advice = f"shards of {self.name}", "Write safetensors there, or write to a disk."
            raise StoreError(folder, "hold safetensors in a bucket", got, advice)

    def storing(self, dtype: torch.dtype | None) -> Codec:
        """The codec that stores floating point numbers of activations in a dtype.

        Raises:
            ArgumentTypeError: it is no dtype of torch.
            ArgumentError: it is none that activations are stored in, or one that the format lacks.
        """
        if dtype is None:
            return self
        condition = f"be one of {', '.join(map(str, _STORED_AS))}, or None for as computed"
        if not isinstance(dtype, torch.dtype):
            raise ArgumentTypeError("dtype", condition, dtype)
        if dtype not in _STORED_AS:
            raise ArgumentError("dtype", condition, dtype)
        if self.convert(torch.empty(0, dtype=dtype)).dtype != dtype:
            advice = "Store safetensors, or take float16 or float32."
            raise ArgumentError("dtype", f"be one that {self.name} has", dtype_name(dtype), advice)
        return replace(self, dtype=dtype)


def _as_safetensors_has(tensor: Tensor, layer: str | None = None, place: str = IN_FILE) -> Tensor:
    plain = as_plain(tensor, layer, place)
    check_dtype(plain.dtype)
    return plain


SAFETENSORS = Codec(
    "safetensors",
    ".safetensors",
    _as_safetensors_has,
    write_safetensors_shard,
    read_safetensors_shard,
    reads_open_files=True,
)
NPZ = Codec("npz", ".npz", as_numpy_has, write_npz_shard, read_npz_shard)
NPY = Codec("npy", ".npy", as_numpy_has, write_npy_shard, read_npy_shard)
CODECS = {codec.name: codec for codec in (SAFETENSORS, NPZ, NPY)}
