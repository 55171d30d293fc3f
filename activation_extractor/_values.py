"""Tensors in what a layer takes and returns: finding them, copying them, making them ordinary."""

from __future__ import annotations

import copy
import dataclasses
from collections import UserDict
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from activation_extractor._private_torch import inference_guard


def main_tensor(value: Any) -> Tensor | None:
    """The first tensor of a structure (tuple, list, mapping, dataclass, nested), or None when it holds none."""
    return next(_tensors(value), None)


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for member in value.values():
            yield from _tensors(member)
    elif isinstance(value, tuple | list):
        for member in value:
            yield from _tensors(member)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            yield from _tensors(getattr(value, field.name))


def select_part(value: Any, select: int | str | Callable[[Any], Any]) -> Any:
    """The part of a structured value that a user's ``select=`` means; None when there is no such part."""
    if callable(select):
        return select(value)
    if isinstance(value, Mapping):
        members = list(value.values())
        if isinstance(select, int) and select not in value:
            return members[select] if -len(members) <= select < len(members) else None
        return value.get(select)
    if isinstance(select, str):
        return getattr(value, select, None)
    if isinstance(value, tuple | list):
        return value[select] if -len(value) <= select < len(value) else None
    return None


def snapshot(tensor: Tensor) -> Tensor:
    """A copy of the tensor, outside any autograd graph, that owns its memory."""
    return tensor.detach().clone() if tensor.requires_grad else tensor.clone()


def copied(value: Any) -> Any:
    """The same structure with each tensor copied; members that are no tensors are shared."""
    if isinstance(value, Tensor):
        return ordinary(snapshot(value))
    if isinstance(value, Mapping):
        # Only of these is it known that a shallow copy shares no members with the layer's own value.
        twin: Any = copy.copy(value) if isinstance(value, dict | UserDict) else {}
        for key, member in value.items():
            twin[key] = copied(member)
        return twin
    if isinstance(value, tuple | list):
        members = [copied(member) for member in value]
        return type(value)(*members) if hasattr(value, "_fields") else type(value)(members)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        twin = copy.copy(value)
        for field in dataclasses.fields(value):
            object.__setattr__(twin, field.name, copied(getattr(value, field.name)))
        return twin
    return value


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
