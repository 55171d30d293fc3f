"""Host memory for small results that outlive their step: pages of their own, outside of malloc's heap.

In the heap a small result would stay between the freed memory of two large activations. The next activation needs a
little more than that gap, so malloc could not reuse it, and the heap would grow by an activation a step.
"""

from __future__ import annotations

import mmap

import torch
from torch import Tensor

BLOCK_BYTES = 4 * 2**20
FIRST_BLOCK_BYTES = 64 * 2**10  # each further block is twice as large, up to `BLOCK_BYTES`
SMALL_BYTES = BLOCK_BYTES // 16  # larger tensors leave gaps that malloc reuses, and take time to copy
_ALIGNMENT = 16  # bytes, the size of the largest dtype


class HostMemory:
    """Copies small CPU tensors into blocks; a block is freed with the last tensor in it.

    Attributes:
        nbytes: how many bytes its blocks and the tensors that came back as they are take.
    """

    def __init__(self) -> None:
        self.nbytes = 0
        self._block: Tensor | None = None
        self._used = 0

    def keep(self, tensor: Tensor) -> Tensor:
        """A contiguous copy in memory of its own; a large tensor comes back as it is, unless it keeps much else."""
        nbytes = tensor.nbytes
        is_plain = tensor.layout is torch.strided and nbytes > 0
        if not is_plain or (nbytes > SMALL_BYTES and tensor.untyped_storage().nbytes() <= 2 * nbytes):
            self.nbytes += nbytes
            return tensor
        if self._block is None or self._used + nbytes > len(self._block):
            size = FIRST_BLOCK_BYTES if self._block is None else min(2 * len(self._block), BLOCK_BYTES)
            size = max(size, -(-nbytes // mmap.PAGESIZE) * mmap.PAGESIZE)
            self._block, self._used = torch.frombuffer(mmap.mmap(-1, size), dtype=torch.uint8), 0
            self.nbytes += size
        memory = self._block[self._used : self._used + nbytes]
        self._used += -(-nbytes // _ALIGNMENT) * _ALIGNMENT
        return memory.view(tensor.dtype).view(tensor.shape).copy_(tensor)
