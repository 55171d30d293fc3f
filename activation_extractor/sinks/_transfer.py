"""Device to host: few copies, into pinned memory, on a stream of their own, while the accelerator goes on.

Written against `torch.accelerator`, `torch.Stream` and `torch.Event` alone, so that it is the same on every accelerator
that torch knows. What has streams copies beside the forward that follows; what has none (MPS) waits for each copy.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from activation_extractor._streams import current_stream, hold, new_stream, use

# Tensors travel together up to this size, which bounds what packing them costs the device: it holds them twice.
PARCEL_BYTES = 64 * 2**20


class Arrival:
    """When copies have arrived: their tensors must not be read before `wait` has returned."""

    def __init__(self) -> None:
        self._events: list[Any] = []

    def add(self, event: Any) -> None:
        """Wait for this event as well."""
        self._events.append(event)

    def wait(self) -> None:
        """Block the calling thread, and nothing else, until everything has arrived."""
        while self._events:
            self._events.pop().synchronize()


class Transfer:
    """Brings tensors to the CPU; one for each writer, since it keeps a stream for each device."""

    def __init__(self) -> None:
        self._streams: dict[torch.device, Any] = {}

    def to_host(self, tensors: Mapping[str, Tensor], arrival: Arrival) -> dict[str, Tensor]:
        """The tensors on the CPU, under the same names; those that are there already as they are.

        Those of a device are copied together, as bytes, up to `PARCEL_BYTES`. The tensors given may be let go of at
        once.

        Args:
            tensors: on any devices; none may be written to afterwards, except on its device's current stream.
            arrival: is told what to wait for before the result is read.
        """
        hosts = dict(tensors)
        for device, names in _by_device(tensors).items():
            hosts |= self._copied({name: tensors[name] for name in names}, device, arrival)
        return hosts

    def _copied(self, tensors: Mapping[str, Tensor], device: torch.device, arrival: Arrival) -> dict[str, Tensor]:
        hosts = {name: tensor.cpu() for name, tensor in tensors.items() if not _is_plain(tensor)}
        plain = {name: tensor for name, tensor in tensors.items() if name not in hosts}
        hold(plain.values())  # packing reads them here, wherever they were made
        parcels = _parcels(plain)
        arrived = self._fetch([_packed(parcel) for parcel in parcels], device, arrival)
        for packed, parcel in zip(arrived, parcels, strict=True):
            hosts |= _unpacked(packed, parcel)
        return hosts

    def _fetch(self, sources: Sequence[Tensor], device: torch.device, arrival: Arrival) -> list[Tensor]:
        """Copies of contiguous tensors: begun, or on a device without streams done."""
        stream = self._stream(device)
        if stream is None or not sources:
            return [source.cpu() for source in sources]
        stream.wait_stream(current_stream(device))
        with use(stream):
            hosts = [_pinned_like(source).copy_(source, non_blocking=True) for source in sources]
            for source in sources:
                source.record_stream(stream)  # its memory is not given away before the copy is done
            arrival.add(stream.record_event())
        return hosts

    def _stream(self, device: torch.device) -> Any:
        """The stream for copies from a device; None when it has none."""
        if device not in self._streams:
            self._streams[device] = new_stream(device)
        return self._streams[device]


def _by_device(tensors: Mapping[str, Tensor]) -> dict[torch.device, list[str]]:
    names: dict[torch.device, list[str]] = defaultdict(list)
    for name, tensor in tensors.items():
        if tensor.device.type != "cpu":
            names[tensor.device].append(name)
    return names


def _is_plain(tensor: Tensor) -> bool:
    return tensor.layout is torch.strided and not tensor.is_nested and not tensor.is_quantized


def _parcels(tensors: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
    """The tensors in groups of up to `PARCEL_BYTES`, a larger one alone."""
    parcels: list[dict[str, Tensor]] = []
    room = -1
    # Those with the largest items first: then each begins at a multiple of its item's size.
    for name in sorted(tensors, key=lambda name: -tensors[name].itemsize):
        nbytes = tensors[name].nbytes
        if nbytes > room:
            parcels.append({})
            room = PARCEL_BYTES
        parcels[-1][name] = tensors[name]
        room -= nbytes
    return parcels


def _packed(parcel: Mapping[str, Tensor]) -> Tensor:
    """One tensor as it is, several as their bytes."""
    tensors = [tensor.contiguous() for tensor in parcel.values()]
    return tensors[0] if len(tensors) == 1 else torch.cat([one.reshape(-1).view(torch.uint8) for one in tensors])


def _unpacked(packed: Tensor, parcel: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Views of what `_packed` made."""
    if len(parcel) == 1:
        return dict.fromkeys(parcel, packed)
    parts = torch.split(packed, [tensor.nbytes for tensor in parcel.values()])
    return {
        name: part.view(tensor.dtype).view(tensor.shape)
        for (name, tensor), part in zip(parcel.items(), parts, strict=True)
    }


def _pinned_like(tensor: Tensor) -> Tensor:
    """Memory for a copy; pageable where none can be pinned, which makes the copy slower and no less right."""
    try:
        return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    except RuntimeError:
        return torch.empty(tensor.shape, dtype=tensor.dtype)
