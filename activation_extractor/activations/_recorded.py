"""What one block keeps: the values of its layers, by reducer and recorded name."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Literal

from torch import Tensor

from activation_extractor._private_torch import version_of
from activation_extractor._tensors import ordinary, storage_bytes
from activation_extractor.errors import CapacityError, OverwrittenError

Calls = Literal["last", "all", "join"]
Key = tuple[str, str]  # recorded name, reducer's name


class Entry:
    """A value that is kept: a tensor of its own, or the layer's own tensor with what tells when it is written to.

    Attributes:
        tensor: the value; None while there is none.
        version: the tensor's version when the layer returned it; None when it is a copy.
        turn: when the first value came since there was none: what came later has a larger one.
    """

    __slots__ = ("tensor", "turn", "version")

    def __init__(self, tensor: Tensor | None = None, version: int | None = None, turn: int = -1) -> None:
        self.tensor, self.version, self.turn = tensor, version, turn

    def read(self, name: str, *, detach: bool) -> Tensor:
        """The tensor, an ordinary one, and the same one each time.

        Raises:
            OverwrittenError: it was kept without a copy and written to since.
            TransformedCallError: it is a transform's, which has no meaning outside of it.
        """
        assert self.tensor is not None
        self.check()
        if self.version is None:
            self.tensor = ordinary(self.tensor)
        elif version_of(self.tensor) != self.version:
            raise OverwrittenError(name)
        elif detach:
            self.detach()
        return self.tensor

    def check(self) -> None:
        """Refuse a value that a transform of torch.func has wrapped. Here is none: the hook has refused it."""

    def close(self, *, detach: bool) -> None:
        """The block ends: let go of the graph, unless it is wanted."""
        if detach and self.version is not None:
            self.detach()

    def detach(self) -> None:
        """Let go of the graph."""
        if self.tensor is not None and self.tensor.requires_grad:
            self.tensor = self.tensor.detach()  # shares the version counter


class Turns:
    """Counts what comes; it can be copied and pickled, as `itertools.count` cannot from Python 3.14 on."""

    __slots__ = ("_next",)

    def __init__(self) -> None:
        self._next = -1

    def __next__(self) -> int:
        self._next += 1
        return self._next


class Kept:
    """Values by key; one value a key, or the values of all calls in order.

    Attributes:
        masks: the masks of the activations that are kept whole, by recorded name, call by call.
        turns: counts what is kept first, so that its order is known.
    """

    def __init__(self, calls: Calls, max_bytes: int | None, *, detach: bool = True) -> None:
        self.masks: dict[str, list[Tensor | None]] = {}
        self.turns = Turns()
        # By reducer and name: the entries of all calls, with a None where a gradient is still to come; or the last one.
        self._calls: dict[str, dict[str, list[Entry | None]]] = {}
        self._last: dict[str, dict[str, Entry]] = {}
        self._keeps_all, self._detach = calls != "last", detach
        self._budget = None if max_bytes is None else _Budget(max_bytes)

    def entry(self, key: Key) -> Entry:
        """Where the last value of a key is kept: the same object as long as the block lives, for hooks to write to."""
        entries = self._last.setdefault(key[1], {})
        if key[0] not in entries:
            entries[key[0]] = Entry()
        return entries[key[0]]

    def keep_in(self, entry: Entry, key: Key) -> None:
        """Keep the last value of a key in an entry that its hook brings."""
        self._last.setdefault(key[1], {})[key[0]] = entry

    @property
    def names(self) -> list[str]:
        """The recorded names that something is kept for, in the order in which their first values came."""
        turns: dict[str, int] = {}
        for last in self._last.values():
            turns.update((name, one.turn) for name, one in last.items() if one.tensor is not None)
        for calls in self._calls.values():
            turns.update((name, next(one.turn for one in entries if one)) for name, entries in calls.items())
        return sorted(turns, key=turns.__getitem__)

    def put(self, key: Key, tensor: Tensor, version: int | None = None, index: int | None = None) -> None:
        """Keep the value of a call: the next one, or the one with this index; with a version where it is no copy.

        Raises:
            CapacityError: it does not fit ``max_bytes``.
        """
        if not self._keeps_all:
            last = self.entry(key)
            self._count(key[0], tensor, last.tensor)
            if last.tensor is None:
                last.turn = next(self.turns)
            last.tensor, last.version = tensor, version
            return
        entries = self._calls.setdefault(key[1], {}).setdefault(key[0], [])
        index = len(entries) if index is None else index
        entries.extend([None] * (index + 1 - len(entries)))
        before = entries[index]
        self._count(key[0], tensor, None if before is None else before.tensor)
        entries[index] = Entry(tensor, version, next(self.turns))

    def put_mask(self, name: str, mask: Tensor | None, index: int | None = None) -> None:
        """Keep the mask that belongs to a value that was put at `index`."""
        if not self._keeps_all:
            self.masks[name] = [mask]
            return
        masks = self.masks.setdefault(name, [])
        index = len(masks) if index is None else index
        masks.extend([None] * (index + 1 - len(masks)))
        masks[index] = mask

    def read(self, key: Key) -> Tensor | list[Tensor]:
        """The tensor of a key, or the list of the tensors of its calls; ordinary tensors, the same ones each time.

        Raises:
            KeyError: nothing is kept under this key.
            OverwrittenError: it was kept without a copy and written to since.
        """
        if self._keeps_all:
            return self.read_calls(key)
        last = self._last.get(key[1], {}).get(key[0])
        if last is None or last.tensor is None:
            raise KeyError(key)
        return last.read(key[0], detach=self._detach)

    def read_calls(self, key: Key) -> list[Tensor]:
        """The tensors of all calls of a key, as `read` gives them."""
        entries = self._calls[key[1]][key[0]]
        return [entry.read(key[0], detach=self._detach) for entry in entries if entry is not None]

    def check(self) -> None:
        """Make sure that everything is a value.

        Raises:
            TransformedCallError: something was recorded inside of ``vmap`` or another transform.
        """
        for entry in self._entries():
            entry.check()

    def close(self) -> None:
        """The block ends: let go of the graphs that references hold, unless they are wanted."""
        for entry in self._entries():
            entry.close(detach=self._detach)

    def clear(self) -> None:
        """Let go of everything."""
        for entry in self._entries():
            entry.tensor = None
        self._calls.clear()
        self.masks.clear()
        if self._budget is not None:
            self._budget = _Budget(self._budget.max_bytes)

    @property
    def nbytes(self) -> int:
        """Bytes of memory that the values keep alive; memory that several share counts once."""
        return sum(dict(storage_bytes(one.tensor) for one in self._entries() if one.tensor is not None).values())

    def _entries(self) -> Iterator[Entry]:
        for last in self._last.values():
            yield from last.values()
        for calls in self._calls.values():
            yield from (entry for entries in calls.values() for entry in entries if entry is not None)

    def _count(self, name: str, new: Tensor, old: Tensor | None) -> None:
        if self._budget is not None:
            self._budget.replace(name, new, old)


class _Budget:
    """A running count of the memory that is kept, by storage."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self._users: Counter[int] = Counter()
        self._kept_bytes = 0

    def replace(self, layer: str, new: Tensor, old: Tensor | None) -> None:
        if old is not None:
            self._drop(*storage_bytes(old))
        identity, size = storage_bytes(new)
        self._users[identity] += 1
        self._kept_bytes += size if self._users[identity] == 1 else 0
        if self._kept_bytes > self.max_bytes:
            raise CapacityError(self.max_bytes, self._kept_bytes, layer)

    def _drop(self, identity: int, size: int) -> None:
        self._users[identity] -= 1
        if not self._users[identity]:
            del self._users[identity]
            self._kept_bytes -= size
