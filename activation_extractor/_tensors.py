"""Making tensors ordinary; their memory; numpy."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from activation_extractor._private_torch import inference_guard


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
    """The tensor as an array on the CPU; bfloat16 and float8, which numpy lacks, become float32.

    A view of the same memory where that is possible: a CPU tensor of a dtype that numpy has.
    """
    tensor = ordinary(tensor.detach()).cpu()
    if tensor.layout is not torch.strided:
        tensor = tensor.to_dense()
    if tensor.dtype == torch.complex32:
        tensor = tensor.to(torch.complex64)
    if not numpy_has(tensor.dtype):
        tensor = tensor.float()
    array: np.ndarray[Any, Any] = tensor.numpy()
    return array


def numpy_has(dtype: torch.dtype) -> bool:
    """Whether numpy has this dtype."""
    return not dtype.is_floating_point or dtype in (torch.float16, torch.float32, torch.float64)
