"""What one block has recorded: the values of its layers, by reducer and recorded name."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from itertools import chain, count
from typing import Literal

import torch
from torch import Tensor

from activation_extractor._private_torch import version_of
from activation_extractor._tensors import kept_bytes, memory_of, ordinary
from activation_extractor.activations._forward_state import ForwardState
from activation_extractor.errors import CapacityError, OverwrittenError

Calls = Literal["last", "all", "join"]
Key = tuple[str, str]  # recorded name, reducer's name


class Slot:
    """A recorded value: a copy, or the layer's own tensor with the version that it had.

    Attributes:
        tensor: the value; None before the layer has run.
        version: how often the tensor had been written to when the layer returned it; None when it is a copy.
        turn: when the slot got its first value: a slot that got one later has a larger number.
        stamp: of which forward the value is, see `ForwardState`.
        mask: which positions of a whole activation are real, for who reduces or stores it later; None for all.
    """

    __slots__ = ("mask", "stamp", "tensor", "turn", "version")

    def __init__(self) -> None:
        self.tensor: Tensor | None = None
        self.version: int | None = None
        self.mask: Tensor | None = None
        self.turn, self.stamp = -1, 0

    def read(self, name: str, *, detach: bool, as_recorded: bool = False) -> Tensor:
        """The tensor, an ordinary one unless it is wanted `as_recorded`, and the same one each time.

        Raises:
            OverwrittenError: it is no copy, and was written to since the layer returned it.
            TransformedCallError: it was made inside a transform of torch.func and has no meaning outside of it.
        """
        assert self.tensor is not None
        self.check()
        if self.version is None:
            self.tensor = self.tensor if as_recorded else ordinary(self.tensor)
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


class Recorded:
    """Values by key: the last one of each with ``calls="last"``, else those of all calls in order.

    With `detach`, references let go of their graphs when they are read or the block ends.

    Attributes:
        turns: numbers the slots in the order in which they get their first values.
    """

    def __init__(self, calls: Calls, max_bytes: int | None, state: ForwardState, *, detach: bool = True) -> None:
        self.turns = count()
        # By reducer and name: the slots of all calls, an empty one where a gradient is still to come; or the last one.
        self._calls: dict[str, dict[str, list[Slot]]] = {}
        self._last: dict[str, dict[str, Slot]] = {}
        self._has_all, self._detach, self._state = calls != "last", detach, state
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
        counts = self._state.counts
        for last in () if self._has_all else self._last.values():
            turns.update((it[0], it[1].turn) for it in last.items() if it[1].tensor is not None and counts(it[1].stamp))
        for reducer, calls in self._calls.items():
            turns.update((name, slot.turn) for name in calls for slot in self.slots((name, reducer))[:1])
        return sorted(turns, key=turns.__getitem__)

    def last_stamp(self, name: str) -> int | None:
        """The stamp of the last value that a name has had, whether or not it counts; None where it has had none."""
        last = [slots[name] for slots in self._last.values() if name in slots]
        calls = [slots[name][-1] for slots in self._calls.values() if name in slots]
        return next((slot.stamp for slot in last + calls if slot.turn >= 0), None)

    def stamps(self, name: str) -> set[int]:
        """The stamps of all values of a name; with ``calls="last"`` that of the last one."""
        slots = [slots[name] for slots in self._last.values() if name in slots]
        slots += [slot for calls in self._calls.values() for slot in calls.get(name, ())]
        return {slot.stamp for slot in slots if slot.turn >= 0}

    def put(self, key: Key, tensor: Tensor, stamp: int, version: int | None = None, index: int | None = None) -> Slot:
        """Store the value of call `index`, or of the next one; `version` is that of a reference, None for a copy.

        Raises:
            CapacityError: it does not fit ``max_bytes``.
        """
        slot = self._call_slot(key, index) if self._has_all else self.slot(key)
        if self._budget is not None:
            self._budget.replace(key[0], tensor, slot.tensor)
        if slot.tensor is None:
            slot.turn = next(self.turns)
        slot.tensor, slot.version, slot.stamp, slot.mask = tensor, version, stamp, None
        return slot

    def turn_of(self, name: str) -> int:
        """The number of a name's first value."""
        last = [slots[name].turn for slots in self._last.values() if name in slots]
        return min([*last, *(slots[name][0].turn for slots in self._calls.values() if slots.get(name))])

    def drop(self, names: Iterable[str]) -> None:
        """Let go of the values of some names."""
        for name in names:
            for last in self._last.values():
                if name in last:
                    last[name].tensor = None
            for calls in self._calls.values():
                calls.pop(name, None)

    def take_all(self) -> Iterator[tuple[Key, tuple[Tensor, Tensor | None]]]:
        """The last values of all keys that count, with their masks, which are no longer recorded then."""
        for reducer, last in self._last.items():
            for name, slot in last.items():
                if slot.tensor is not None and self._state.counts(slot.stamp):
                    value = slot.read(name, detach=self._detach)
                    mask, is_reference = slot.mask, slot.version is not None
                    slot.tensor = slot.version = slot.mask = None
                    yield (name, reducer), (value.clone() if is_reference else value, mask)

    def prepend(
        self, key: Key, before: list[tuple[Tensor, Tensor | None]], join: Callable[[list[Tensor]], Tensor]
    ) -> None:
        """Join values, and their masks, with the last one of a key, where it has one that counts."""
        slot = self._last[key[1]][key[0]]
        if slot.tensor is None or not self._state.counts(slot.stamp):
            return
        pieces = [*before, (slot.read(key[0], detach=self._detach), slot.mask)]
        if any(mask is not None for _, mask in pieces):
            slot.mask = torch.cat([_mask_of(value, mask) for value, mask in pieces])
        slot.tensor, slot.version = join([value for value, _ in pieces]), None

    def _call_slot(self, key: Key, index: int | None) -> Slot:
        slots = self._calls.setdefault(key[1], {}).setdefault(key[0], [])
        index = len(slots) if index is None else index
        slots.extend(Slot() for _ in range(index + 1 - len(slots)))
        return slots[index]

    def slots(self, key: Key) -> list[Slot]:
        """The slots of a key's calls whose values count, see `ForwardState.counts`; the last one of each key, or all.

        Of a layer that a forward has run, calls outside of forwards do not count.
        """
        if not self._has_all:
            last = self._last.get(key[1], {}).get(key[0])
            return [last] if last is not None and last.tensor is not None and self._state.counts(last.stamp) else []
        slots = [slot for slot in self._calls.get(key[1], {}).get(key[0], ()) if slot.tensor is not None]
        ran = [slot for slot in slots if slot.stamp > 0]
        return ran or [slot for slot in slots if self._state.counts(slot.stamp)]

    def read_last(self, key: Key, *, as_recorded: bool = False) -> Tensor:
        """The tensor of a key with ``calls="last"``, what `read` gives in a list; see `Slot.read`.

        Raises:
            KeyError: the key has no value that counts.
            OverwrittenError, TransformedCallError: see `Slot.read`.
        """
        last = self._last[key[1]][key[0]]
        if last.tensor is None or not self._state.counts(last.stamp):
            raise KeyError(key)
        return last.read(key[0], detach=self._detach, as_recorded=as_recorded)

    def read(self, key: Key) -> list[Tensor]:
        """The tensors of a key, those of `slots`; ordinary tensors, the same ones each time.

        Raises:
            OverwrittenError, TransformedCallError: see `Slot.read`.
        """
        return [slot.read(key[0], detach=self._detach) for slot in self.slots(key)]

    def check(self) -> None:
        """Raise TransformedCallError for a value that was recorded inside ``vmap`` or another transform."""
        for slot in self._all_slots():
            slot.check()

    def close(self) -> None:
        """The block ends: let go of the graphs that references hold, unless they are wanted."""
        detach, counts = self._detach, self._state.counts
        for slot in self._all_slots():
            slot.close(detach=detach)
            if slot.tensor is not None and not counts(slot.stamp):
                slot.tensor = None

    def clear(self) -> None:
        """Let go of everything."""
        for slot in self._all_slots():
            slot.tensor = None
        self._calls.clear()
        if self._budget is not None:
            self._budget = _Budget(self._budget.max_bytes)

    @property
    def nbytes(self) -> int:
        """Bytes of memory that the values keep alive; memory that several share counts once."""
        return kept_bytes(slot.tensor for slot in self._all_slots() if slot.tensor is not None)

    def _all_slots(self) -> Iterator[Slot]:
        for last in self._last.values():
            yield from last.values()
        for calls in self._calls.values():
            yield from chain.from_iterable(calls.values())


def _mask_of(value: Tensor, mask: Tensor | None) -> Tensor:
    return value.new_ones(value.shape[:2], dtype=torch.bool) if mask is None else mask


class _Budget:
    """A running count of the memory that the values keep alive, by storage."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self._users: Counter[int] = Counter()
        self._nbytes = 0

    def replace(self, name: str, new: Tensor, old: Tensor | None) -> None:
        """Count a value, and no longer the one whose place it takes; CapacityError above `max_bytes`."""
        for storage, nbytes in () if old is None else memory_of(old).items():
            self._users[storage] -= 1
            if not self._users[storage]:
                del self._users[storage]
                self._nbytes -= nbytes
        for storage, nbytes in memory_of(new).items():
            self._users[storage] += 1
            self._nbytes += nbytes if self._users[storage] == 1 else 0
        if self._nbytes > self.max_bytes:
            raise CapacityError(self.max_bytes, self._nbytes, name)
