"""Making tensors ordinary; their memory; numpy."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from activation_extractor._private_torch import inference_guard
from activation_extractor.errors import ArgumentError

_INTEGERS = (torch.int8, torch.int16, torch.int32, torch.int64)
_UNSIGNED = (torch.uint8, torch.uint16, torch.uint32, torch.uint64)
_FLOATS = (torch.float16, torch.float32, torch.float64, torch.complex64, torch.complex128)
_OF_NUMPY = frozenset((torch.bool, *_INTEGERS, *_UNSIGNED, *_FLOATS))


def snapshot(tensor: Tensor) -> Tensor:
    """A copy of the tensor, outside any autograd graph, that owns its memory."""
    return tensor.detach().clone() if tensor.requires_grad else tensor.clone()


def ordinary(tensor: Tensor) -> Tensor:
    """The tensor, usable by autograd: one made under ``inference_mode`` comes back as a plain view of its memory.

    No data is copied for a plain strided tensor; the tensor given must not be used again. A pending conjugation or
    negation is carried out.
    """
    if tensor.is_conj() or tensor.is_neg():
        tensor = tensor.resolve_conj().resolve_neg()
    if not tensor.is_inference():
        return tensor
    with inference_guard(False):
        if type(tensor) is not Tensor or _is_special(tensor):
            return tensor.clone()
        plain = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
        return plain.set_(tensor.untyped_storage(), tensor.storage_offset(), tensor.size(), tensor.stride())


def _is_special(tensor: Tensor) -> bool:
    return tensor.is_nested or tensor.layout is not torch.strided or tensor.is_quantized


def storage_bytes(tensor: Tensor) -> tuple[int, int]:
    """The identity and size in bytes of the memory that keeping this tensor keeps alive."""
    if tensor.is_nested or tensor.layout is not torch.strided:
        return id(tensor), tensor.numel() * tensor.element_size()
    storage = tensor.untyped_storage()
    return storage.data_ptr(), storage.nbytes()


def to_numpy(tensor: Tensor) -> np.ndarray[Any, Any]:
    """The tensor as an array on the CPU, in the dtype of `as_numpy_has`.

    A view of the same memory where that is possible: a CPU tensor of a dtype that numpy has.
    """
    array: np.ndarray[Any, Any] = as_numpy_has(tensor.detach().cpu()).numpy()
    return array


def as_numpy_has(tensor: Tensor) -> Tensor:
    """The tensor, dense, in a dtype that numpy has: complex32 as complex64, bfloat16, float8, quantized as float32.

    Raises:
        ArgumentError: its dtype has no such counterpart.
    """
    plain = ordinary(tensor.detach())
    if plain.layout is not torch.strided:
        plain = plain.to_dense()
    if plain.dtype == torch.complex32:
        return plain.to(torch.complex64)
    try:
        if numpy_has(plain.dtype):
            return plain
        return plain.dequantize() if plain.is_quantized else plain.float()
    except (NotImplementedError, RuntimeError) as error:
        condition, advice = "be one that numpy has or that becomes float32", "Convert it in a reducer."
        raise ArgumentError("a tensor's dtype", condition, tensor.dtype, advice) from error


def numpy_has(dtype: torch.dtype) -> bool:
    """Whether numpy has this dtype."""
    return dtype in _OF_NUMPY
