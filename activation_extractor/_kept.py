"""What one block keeps: the values of its layers, by recorded name and reducer."""

from __future__ import annotations

from collections import Counter
from typing import Any, Literal

from torch import Tensor

from activation_extractor._values import ordinary, storage_bytes
from activation_extractor.errors import CapacityError, OverwrittenError

Calls = Literal["last", "all", "join"]
Key = tuple[str, str]  # recorded name, reducer's name


Reference = tuple[Tensor, int]  # a tensor kept without a copy, and its version when the layer returned it


def referenced(tensor: Tensor) -> Reference:
    """The tensor itself, with what tells whether it is written to later."""
    return tensor, tensor._version


Entry = Tensor | Reference


class Kept:
    """Values by key; one value a key, or the values of all calls in order.

    Attributes:
        values: what is kept: an entry, or a list of entries with a None where a gradient is still to come.
        masks: the masks of the activations that are kept whole, by recorded name, call by call.
    """

    def __init__(self, calls: Calls, max_bytes: int | None, *, detach: bool = True) -> None:
        self.values: dict[Key, Any] = {}
        self.masks: dict[str, list[Tensor | None]] = {}
        self._keeps_all, self._detach = calls != "last", detach
        self._budget = None if max_bytes is None else _Budget(max_bytes)

    def put(self, key: Key, entry: Entry, index: int | None = None) -> None:
        """Keep the value of a call: the next one, or the one with this index.

        Raises:
            CapacityError: it does not fit ``max_bytes``.
        """
        if not self._keeps_all:
            self._count(key, entry, self.values.get(key))
            self.values[key] = entry
            return
        entries = self.values.setdefault(key, [])
        index = len(entries) if index is None else index
        entries.extend([None] * (index + 1 - len(entries)))
        self._count(key, entry, entries[index])
        entries[index] = entry

    def put_mask(self, name: str, mask: Tensor | None, index: int | None = None) -> None:
        """Keep the mask that belongs to a value that was put at `index`."""
        if not self._keeps_all:
            self.masks[name] = [mask]
            return
        masks = self.masks.setdefault(name, [])
        index = len(masks) if index is None else index
        masks.extend([None] * (index + 1 - len(masks)))
        masks[index] = mask

    def read(self, key: Key) -> Any:
        """The tensor of a key, or the list of the tensors of its calls; ordinary tensors, the same ones each time.

        Raises:
            KeyError: nothing is kept under this key.
            OverwrittenError: it was kept without a copy and written to since.
        """
        value = self.values[key]
        if isinstance(value, list):
            value[:] = [entry if entry is None else self._read(key, entry) for entry in value]
            return [_tensor(entry) for entry in value if entry is not None]
        self.values[key] = entry = self._read(key, value)
        return _tensor(entry)

    def close(self) -> None:
        """Let go of the graphs that references hold, unless they are wanted."""
        for key, value in self.values.items():
            if isinstance(value, list):
                value[:] = [self._detached(entry) for entry in value]
            else:
                self.values[key] = self._detached(value)

    def clear(self) -> None:
        """Let go of everything."""
        self.values.clear()
        self.masks.clear()
        if self._budget is not None:
            self._budget = _Budget(self._budget.max_bytes)

    @property
    def nbytes(self) -> int:
        """Bytes of memory that the values keep alive; memory that several share counts once."""
        storages = {}
        for value in self.values.values():
            for entry in value if isinstance(value, list) else [value]:
                if entry is not None:
                    identity, size = storage_bytes(_tensor(entry))
                    storages[identity] = size
        return sum(storages.values())

    def _read(self, key: Key, entry: Entry) -> Entry:
        if not isinstance(entry, tuple):
            return ordinary(entry)
        tensor, version = entry
        if tensor._version != version:
            raise OverwrittenError(key[0])
        read: Entry = self._detached(entry)
        return read

    def _detached(self, entry: Any) -> Any:
        if self._detach and isinstance(entry, tuple) and entry[0].requires_grad:
            return entry[0].detach(), entry[1]  # shares the version counter
        return entry

    def _count(self, key: Key, new: Entry, old: Entry | None) -> None:
        if self._budget is not None:
            self._budget.replace(key[0], _tensor(new), None if old is None else _tensor(old))


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


def _tensor(entry: Entry) -> Tensor:
    return entry[0] if isinstance(entry, tuple) else entry
