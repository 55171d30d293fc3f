"""Host memory for small results that outlive their step: pages of their own, outside of malloc's heap.

In the heap a small result would stay between the freed memory of two large activations. The next activation needs a
little more than that gap, so malloc could not reuse it, and the heap would grow by an activation a step.
"""

from __future__ import annotations

import mmap

import torch
from torch import Tensor

BLOCK_BYTES = 4 * 2**20
SMALL_BYTES = BLOCK_BYTES // 16  # larger tensors leave gaps that malloc reuses, and take time to copy
_ALIGNMENT = 16  # bytes, the size of the largest dtype


class HostMemory:
    """Copies small CPU tensors into blocks; a block is freed with the last tensor in it."""

    def __init__(self) -> None:
        self._block: Tensor | None = None
        self._used = 0

    def keep(self, tensor: Tensor) -> Tensor:
        """A contiguous copy in memory of its own; a large tensor comes back as it is."""
        nbytes = tensor.nbytes
        if nbytes > SMALL_BYTES or tensor.layout is not torch.strided or not nbytes:
            return tensor
        if self._block is None or self._used + nbytes > BLOCK_BYTES:
            self._block, self._used = torch.frombuffer(mmap.mmap(-1, BLOCK_BYTES), dtype=torch.uint8), 0
        memory = self._block[self._used : self._used + nbytes]
        self._used += -(-nbytes // _ALIGNMENT) * _ALIGNMENT
        return memory.view(tensor.dtype).view(tensor.shape).copy_(tensor)
