"""Device to host: few copies, into pinned memory, on a stream of their own, while the accelerator goes on.

Only `torch.accelerator`, `torch.Stream` and `torch.Event` are used, so it works on every accelerator that torch knows.
A device with streams copies beside the next forward; one without (MPS) waits for each copy.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from activation_extractor._streams import current_stream, hold, new_stream, pinned, use

PARCEL_BYTES = 64 * 2**20  # of tensors copied together; packing takes as much memory again on their device
STACK_BYTES = 4 * 2**20  # of tensors alike that are stacked before they are packed, which takes their memory once more


class Arrival(list[Any]):
    """The events after which copies have arrived: their tensors must not be read before `wait` has returned."""

    def wait(self) -> None:
        """Block the calling thread, and nothing else, until everything has arrived."""
        while self:
            self.pop().synchronize()


class Transfer:
    """Brings tensors to the CPU; one for each writer, since it keeps a stream for each device."""

    def __init__(self) -> None:
        self._streams: dict[torch.device, Any] = {}

    def to_host(self, tensors: Mapping[str, Tensor], arrival: Arrival) -> dict[str, Tensor]:
        """The tensors on the CPU, under the same names; a tensor on the CPU is returned as it is.

        Those of a device are copied together, as bytes, up to `PARCEL_BYTES`. The caller may drop them at once, but may
        write to them only on their device's current stream. It waits for `arrival` before it reads the result.
        """
        hosts = {name: tensor if _is_plain(tensor) else tensor.cpu() for name, tensor in tensors.items()}
        by_device: dict[torch.device, dict[str, Tensor]] = {}
        for name, tensor in hosts.items():
            if not tensor.is_cpu:
                by_device.setdefault(tensor.device, {})[name] = tensor
        for device, plain in by_device.items():
            hold(plain.values())  # packing reads them on this stream, wherever they were made
            parcels = [_alike(parcel) for parcel in _parcels(plain)]
            arrived = self._fetch([_packed(groups, plain) for groups in parcels], device, arrival)
            for packed, groups in zip(arrived, parcels, strict=True):
                hosts |= _unpacked(packed, groups, plain)
        return hosts

    def _fetch(self, sources: Sequence[Tensor], device: torch.device, arrival: Arrival) -> list[Tensor]:
        """Copies of contiguous tensors, which arrive later; on a device without streams they are complete."""
        if device not in self._streams:
            self._streams[device] = new_stream(device)
        stream = self._streams[device]
        if stream is None:
            return [source.cpu() for source in sources]
        stream.wait_stream(current_stream(device))
        with use(stream):
            hosts = [pinned(source.shape, source.dtype).copy_(source, non_blocking=True) for source in sources]
            for source in sources:
                source.record_stream(stream)  # the allocator reuses its memory only once the copy is complete
            arrival.append(stream.record_event())
        return hosts


def _is_plain(tensor: Tensor) -> bool:
    """Whether the bytes of a tensor are all of it; sparse, nested and quantized ones hold more."""
    return tensor.layout is torch.strided and not tensor.is_nested and not tensor.is_quantized


def _parcels(tensors: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
    """The tensors in groups of up to `PARCEL_BYTES`, a larger one alone."""
    parcels: list[dict[str, Tensor]] = []
    room = -1
    # The largest items first: then each tensor begins at a multiple of its item's size, and can be viewed.
    for name in sorted(tensors, key=lambda name: -tensors[name].itemsize):
        nbytes = tensors[name].nbytes
        if nbytes > room:
            parcels.append({})
            room = PARCEL_BYTES
        parcels[-1][name] = tensors[name]
        room -= nbytes
    return parcels


def _alike(parcel: Mapping[str, Tensor]) -> list[list[str]]:
    """The names of tensors in groups of one shape and one dtype."""
    groups: dict[Any, list[str]] = {}
    for name, tensor in parcel.items():
        groups.setdefault((tensor.shape, tensor.dtype), []).append(name)
    return [*groups.values()]


def _packed(groups: Sequence[Sequence[str]], tensors: Mapping[str, Tensor]) -> Tensor:
    """The tensors of a parcel in one, which has the bytes of each group one behind another."""
    pieces = [piece for group in groups for piece in _stacked([tensors[name] for name in group])]
    return pieces[0] if len(pieces) == 1 else torch.cat([_bytes(piece) for piece in pieces])


def _stacked(tensors: list[Tensor]) -> list[Tensor]:
    """Contiguous tensors with the bytes of these: one, where they are small, since each takes calls of its own."""
    first = tensors[0]
    is_common = first.is_floating_point() and first.itemsize > 1  # what every device can stack
    if is_common and 1 < len(tensors) <= STACK_BYTES / max(first.nbytes, 1):
        return [torch.stack(tensors)]
    return [tensor.contiguous() for tensor in tensors]


def _unpacked(packed: Tensor, groups: Sequence[Sequence[str]], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Views of what `_packed` made."""
    hosts: dict[str, Tensor] = {}
    rest = _bytes(packed)
    for group in groups:
        first = tensors[group[0]]
        part, rest = rest.tensor_split([len(group) * first.nbytes])
        hosts |= zip(group, part.view(first.dtype).view(len(group), *first.shape).unbind(), strict=True)
    return hosts


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.resolve_conj().resolve_neg().reshape(-1).view(torch.uint8)
