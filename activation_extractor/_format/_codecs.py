"""Codecs: the formats that a shard can have."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from activation_extractor._format._headers import Entries, Header
from activation_extractor._format._numpy import (
    read_npy_shard,
    read_npz_shard,
    write_npy_shard,
    write_npz_shard,
)
from activation_extractor._format._safetensors import check_dtype, read_safetensors_shard, write_safetensors_shard
from activation_extractor._tensors import IN_FILE, as_numpy_has, as_plain


@dataclass(frozen=True)
class Codec:
    """A format of shards."""

    name: str  # in a manifest
    suffix: str  # of a shard's name
    # To a plain tensor of a dtype that the format has, on the same device, else an ArgumentError or a TensorKindError
    # that names the layer.
    convert: Callable[..., Tensor]
    write: Callable[[Path, Entries, Mapping[str, str]], str]  # a shard at a free path, synced; returns its seal
    read: Callable[[Path], Header]


def _as_safetensors_has(tensor: Tensor, layer: str | None = None, place: str = IN_FILE) -> Tensor:
    plain = as_plain(tensor, layer, place)
    check_dtype(plain.dtype)
    return plain


SAFETENSORS = Codec("safetensors", ".safetensors", _as_safetensors_has, write_safetensors_shard, read_safetensors_shard)
NPZ = Codec("npz", ".npz", as_numpy_has, write_npz_shard, read_npz_shard)
NPY = Codec("npy", ".npy", as_numpy_has, write_npy_shard, read_npy_shard)
CODECS = {codec.name: codec for codec in (SAFETENSORS, NPZ, NPY)}
