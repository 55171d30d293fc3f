"""`torch.Stream`, `torch.Event` and their like, for the fake device; once it is installed they replace torch's own."""

from __future__ import annotations

import threading
from typing import Any

import fake_time
import torch
from fake_time import NAME, lock, seen

RealStream, RealEvent = torch.Stream, torch.Event
_thread = threading.local()


def current() -> int:
    """The id of this thread's stream."""
    return getattr(_thread, "stream", 0)


def is_ours(device: Any) -> bool:
    """Whether a device, as a user may name it, is the fake one; the accelerator by default."""
    return device is None or isinstance(device, int) or torch.device(device).type == NAME


class _Replacement(type):
    """The class of a class that stands in for one of torch's: instances of that one are its instances too."""

    def __instancecheck__(cls, instance: object) -> bool:
        return isinstance(instance, cls.__mro__[1])


class Stream(RealStream, metaclass=_Replacement):
    """A queue of work on the fake device; for any other device the real class answers."""

    def __new__(cls, device: Any = None, *, priority: int = 0, **ids: int):
        if ids or not is_ours(device):
            return RealStream(**({"device": device} if device is not None else {}), priority=priority, **ids)
        with lock:
            seen[len(seen)] = {}
            return cls.with_id(len(seen) - 1)

    @classmethod
    def with_id(cls, stream: int) -> Stream:
        """The stream with this id, which exists."""
        kind = int(torch._C._autograd.DeviceType.PrivateUse1.value)
        return RealStream.__new__(cls, stream_id=stream, device_index=0, device_type=kind)

    def __enter__(self):
        _thread.outer = [*getattr(_thread, "outer", []), current()]
        _thread.stream = self.stream_id
        return self

    def __exit__(self, *trouble: object):
        _thread.stream = _thread.outer.pop()

    def wait_event(self, event: Event) -> None:
        event.wait(self)

    def wait_stream(self, other: Stream) -> None:
        with lock:
            fake_time.merge(seen[self.stream_id], seen[other.stream_id])

    def record_event(self, event: Event | None = None) -> Event:
        event = event if event is not None else Event(NAME)
        event.record(self)
        return event

    def query(self) -> bool:
        with lock:
            return fake_time.is_done(fake_time.now(self.stream_id))

    def synchronize(self) -> None:
        fake_time.wait_for_stream(self.stream_id)


class Event(RealEvent, metaclass=_Replacement):
    """A moment on a stream of the fake device; for any other device the real class answers."""

    def __new__(cls, device: Any = None, **options: bool):
        if not is_ours(device):
            return RealEvent(device=device, **options)
        event = RealEvent.__new__(cls, NAME, **options)
        event.clock = {}
        return event

    def record(self, stream: Stream | None = None) -> None:
        with lock:
            self.clock = dict(seen[current() if stream is None else stream.stream_id])

    def wait(self, stream: Stream | None = None) -> None:
        with lock:
            fake_time.merge(seen[current() if stream is None else stream.stream_id], self.clock)

    def query(self) -> bool:
        with lock:
            return all(map(fake_time.is_done, self.clock.items()))

    def synchronize(self) -> None:
        fake_time.wait_for(self.clock)


def current_stream(device: Any = None, /) -> Stream:
    """As `torch.accelerator.current_stream`."""
    if not is_ours(device):
        raise ValueError(f"{device} doesn't match the current accelerator {NAME}.")
    return Stream.with_id(current())


def set_stream(stream: Stream) -> None:
    """As `torch.accelerator.set_stream`."""
    _thread.stream = stream.stream_id


def synchronize(device: Any = None) -> None:
    """As `torch.accelerator.synchronize`: the host waits for every stream."""
    with lock:
        fake_time.wait_for(dict(map(fake_time.now, seen)))
