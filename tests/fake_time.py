"""Time on the fake device: what order its work has, its memory, and the copies that are under way.

Each piece of work gets a stamp: its stream and its number there. A stream has seen a stamp when it is its own, when it
waited for it, or when the device has completed it. Work completes only because somebody waits for it (or `finish`), so
whoever forgets to wait finds poison, every time. Nothing in here registers anything: `fake_accelerator.install` does.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterable
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

NAME = "fakedev"
POISON = 255  # in every byte: NaN for every float, -1 for signed integers, the largest of the unsigned

Clock = dict[int, int]  # of each stream, how much of its work
Stamp = tuple[int, int]

lock = threading.RLock()  # held for every look at, and change of, what follows
_done: Clock = {}
seen: dict[int, Clock] = {0: {}}  # of each stream, what comes before its next work; its own work included
_copies: list[HostCopy] = []  # under way, in the order in which they were begun
_logs: list[Log] = []


@dataclass
class Log:
    """What happened on the device while `recorded` was open, whichever thread did it."""

    to_host: list[tuple[int, bool, int]] = field(default_factory=list)  # (bytes, non_blocking, stream id)
    to_device: list[tuple[int, bool, int]] = field(default_factory=list)
    ops: list[str] = field(default_factory=list)
    items: int = 0  # numbers, bools and sizes that Python had to know
    host_waits: int = 0  # blocking copies and items, and what was synchronized: events, streams, the device
    pinned_bytes: int = 0


@contextmanager
def recorded():
    """A `Log` of all that the device does inside of the block."""
    log = Log()
    with lock:
        _logs.append(log)
    try:
        yield log
    finally:
        with lock:
            _logs[:] = [other for other in _logs if other is not log]


def note(kind: str, what: Any) -> None:
    """Append to a list of each open log, or add to its number."""
    with lock:
        for log in _logs:
            value = getattr(log, kind)
            value.append(what) if isinstance(value, list) else setattr(log, kind, value + what)


def submit(stream: int) -> Stamp:
    """The stamp of a new piece of work."""
    seen[stream][stream] = seen[stream].get(stream, 0) + 1
    return now(stream)


def now(stream: int) -> Stamp:
    """The stamp of a stream's latest work."""
    return stream, seen[stream].get(stream, 0)


def has_seen(stream: int, stamp: Stamp) -> bool:
    """Whether the next work of a stream comes surely after the work with this stamp."""
    of, number = stamp
    return number <= max(seen[stream].get(of, 0), _done.get(of, 0))


def finish() -> None:
    """Let time pass: the device completes all that it was given. Nobody waited, so nothing is counted."""
    with lock:
        _complete(dict(now(stream) for stream in seen))


def wait_for(clock: Clock) -> None:
    """Let the host wait for this much work."""
    with lock:
        note("host_waits", 1)
        _complete(clock)


def wait_for_stream(stream: int) -> None:
    """Let the host wait for a stream's work, and for what that work came after."""
    wait_for(seen[stream])


def _complete(clock: Clock) -> None:
    merge(_done, clock)
    arrived = [copy for copy in _copies if is_done(copy.stamp)]
    _copies[:] = [copy for copy in _copies if not is_done(copy.stamp)]
    with torch.inference_mode():  # which lets inference tensors be written to
        for copy in arrived:
            copy.buffer.copy_(copy.data)


def is_done(stamp: Stamp) -> bool:
    return stamp[1] <= _done.get(stamp[0], 0)


def merge(clock: Clock, other: Clock) -> None:
    for stream, number in other.items():
        clock[stream] = max(number, clock.get(stream, 0))


Spoil = Callable[[], "list[Spoil]"]  # spoils what some work made, and tells how to spoil what was made of that in turn


class Readers:
    """The work that reads a piece of memory; it outlives the memory, since what was made of it may be read still."""

    def __init__(self):
        self._works: list[tuple[Stamp, Spoil]] = []

    def add(self, stamp: Stamp, spoil: Spoil) -> None:
        if len(self._works) > 100:
            self.taken(is_done, keep=False)
        self._works.append((stamp, spoil))

    def taken(self, is_safe: Callable[[Stamp], bool], *, keep: bool = True) -> list[Spoil]:
        """Take out the work that is not safe, or that which is."""
        safe = [work for work in self._works if is_safe(work[0])]
        unsafe = [work for work in self._works if not is_safe(work[0])]
        self._works = safe if keep else unsafe
        return [spoil for _, spoil in unsafe]


class Memory:
    """What the tensors that share a storage share. Dies with the last of them, since the storage alone holds it."""

    def __init__(self, data: torch.UntypedStorage, stream: int):
        self.data = data  # the host's memory that plays the device's
        self.home = stream  # where it may be given away again once it is free
        self.written = now(stream)
        self.kept_for: set[int] = set()  # by record_stream
        self.readers = Readers()

    def write(self, stamp: Stamp) -> None:
        """Be written to: earlier work that reads this memory beside that writing reads rubbish."""
        _spoil_all(self.readers.taken(lambda reader: has_seen(stamp[0], reader)))
        self.written = stamp

    def spoil(self) -> None:
        """Lose the data, for those who read it already and have not finished as well."""
        _spoil_all([spoiler([self])])

    def __del__(self):
        with lock:
            _spoil_all(self.readers.taken(lambda reader: reader[0] in self.kept_for or has_seen(self.home, reader)))


def spoiler(memories: Iterable[Memory]) -> Spoil:
    """Spoils those memories that still live, and tells how to spoil what was made of them; it keeps none of them."""
    targets = [(weakref.ref(memory), memory.readers) for memory in memories]

    def spoil() -> list[Spoil]:
        for memory in filter(None, (target() for target, _ in targets)):
            poison(memory.data)
        return [following for _, readers in targets for following in readers.taken(is_done)]

    return spoil


def _spoil_all(spoils: list[Spoil]) -> None:
    while spoils:
        spoils.extend(spoils.pop()())


@dataclass
class HostCopy:
    """A copy to the host: until it is completed its buffer holds poison."""

    buffer: Tensor
    data: Tensor  # as it is on the device when the copy's turn comes
    stamp: Stamp

    def begin(self, readers: Readers) -> None:
        """Take effect some time later, among the readers of the source."""
        this = weakref.ref(self)

        def spoil() -> list[Spoil]:
            if (copy := this()) is not None:
                copy.data = poisoned(copy.data)
            return []

        readers.add(self.stamp, spoil)
        self.buffer.copy_(poisoned(self.buffer))
        _copies.append(self)


def poison(data: torch.UntypedStorage) -> None:
    """Overwrite all of a storage on the host."""
    with torch.inference_mode(False):
        torch.empty(0, dtype=torch.uint8, device="cpu").set_(data).fill_(POISON)


def poisoned(tensor: Tensor) -> Tensor:
    """A tensor on the host like this one, of poison."""
    twin = torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device="cpu")
    poison(twin.untyped_storage())
    return twin.fill_(True) if tensor.dtype is torch.bool else twin
