"""Host memory for what is kept longer than a step: pages of its own, outside of malloc's heap.

A small result that stays behind each large activation that is freed keeps malloc from using the room again, since the
next activation needs a little more than what lies between two results: the heap then grows by an activation a step.
"""

from __future__ import annotations

import mmap

import torch
from torch import Tensor

BLOCK_BYTES = 4 * 2**20
SMALL_BYTES = BLOCK_BYTES // 16  # larger ones leave gaps that are worth using, and cost time to copy
_ALIGNMENT = 16  # of the largest dtype


class Arena:
    """Keeps copies of small CPU tensors; their memory is given back when none of them lives any more."""

    def __init__(self) -> None:
        self._block: Tensor | None = None
        self._used = 0

    def keep(self, tensor: Tensor) -> Tensor:
        """A contiguous copy in the arena's own memory; a large tensor comes back as it is."""
        nbytes = tensor.nbytes
        if nbytes > SMALL_BYTES or tensor.layout is not torch.strided or not nbytes:
            return tensor
        room = self._room(nbytes).view(tensor.dtype).view(tensor.shape)
        return room.copy_(tensor)

    def _room(self, nbytes: int) -> Tensor:
        if self._block is None or self._used + nbytes > BLOCK_BYTES:
            self._block, self._used = torch.frombuffer(mmap.mmap(-1, BLOCK_BYTES), dtype=torch.uint8), 0
        start = self._used
        self._used = -(-(start + nbytes) // _ALIGNMENT) * _ALIGNMENT
        return self._block[start : start + nbytes]
