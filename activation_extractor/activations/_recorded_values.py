"""What one block has recorded: the values of its layers, by reducer and recorded name."""

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


class Slot:
    """A recorded value: a copy, or the layer's own tensor with the version that it had.

    Attributes:
        tensor: the value; None before the layer has run.
        version: how often the tensor had been written to when the layer returned it; None when it is a copy.
        turn: when the slot got its first value: a slot that got one later has a larger number.
    """

    __slots__ = ("tensor", "turn", "version")

    def __init__(self, tensor: Tensor | None = None, version: int | None = None, turn: int = -1) -> None:
        self.tensor, self.version, self.turn = tensor, version, turn

    def read(self, name: str, *, detach: bool) -> Tensor:
        """The tensor, an ordinary one, and the same one each time.

        Raises:
            OverwrittenError: it is no copy, and was written to since the layer returned it.
            TransformedCallError: it was made inside a transform of torch.func and has no meaning outside of it.
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
        """Refuse a value that a transform of torch.func has wrapped, where the hook has not refused it already."""

    def close(self, *, detach: bool) -> None:
        """The block ends: let go of the graph, unless it is wanted."""
        if detach and self.version is not None:
            self.detach()

    def detach(self) -> None:
        """Let go of the graph."""
        if self.tensor is not None and self.tensor.requires_grad:
            self.tensor = self.tensor.detach()  # shares the version counter


class Turns:
    """Counts from 0; it can be copied and pickled, as `itertools.count` cannot from Python 3.14 on."""

    __slots__ = ("_next",)

    def __init__(self) -> None:
        self._next = -1

    def __next__(self) -> int:
        self._next += 1
        return self._next


class Recorded:
    """Values by key: the last one of each with ``calls="last"``, else those of all calls in order.

    With `detach`, references let go of their graphs when they are read or the block ends.

    Attributes:
        masks: the masks of the activations that are recorded whole, by recorded name, call by call.
        turns: numbers the slots in the order in which they get their first values.
    """

    def __init__(self, calls: Calls, max_bytes: int | None, *, detach: bool = True) -> None:
        self.masks: dict[str, list[Tensor | None]] = {}
        self.turns = Turns()
        # By reducer and name: the slots of all calls, with a None where a gradient is still to come; or the last one.
        self._calls: dict[str, dict[str, list[Slot | None]]] = {}
        self._last: dict[str, dict[str, Slot]] = {}
        self._has_all, self._detach = calls != "last", detach
        self._budget = None if max_bytes is None else _Budget(max_bytes)

    def slot(self, key: Key) -> Slot:
        """Where the last value of a key is: the same object as long as the block lives, for hooks to write to."""
        slots = self._last.setdefault(key[1], {})
        if key[0] not in slots:
            slots[key[0]] = Slot()
        return slots[key[0]]

    def add(self, slot: Slot, key: Key) -> None:
        """Take a slot that a hook has made for the last value of a key."""
        self._last.setdefault(key[1], {})[key[0]] = slot

    @property
    def names(self) -> list[str]:
        """The recorded names that have a value, in the order in which their first values came."""
        turns: dict[str, int] = {}
        for last in self._last.values():
            turns.update((name, slot.turn) for name, slot in last.items() if slot.tensor is not None)
        for calls in self._calls.values():
            turns.update((name, next(slot.turn for slot in slots if slot)) for name, slots in calls.items())
        return sorted(turns, key=turns.__getitem__)

    def put(self, key: Key, tensor: Tensor, version: int | None = None, index: int | None = None) -> None:
        """Store the value of call `index`, or of the next one; `version` is that of a reference, None for a copy.

        Raises:
            CapacityError: it does not fit ``max_bytes``.
        """
        if not self._has_all:
            last = self.slot(key)
            self._count(key[0], tensor, last.tensor)
            if last.tensor is None:
                last.turn = next(self.turns)
            last.tensor, last.version = tensor, version
            return
        slots = self._calls.setdefault(key[1], {}).setdefault(key[0], [])
        index = len(slots) if index is None else index
        slots.extend([None] * (index + 1 - len(slots)))
        before = slots[index]
        self._count(key[0], tensor, None if before is None else before.tensor)
        slots[index] = Slot(tensor, version, next(self.turns))

    def put_mask(self, name: str, mask: Tensor | None, index: int | None = None) -> None:
        """Store the mask that belongs to the value that was put at `index`."""
        if not self._has_all:
            self.masks[name] = [mask]
            return
        masks = self.masks.setdefault(name, [])
        index = len(masks) if index is None else index
        masks.extend([None] * (index + 1 - len(masks)))
        masks[index] = mask

    def read(self, key: Key) -> Tensor | list[Tensor]:
        """The tensor of a key, or the list of the tensors of its calls; ordinary tensors, the same ones each time.

        Raises:
            KeyError: the key has no value.
            OverwrittenError, TransformedCallError: see `Slot.read`.
        """
        if self._has_all:
            return self.read_calls(key)
        last = self._last[key[1]][key[0]]
        if last.tensor is None:
            raise KeyError(key)
        return last.read(key[0], detach=self._detach)

    def has(self, key: Key) -> bool:
        """Whether a key has a value, so that `read` gives one; `names` lists those that have one of some reducer."""
        if self._has_all:
            return key[0] in self._calls.get(key[1], ())
        last = self._last.get(key[1], {}).get(key[0])
        return last is not None and last.tensor is not None

    def read_calls(self, key: Key) -> list[Tensor]:
        """The tensors of all calls of a key, as `read` gives them."""
        slots = self._calls[key[1]][key[0]]
        return [slot.read(key[0], detach=self._detach) for slot in slots if slot is not None]

    def check(self) -> None:
        """Raise TransformedCallError for a value that was recorded inside ``vmap`` or another transform."""
        for slot in self._all_slots():
            slot.check()

    def close(self) -> None:
        """The block ends: let go of the graphs that references hold, unless they are wanted."""
        for slot in self._all_slots():
            slot.close(detach=self._detach)

    def clear(self) -> None:
        """Let go of everything."""
        for slot in self._all_slots():
            slot.tensor = None
        self._calls.clear()
        self.masks.clear()
        if self._budget is not None:
            self._budget = _Budget(self._budget.max_bytes)

    @property
    def nbytes(self) -> int:
        """Bytes of memory that the values keep alive; memory that several share counts once."""
        return sum(dict(storage_bytes(slot.tensor) for slot in self._all_slots() if slot.tensor is not None).values())

    def _all_slots(self) -> Iterator[Slot]:
        for last in self._last.values():
            yield from last.values()
        for calls in self._calls.values():
            yield from (slot for slots in calls.values() for slot in slots if slot is not None)

    def _count(self, name: str, new: Tensor, old: Tensor | None) -> None:
        if self._budget is not None:
            self._budget.replace(name, new, old)


class _Budget:
    """A running count of the memory that the values keep alive, by storage."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self._users: Counter[int] = Counter()
        self._nbytes = 0

    def replace(self, name: str, new: Tensor, old: Tensor | None) -> None:
        """Count a value, and no longer the one whose place it takes; CapacityError above `max_bytes`."""
        if old is not None:
            storage, nbytes = storage_bytes(old)
            self._users[storage] -= 1
            if not self._users[storage]:
                del self._users[storage]
                self._nbytes -= nbytes
        storage, nbytes = storage_bytes(new)
        self._users[storage] += 1
        self._nbytes += nbytes if self._users[storage] == 1 else 0
        if self._nbytes > self.max_bytes:
            raise CapacityError(self.max_bytes, self._nbytes, name)
