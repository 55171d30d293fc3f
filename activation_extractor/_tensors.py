"""Making tensors ordinary; their memory; numpy."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from activation_extractor._private_torch import coo_parts, inference_guard
from activation_extractor.errors import ActivationError, ArgumentError, TensorKindError

_INTEGERS = (torch.int8, torch.int16, torch.int32, torch.int64)
_UNSIGNED = (torch.uint8, torch.uint16, torch.uint32, torch.uint64)
_FLOATS = (torch.float16, torch.float32, torch.float64, torch.complex64, torch.complex128)
IN_FILE = "in a file"
_OF_NUMPY = frozenset((torch.bool, *_INTEGERS, *_UNSIGNED, *_FLOATS))
# What compressed sparse tensors are made of, as methods.
_BY_ROW, _BY_COLUMN = ("crow_indices", "col_indices", "values"), ("ccol_indices", "row_indices", "values")
_COMPRESSED = {
    **dict.fromkeys((torch.sparse_csr, torch.sparse_bsr), _BY_ROW),
    **dict.fromkeys((torch.sparse_csc, torch.sparse_bsc), _BY_COLUMN),
}


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
        if type(tensor) is not Tensor or is_special(tensor):
            return tensor.clone()
        plain = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
        plain.set_(tensor)  # type: ignore[call-overload] # as its documentation has it
        return plain


def memory_of(tensor: Tensor) -> dict[int, int]:
    """The size in bytes of each piece of memory that keeping this tensor keeps alive, by an identity."""
    parts = parts_of(tensor)
    if parts is not None:
        return {address: nbytes for part in parts for address, nbytes in memory_of(part).items()}
    try:
        storage = tensor.untyped_storage()
        address, nbytes = storage.data_ptr(), storage.nbytes()
    except RuntimeError:  # it has none that can be asked for; NotImplementedError is one
        address, nbytes = 0, 0
    return {address: nbytes} if address else {id(tensor): tensor.numel() * tensor.element_size()}


def kept_bytes(tensors: Iterable[Tensor]) -> int:
    """How many bytes of memory these tensors keep alive; memory that several share counts once."""
    kept: dict[int, int] = {}
    for tensor in tensors:
        kept |= memory_of(tensor)
    return sum(kept.values())


def copied_bytes(tensor: Tensor) -> int:
    """How many bytes a copy of the tensor takes."""
    parts = parts_of(tensor)
    return tensor.numel() * tensor.element_size() if parts is None else sum(map(copied_bytes, parts))


def parts_of(tensor: Tensor) -> list[Tensor] | None:
    """The tensors that a sparse tensor or a wrapper is made of; None for one that has memory of its own."""
    if tensor.layout is torch.sparse_coo:
        return list(coo_parts(tensor))
    if tensor.layout in _COMPRESSED:
        return [getattr(tensor, name)() for name in _COMPRESSED[tensor.layout]]
    if _wraps(tensor) and hasattr(tensor, "__tensor_flatten__"):
        parts = (getattr(tensor, name) for name in tensor.__tensor_flatten__()[0])
        return [part for part in parts if isinstance(part, Tensor)]
    return None


def _wraps(tensor: Tensor) -> bool:
    """Whether its class says itself what torch's operations do: it may hold its numbers anywhere."""
    return type(tensor).__torch_dispatch__ is not Tensor.__torch_dispatch__


def is_special(tensor: Tensor) -> bool:
    """Whether it is nested, sparse or quantized: torch's operations lack, or round, such tensors."""
    return tensor.is_nested or tensor.layout is not torch.strided or tensor.is_quantized


def as_dense(tensor: Tensor) -> Tensor:
    """A sparse or mkldnn tensor in full, a quantized one as the float32 that it stands for, any other as it is."""
    if tensor.is_nested:
        return tensor
    dense = tensor if tensor.layout is torch.strided else tensor.to_dense()
    return dense.dequantize() if dense.is_quantized else dense


def rows_of(tensor: Tensor, layer: str | None = None) -> list[Tensor]:
    """The rows of a nested tensor, ``(positions, *features)`` each: views.

    Raises:
        TensorKindError: there are none, or they differ in more than their number of positions.
    """
    rows = list(tensor.unbind())
    if not rows:
        raise TensorKindError("a nested tensor without rows", "Leave empty batches out.", layer)
    if any(not row.dim() or row.shape[1:] != rows[0].shape[1:] for row in rows):
        kind = f"a nested tensor with rows of shapes {', '.join(str(tuple(row.shape)) for row in rows[:3])}"
        raise TensorKindError(kind, "Convert it in a reducer to rows that differ in their length alone.", layer)
    return rows


def sequence_shape(activation: Tensor) -> tuple[int, int]:
    """How many rows and positions ``(batch, seq, *features)`` has, of a nested one the positions of its longest row."""
    if activation.is_nested:
        return activation.size(0), max(map(len, activation.unbind()), default=0)
    return activation.shape[0], activation.shape[1]


def as_plain(tensor: Tensor, layer: str | None = None, place: str = "here") -> Tensor:
    """The tensor, dense, of torch's own class and usable by autograd, with the same numbers where that is possible.

    Raises:
        TensorKindError: it is nested, distributed or another wrapper of tensors, or has no numbers.
    """
    tensor = whole_here(tensor)
    if (kind := kind_of(tensor)) is not None:
        raise TensorKindError(*kind, layer, place)
    plain = as_dense(ordinary(tensor.detach()))
    return plain if type(plain) is Tensor else plain.as_subclass(Tensor)


def whole_here(tensor: Any) -> Tensor:
    """The plain tensor in a DTensor of which each process holds the whole; any other tensor as it is."""
    if type(tensor) is not Tensor and hasattr(tensor, "device_mesh"):
        axes = enumerate(tensor.placements)
        if all(placement.is_replicate() or tensor.device_mesh.size(axis) == 1 for axis, placement in axes):
            tensor = tensor.to_local()
    whole: Tensor = tensor
    return whole


def kind_of(tensor: Tensor) -> tuple[str, str] | None:
    """What a tensor is that has no plain numbers, and what makes some of it; None for one that has them."""
    advice = "Convert it in a reducer: reduce=lambda activation, mask: activation.{}."
    if tensor.is_nested:
        return "a nested tensor", advice.format("to_padded_tensor(0)")
    if tensor.is_meta:
        return "a tensor on the device 'meta', which has no numbers", "Run the model on a device that holds numbers."
    if not _wraps(tensor):
        return None
    if hasattr(tensor, "full_tensor"):
        return "a DTensor, of which a process holds a part", "Capture it with sharded='gather' in each process."
    kind = f"a {type(tensor).__name__}, a class that wraps other tensors"
    return kind, "Convert it in a reducer to a tensor of torch's own class."


def refused_kind(error: Exception, tensor: Tensor) -> tuple[str, str] | None:
    """What `kind_of` gives, where an error is torch's over a tensor of a kind that few of its operations know."""
    is_of_torch = isinstance(error, RuntimeError) or "dispatch failed" in str(error)
    return kind_of(tensor) if is_of_torch and not isinstance(error, ActivationError) else None


def moved(tensor: Tensor, device: torch.device, layer: str, *, copy: bool = False) -> Tensor:
    """The tensor on a device; TensorKindError where one of its kind cannot be moved."""
    try:
        return tensor.to(device, copy=copy)
    except NotImplementedError as error:
        dense = f"a tensor of layout {tensor.layout}", "Leave to= out."
        raise TensorKindError(*(kind_of(tensor) or dense), layer, f"to be moved to {str(device)!r}") from error


def to_numpy(tensor: Tensor, layer: str | None = None) -> np.ndarray[Any, Any]:
    """The tensor as an array on the CPU, in the dtype of `as_numpy_has`.

    A view of the same memory where that is possible: a CPU tensor of a dtype that numpy has.
    """
    array: np.ndarray[Any, Any] = as_numpy_has(tensor, layer, "in an array").cpu().numpy()
    return array


def as_numpy_has(tensor: Tensor, layer: str | None = None, place: str = "here") -> Tensor:
    """The tensor, dense, in a dtype that numpy has: complex32 as complex64, bfloat16, float8, quantized as float32.

    Raises:
        ArgumentError: its dtype has no such counterpart.
        TensorKindError: see `as_plain`.
    """
    plain = as_plain(tensor, layer, place)
    if plain.dtype == torch.complex32:
        return plain.to(torch.complex64)
    try:
        return plain if numpy_has(plain.dtype) else plain.float()
    except (NotImplementedError, RuntimeError) as error:
        condition, advice = "be one that numpy has or that becomes float32", "Convert it in a reducer."
        raise ArgumentError("a tensor's dtype", condition, tensor.dtype, advice) from error


def numpy_has(dtype: torch.dtype) -> bool:
    """Whether numpy has this dtype."""
    return dtype in _OF_NUMPY
