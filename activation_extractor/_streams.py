"""Streams of accelerators, through what torch offers for all of them; devices without streams have none."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from typing import Any

import torch
from torch import Tensor


def new_stream(device: torch.device) -> Any:
    """A stream of one's own; None on a device that has none (the CPU, MPS)."""
    return torch.Stream(device=device) if has_streams(device.type) else None


def current_stream(device: torch.device) -> Any:
    """The stream that work on the device goes to in this thread; None on a device that has none."""
    return torch.accelerator.current_stream(device) if has_streams(device.type) else None


def hold(tensors: Iterable[Tensor]) -> None:
    """Keep the memory of tensors from being given away before what the current stream does with them is done.

    An allocator knows the stream that a tensor was made on, and no other that reads it.
    """
    for tensor in tensors:
        stream = current_stream(tensor.device)
        if stream is not None:
            tensor.record_stream(stream)


@cache
def has_streams(kind: str) -> bool:
    """Whether devices of a kind have streams."""
    accelerator = torch.accelerator.current_accelerator()
    if kind == "cpu" or accelerator is None or accelerator.type != kind:
        return False
    try:
        torch.Stream(device=kind)
    except RuntimeError:  # NotImplementedError is one
        return False
    return True
