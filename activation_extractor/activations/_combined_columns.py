"""Reading columns that several layers are combined to."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from operator import is_not
from typing import Any

from torch import Tensor

from activation_extractor._tensors import ordinary
from activation_extractor.activations._combinations import (
    WHOLE,
    axis_of,
    check_calls,
    combine,
    comes_first,
    mask_of_all,
)
from activation_extractor.activations._options import Options
from activation_extractor.activations._recorded_values import Key, Recorded
from activation_extractor.layers._selections import Target
from activation_extractor.reducers import full
from activation_extractor.reducers._reducers import reduce_sequence
from activation_extractor.reducers._sequence_axis import Layout, sequence_second

Masks = Sequence["Tensor | None"]


class CombinedColumns:
    """The combined columns of a block: made of what their members hold when they are read, until they are settled.

    `joined` is a weak reference to the method that gives the calls of a member as one sequence, and its mask: a strong
    one would keep values until garbage is collected.

    Attributes:
        members: by the name of a combined column, its members in the order of the selection.
        parts: the columns' names, by the names of the members.
    """

    def __init__(
        self,
        targets: Iterable[Target],
        options: Options,
        recorded: Recorded,
        layouts: Mapping[str, Layout],
        joined: Callable[[], Any],
    ) -> None:
        self.members: dict[str, list[Target]] = {}
        for target in targets:
            if target.part_of is not None:
                self.members.setdefault(target.part_of.name, []).append(target)
        self.parts = {member.name: name for name, members in self.members.items() for member in members}
        self._options, self._recorded, self._layouts, self._joined = options, recorded, layouts, joined
        self._made: dict[Key, tuple[list[Tensor], list[Tensor]]] = {}  # what was read, with what it was made of

    def __contains__(self, name: object) -> bool:
        """Whether a name is that of a combined column, or of a member, which has no value of its own."""
        return name in self.members or name in self.parts

    def names(self, recorded: list[str]) -> list[str]:
        """Recorded names, with that of a combined column in place of its members', where the last of them stands."""
        if not self.members:
            return recorded
        names = []
        missing = {name: {member.name for member in members} for name, members in self.members.items()}
        for name in recorded:
            column = self.parts.get(name)
            if column is None:
                names.append(name)
                continue
            missing[column].discard(name)
            if not missing[column]:
                names.append(column)
        return names

    def read(self, key: Key) -> Tensor | list[Tensor]:
        """The value of a column, the same one each time; a list with ``calls="all"``.

        Raises:
            KeyError: a member has no value; or the key is a member's.
            CombinationError: the members are not alike.
        """
        if key[0] in self.parts or key[1] not in self._options.reducers:
            raise KeyError(key)
        if not (values := self._recorded.read(key)):
            parts = [self._recorded.read((member.name, self._stored(key))) for member in self.members[key[0]]]
            held = [part for several in parts for part in several]
            known, values = self._made.get(key, ([], []))
            if len(known) != len(held) or any(map(is_not, known, held)) or not held:
                values = self._combine(key, parts)
                self._made[key] = held, values
        return values if self._options.calls == "all" else values[0]

    def masks(self, key: Key) -> Masks:
        """The masks of a column's calls: of what is whole, or is reduced once it is combined; None for others."""
        if slots := self._recorded.slots(key):
            return [slot.mask for slot in slots]
        members = self.members[key[0]]
        if self._options.calls == "join":
            masks: list[Masks] = [[self._joined()(member.name)[1]] for member in members]
        else:
            stored = self._stored(key)
            masks = [[slot.mask for slot in self._recorded.slots((member.name, stored))] for member in members]
        return [mask_of_all(members, some) for some in zip(*masks, strict=True)]

    def settle(self) -> None:
        """No more values come in this step: hold the columns, and let go of what they were made of.

        What is joined, is kept as a reference, or counts for ``max_bytes`` goes on being combined when it is read.
        """
        options, recorded = self._options, self._recorded
        if not self.members or options.calls == "join" or not options.copy or options.max_bytes is not None:
            return
        ran = {*recorded.names}
        for name, members in self.members.items():
            if not {member.name for member in members} <= ran:
                continue
            columns = {
                key: (self.read(key), self.masks(key)) for key in ((name, reducer) for reducer in options.reducers)
            }
            turn, stamp = max(recorded.turn_of(it.name) for it in members), recorded.last_stamp(members[-1].name) or 0
            recorded.drop(member.name for member in members)
            for key, (value, masks) in columns.items():
                for index, call in enumerate(value if isinstance(value, list) else [value]):
                    slot = recorded.put(key, call, stamp, index=index)
                    slot.turn, slot.mask = turn, masks[index]
        self._made.clear()

    def clear(self) -> None:
        """Let go of everything."""
        self._made.clear()

    def _stored(self, key: Key) -> str:
        """Under which reducer's name members hold what a reducer's value is made of."""
        if self._options.calls == "join":
            return "full"
        return key[1] if self._is_reduced_first(key) else WHOLE

    def _is_reduced_first(self, key: Key) -> bool:
        """Whether members are reduced when they run, before they are combined."""
        combination = self.members[key[0]][0].part_of
        assert combination is not None
        return self._options.calls != "join" and comes_first(self._options.reducers[key[1]], combination)

    def _combine(self, key: Key, parts: Sequence[Sequence[Tensor]]) -> list[Tensor]:
        """The values of a column in each call, from the members' values in all calls."""
        members = self.members[key[0]]
        if not all(parts):
            raise KeyError(key)
        if self._options.calls == "join":
            parts = [[self._joined()(member.name)[0]] for member in members]
        check_calls(key[0], members, parts)
        reducer, layouts = self._options.reducers[key[1]], [self._layouts[member.name] for member in members]
        is_reduced = self._is_reduced_first(key)
        combined = []
        for index, values in enumerate(zip(*parts, strict=True)):
            described = zip(members, values, layouts, strict=True)
            axes = [axis_of(member, value, layout, is_reduced=is_reduced) for member, value, layout in described]
            value = ordinary(combine(members, values, axes))
            if not is_reduced and reducer is not full:
                sequence, mask = sequence_second(members[0].layer, value, layouts[0]), self.masks(key)[index]
                value = ordinary(reduce_sequence(key[0], key[1], reducer, sequence, mask))
                value = value.detach() if self._options.detach else value
            combined.append(value)
        return combined
