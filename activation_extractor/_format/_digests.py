"""Digests of tensors, computed where they live."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch
from torch import Tensor

_ROW_WORDS = 1 << 16
_ROWS_AT_ONCE = 8  # their products are 4 MiB, which a cache may hold
_SAMPLE_BYTES = 1 << 20


def tensor_sum(tensor: Tensor) -> Tensor:
    """A 64-bit sum that changes with any bit of a tensor's values, and with their order.

    Each 32-bit word is multiplied by a random odd number for its place in a row of words, and the products are summed
    modulo 2**64 (multilinear hashing); the rows' sums are summed in the same way. The sum does not depend on the order
    in which a device adds. ``torch.hash_tensor`` would not do: it gives a reversed tensor the same hash, and older
    releases of torch lack it.
    """
    parts = parts_of(tensor)
    if len(parts) != 1:
        return tensor_sum(torch.stack([tensor_sum(part) for part in parts]))
    data = bytes_where_they_are(parts[0])
    whole = len(data) // 4 * 4
    words, rest = data[:whole].view(torch.int32), data[whole:].to(torch.int32)
    while len(words) > _ROW_WORDS:
        whole = len(words) // _ROW_WORDS * _ROW_WORDS
        rows = words[:whole].view(-1, _ROW_WORDS)
        sums = [_row_sums(part) for part in torch.split(rows, _ROWS_AT_ONCE)]
        words = torch.cat([*sums, _row_sums(words[whole:])[None]]).view(torch.int32)
    return _row_sums(torch.cat([words, rest]))


def _row_sums(words: Tensor) -> Tensor:
    return (words * _multipliers(words.device)[: words.shape[-1]]).sum(-1)


@functools.lru_cache
def _multipliers(device: torch.device) -> Tensor:
    return torch.from_numpy(multipliers().view(np.int64)).to(device)


@functools.lru_cache
def multipliers() -> np.ndarray[Any, np.dtype[np.uint64]]:
    """Odd 64-bit numbers without a pattern (SplitMix64), ``(65539,)``, the same in every version."""
    mask = 2**64 - 1
    numbers = []
    for place in range(_ROW_WORDS + 3):  # up to three bytes are no word
        mixed = (place + 1) * 0x9E3779B97F4A7C15 & mask
        mixed = (mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9 & mask
        mixed = (mixed ^ (mixed >> 27)) * 0x94D049BB133111EB & mask
        numbers.append((mixed ^ (mixed >> 31)) | 1)
    return np.array(numbers, dtype=np.uint64)


def parts_of(tensor: Tensor) -> list[Tensor]:
    """The plain tensors that a tensor is made of: itself; or what a subclass wraps, packed weights and scales, say."""
    if hasattr(tensor, "to_local"):  # a shard of a distributed tensor
        return parts_of(tensor.to_local())
    if hasattr(tensor, "__tensor_flatten__"):
        names, _ = tensor.__tensor_flatten__()
        return [part for name in names for part in parts_of(getattr(tensor, name))]
    return list(tensor.unbind()) if tensor.is_nested else [tensor]


def bytes_where_they_are(tensor: Tensor) -> Tensor:
    """The bytes of a plain tensor's values where they live, in row-major order, from a multiple of 8 bytes on."""
    tensor = tensor.detach()
    if tensor.is_quantized:
        tensor = tensor.dequantize()
    if tensor.layout is not torch.strided:
        tensor = tensor.to_dense()
    dense = tensor.resolve_conj().resolve_neg().contiguous()
    data = dense.as_strided((dense.numel(),), (1,)).view(torch.uint8)
    return data.clone() if data.storage_offset() % 8 else data


def sampled(data: Any) -> Any:
    """The bytes of a tensor or array; of more than 1 MiB, 8-byte words at equal distances and what follows the last."""
    if len(data) <= _SAMPLE_BYTES:
        return data
    step, whole = len(data) // _SAMPLE_BYTES, len(data) // 8 * 8
    words = data[:whole].reshape(-1, 8)[::step].reshape(-1)
    return torch.cat([words, data[whole:]]) if isinstance(data, Tensor) else np.concatenate([words, data[whole:]])
