"""The kinds of tensors that a layer may return, and the numbers in them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, distributed, nn
from torch.utils._python_dispatch import return_and_correct_aliasing
from torch.utils._pytree import tree_map_only

LENGTHS = [3, 2]  # of the rows of a nested tensor


class Wrapped(Tensor):
    """A tensor that keeps its numbers in another one."""

    @staticmethod
    def __new__(cls, inner: Tensor) -> Wrapped:  # noqa: PYI034 - Python 3.10 has no Self
        sizes = {"dtype": inner.dtype, "device": inner.device, "strides": inner.stride()}
        return Tensor._make_wrapper_subclass(cls, inner.shape, requires_grad=inner.requires_grad, **sizes)

    def __init__(self, inner: Tensor) -> None:
        self.inner = inner

    def __repr__(self) -> str:
        return f"Wrapped({self.inner})"

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["inner"], None

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        inside = tree_map_only(Wrapped, lambda wrapped: wrapped.inner, (args, kwargs or {}))
        result = tree_map_only(Tensor, Wrapped, function(*inside[0], **inside[1]))
        return return_and_correct_aliasing(function, args, kwargs or {}, result)


class Named(Tensor):
    """A tensor of a class of its own, made with ``__torch_function__`` alone."""

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return super().__torch_function__(function, types, args, kwargs or {})


@contextmanager
def one_process() -> Iterator[None]:
    """A process group of this process alone."""
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        distributed.destroy_process_group()


def distributed_tensor(x: Tensor) -> Tensor:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    return distribute_tensor(x, init_device_mesh("cpu", (1,)), [Shard(0)])


def rows(x: Tensor) -> list[Tensor]:
    return [row[:length].clone() for row, length in zip(x, LENGTHS, strict=True)]


KINDS: dict[str, Callable[[Tensor], Tensor]] = {
    "nested, strided": lambda x: torch.nested.nested_tensor(rows(x)),
    "nested, jagged": lambda x: torch.nested.nested_tensor(rows(x), layout=torch.jagged),
    "DTensor": distributed_tensor,
    "sparse COO": lambda x: x.to_sparse(),
    "sparse CSR, CSC": lambda x: x.to_sparse_csr(),
    "sparse BSR, BSC": lambda x: x.to_sparse_bsr((1, 2)),
    "mkldnn": lambda x: x.to_mkldnn(),
    "quantized": lambda x: torch.quantize_per_tensor(x, 0.25, 64, torch.quint8),
    "quantized per channel": lambda x: torch.quantize_per_channel(
        x, torch.tensor([0.25, 0.5, 1.0, 2.0]), torch.zeros(4, dtype=torch.int64), 2, torch.qint8
    ),
    "on `meta`": lambda x: x.to("meta"),
    "complex": lambda x: torch.complex(x, -x).conj(),
    "a class with `__torch_dispatch__`": lambda x: Wrapped(x.clone()),
    "a class with `__torch_function__`": lambda x: x.clone().as_subclass(Named),
}


class Returns(nn.Module):
    """A layer that returns a tensor of a kind."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, x: Tensor) -> Tensor:
        return KINDS[self.kind](x)


def numbers(value: Any) -> list[np.ndarray[Any, Any]]:
    """The numbers of a tensor of any kind, or of rows, row by row; of one that has none, zeros of its shape."""
    if isinstance(value, list | tuple):
        return [array for row in value for array in (numbers(row[None]) if isinstance(row, Tensor) else [row])]
    if isinstance(value, np.ndarray):
        return list(value)
    if value.is_nested:
        return [row.numpy() for row in value.unbind()]
    if isinstance(value, Wrapped):
        value = value.inner
    if hasattr(value, "full_tensor"):
        value = value.full_tensor()
    value = value.to_dense() if value.layout is not torch.strided else value
    value = value.dequantize() if value.is_quantized else value
    value = torch.zeros(value.shape, dtype=value.dtype) if value.is_meta else value
    return list(value.detach().as_subclass(Tensor).resolve_conj().numpy())


def are_equal(value: Any, expected: Any) -> bool:
    """Whether two values have the same numbers in the same rows, and the same dtype but for quantized ones."""
    found, wanted = numbers(value), numbers(expected)
    return len(found) == len(wanted) and all(
        one.dtype == other.dtype and np.array_equal(one, other) for one, other in zip(found, wanted, strict=True)
    )
