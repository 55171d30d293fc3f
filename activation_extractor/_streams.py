"""Streams of accelerators, through what torch offers for all of them; devices without streams have none."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor


def current_accelerator() -> torch.device | None:
    """The accelerator of this machine; None where torch knows of some kind and none is there."""
    return torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None


def new_stream(device: torch.device) -> Any:
    """A stream of one's own; None on a device that has none (the CPU, MPS)."""
    return torch.Stream(device=device) if has_streams(device.type) else None


def current_stream(device: torch.device) -> Any:
    """The stream that work on the device goes to in this thread; None on a device that has none."""
    return torch.accelerator.current_stream(device) if has_streams(device.type) else None


@contextmanager
def use(stream: Any) -> Iterator[None]:
    """Send what this thread begins to a stream."""
    if hasattr(stream, "__enter__"):  # since torch 2.8
        with stream:
            yield
        return
    device, before = torch.accelerator.current_device_index(), current_stream(stream.device)
    torch.accelerator.set_stream(stream)  # makes its device the current one too
    try:
        yield
    finally:
        torch.accelerator.set_stream(before)
        torch.accelerator.set_device_index(device)


def hold(tensors: Iterable[Tensor]) -> None:
    """Keep the memory of tensors from being given away before what the current stream does with them is done.

    An allocator knows the stream that a tensor was made on, and no other that reads it.
    """
    streams: dict[torch.device, Any] = {}
    for tensor in tensors:
        device = tensor.device
        if device not in streams:
            streams[device] = current_stream(device)
        if streams[device] is not None:
            tensor.record_stream(streams[device])


def pinned(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Memory on the CPU that an accelerator copies to and from; pageable where none can be pinned, which is slower."""
    try:
        return torch.empty(shape, dtype=dtype, pin_memory=True)
    except RuntimeError:
        return torch.empty(shape, dtype=dtype)


@cache
def has_streams(kind: str) -> bool:
    """Whether devices of a kind have streams."""
    accelerator = current_accelerator()
    if accelerator is None or accelerator.type != kind:
        return False
    try:
        torch.Stream(device=kind)
    except RuntimeError:  # NotImplementedError is one
        return False
    return True
