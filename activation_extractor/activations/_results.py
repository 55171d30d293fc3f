"""Reading what a block has recorded: one value a key, joined calls, and a step's columns for a sink."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from operator import is_not
from typing import Any
from weakref import WeakMethod

import torch
from torch import Tensor

from activation_extractor._format._stored_rows import Ragged
from activation_extractor._streams import hold
from activation_extractor._tensors import as_dense, ordinary, refused_kind, rows_of
from activation_extractor.activations._combined_columns import CombinedColumns
from activation_extractor.activations._forward_state import ForwardState
from activation_extractor.activations._microbatches import Microbatches
from activation_extractor.activations._options import Options
from activation_extractor.activations._recorded_values import Key, Recorded
from activation_extractor.errors import StepError, TensorKindError
from activation_extractor.layers._selections import Target
from activation_extractor.reducers import full
from activation_extractor.reducers._reducers import reduce_sequence
from activation_extractor.reducers._sequence_axis import USUAL, Layout, has_sequence, sequence_axes, sequence_second

_NOTHING: Any = None
_NONE_COMBINED = CombinedColumns((), _NOTHING, _NOTHING, {}, _NOTHING)


class Results:
    """The values of one block, in the form in which they are handed out.

    Attributes:
        only_reducer: the name of the reducer, or "" where there are several.
        cleared: by recorded name, the stamp of the last value that was let go in this step.
        picked_of: by recorded name, of how many tensors of a structure the recorded one is the first.
        microbatches: what a pipeline's stage has computed of the batch before; None where there is no pipeline.
        parts: by recorded name, which part of a value that is spread over processes is recorded in place of it.
    """

    def __init__(
        self,
        targets: Sequence[Target],
        options: Options,
        recorded: Recorded,
        state: ForwardState,
        layouts: Mapping[str, Layout],
        *,
        is_combined: bool,
    ) -> None:
        self._layers, self._layouts = {target.name: target.layer for target in targets}, layouts
        self._combined = _NONE_COMBINED
        if is_combined:
            self._combined = CombinedColumns(targets, options, recorded, layouts, WeakMethod(self._joined_whole))
            members = self._combined.members
            self._layers |= {name: name for name in members}
            self._layouts = {**layouts, **{name: layouts[first.name] for name, (first, *_) in members.items()}}
        self._options, self._recorded, self._state = options, recorded, state
        self._joined: dict[Key, tuple[list[Tensor], Tensor]] = {}
        self.picked_of, self.parts = state.picked_of, state.parts
        self.cleared: dict[str, int] = {}
        self.microbatches: Microbatches | None = None
        self.only_reducer = next(iter(options.reducers)) if len(options.reducers) == 1 else ""

    @property
    def names(self) -> list[str]:
        """The recorded names that have a value, in the order in which the layers ran."""
        return self._combined.names(self._recorded.names)

    @property
    def recorded_names(self) -> list[str]:
        """The names of what is recorded: of a column that is combined, those of its members until it is settled."""
        return self._recorded.names

    def last_stamp(self, name: str) -> int | None:
        """The stamp of the last value that a layer has had, whether or not it counts; None where it has had none."""
        return self._recorded.last_stamp(name)

    def stamps(self, name: str) -> set[int]:
        """The stamps of all values of a name; with ``calls="last"`` that of the last one."""
        return self._recorded.stamps(name)

    @property
    def reducers(self) -> list[str]:
        """The reducers' names."""
        return list(self._options.reducers)

    @property
    def nbytes(self) -> int:
        """Bytes of memory that the values keep alive."""
        return self._recorded.nbytes

    def has(self, key: Key) -> bool:
        """Whether a key has a value."""
        if key[0] in self._combined:
            return key[1] in self._options.reducers and key[0] in self.names
        stored = (key[0], "full") if self._options.calls == "join" else key
        return key[1] in self._options.reducers and bool(self._recorded.slots(stored))

    def read(self, key: Key, *, as_recorded: bool = False) -> Tensor | list[Tensor]:
        """The value of a key; a list with ``calls='all'``. With `as_recorded` it may be a tensor of inference mode.

        Raises:
            KeyError: it has no value.
            OverwrittenError, TransformedCallError: see `Slot.read`.
        """
        self._state.was_read = True
        if self.microbatches is not None:
            self.microbatches.join()
        if self._combined.members and key[0] in self._combined:
            return self._combined.read(key)
        if self._options.calls == "last":
            return self._recorded.read_last(key, as_recorded=as_recorded)
        if self._options.calls == "all":
            values = self._recorded.read(key)
            if not values:
                raise KeyError(key)
            return values
        return self._read_joined(key)

    def _read_joined(self, key: Key) -> Tensor:
        """The calls of a layer as one, the same tensor each time; KeyError where it has no value."""
        parts = self._recorded.read((key[0], "full"))
        if not parts or key[1] not in self._options.reducers:
            raise KeyError(key)
        known, joined = self._joined.get(key, ([], None))
        if joined is None or len(known) != len(parts) or any(map(is_not, known, parts)):
            layer, layout = self._layers[key[0]], self._layouts.get(key[0], USUAL)
            joined, mask = self._joined_whole(key[0])
            if (reducer := self._options.reducers[key[1]]) is not full:
                sequence = sequence_second(layer, joined, layout)
                joined = ordinary(reduce_sequence(layer, key[1], reducer, sequence, mask))
                joined = joined.detach() if self._options.detach else joined
            self._joined[key] = parts, joined
        elif len(parts) > 1:
            self._state.check_order(self._layers[key[0]])
        return joined

    def _joined_whole(self, name: str) -> tuple[Tensor, Tensor | None]:
        """The calls of a layer as one sequence, and its mask."""
        parts = self._recorded.read((name, "full"))
        if len(parts) > 1:
            self._state.check_order(self._layers[name])
        return self._concatenated(name, parts, self._layouts.get(name, USUAL)), self._joined_mask(name, parts)

    def _concatenated(self, name: str, parts: list[Tensor], layout: Layout) -> Tensor:
        """The calls of a layer as one sequence, dense; nested rows one behind another, without their padding."""
        nested = next((part for part in parts if part.is_nested), None)
        if nested is None:
            axis = sequence_axes(self._layers[name], parts[0], layout)[0]
            _check_shapes(self._layers[name], parts, axis)
            return torch.cat(list(map(as_dense, parts)), axis)
        slots = self._recorded.slots((name, "full"))
        rows = [_real_rows(self._layers[name], part, slot.mask) for part, slot in zip(parts, slots, strict=True)]
        return torch.nested.as_nested_tensor([torch.cat(row) for row in zip(*rows, strict=True)], layout=nested.layout)

    def hand_out(self, key: Key) -> Tensor | list[Tensor]:
        """The value of a key for the user: a copy where a sink owns the original."""
        value = self.read(key)
        if not self._options.has_sink:
            return value
        return [call.clone() for call in value] if isinstance(value, list) else value.clone()

    def columns(self, *, as_recorded: bool = False) -> dict[Key, Tensor | Ragged]:
        """What a step hands to a sink: padding left out of whole activations, a column for each call of 'all'."""
        columns: dict[Key, Tensor | Ragged] = {}
        real = _RealPositions()
        for name in self.names:
            for reducer in self._options.reducers:
                value = self.read((name, reducer), as_recorded=as_recorded)
                if isinstance(value, list):
                    for index, call in enumerate(value):
                        columns[f"{name}#{index}", reducer] = self._packed(name, reducer, call, index, real)
                else:
                    columns[name, reducer] = self._packed(name, reducer, value, 0, real)
        self._combined.settle()
        return columns

    def settle(self) -> None:
        """The last value has come: hold what is combined, and let go of what it was combined from."""
        self._combined.settle()

    def clear(self) -> None:
        """Let go of everything, and remember what that was."""
        self.cleared.update((name, self.last_stamp(name) or 0) for name in self.recorded_names)
        self._let_go()

    def begin_step(self) -> None:
        """Begin with nothing."""
        self.cleared.clear()
        self._let_go()

    def _let_go(self) -> None:
        self._state.was_read = True
        self._state.left_out.clear()
        self._recorded.clear()
        if self.microbatches is not None:
            self.microbatches.forget()
        self._joined.clear()
        self._combined.clear()

    def _joined_mask(self, name: str, parts: list[Tensor]) -> Tensor | None:
        masks = [slot.mask for slot in self._recorded.slots((name, "full"))]
        if all(mask is None for mask in masks) or any(part.is_nested for part in parts):
            return None
        whole = []
        for part, mask in zip(parts, masks, strict=True):
            sequence = sequence_second(self._layers[name], part, self._layouts.get(name, USUAL))
            whole.append(sequence.new_ones(sequence.shape[:2], dtype=torch.bool) if mask is None else mask)
        return torch.cat(whole, 1)

    def _packed(self, name: str, reducer: str, value: Tensor, index: int, real: _RealPositions) -> Tensor | Ragged:
        try:
            return self._as_rows(name, reducer, value, index, real)
        except Exception as error:
            if (kind := refused_kind(error, value)) is not None:
                raise TensorKindError(*kind, self._layers[name], "in a step of a sink") from error
            raise

    def _as_rows(self, name: str, reducer: str, value: Tensor, index: int, real: _RealPositions) -> Tensor | Ragged:
        layout, value = self._layouts.get(name, USUAL), as_dense(value)
        is_whole = self._options.reducers[reducer] is full
        if not value.is_nested and not (is_whole and has_sequence(value, layout)):
            return value
        sequence = sequence_second(self._layers[name], value, layout) if is_whole else value
        if name in self._combined:
            mask = self._combined.masks((name, reducer))[index]
        elif self._options.calls == "join":
            mask = self._joined_mask(name, self._recorded.read((name, "full")))
        else:
            mask = self._recorded.slots((name, reducer))[index].mask
        if value.is_nested:
            rows = _real_rows(self._layers[name], value, mask)
            hold(rows)
            return Ragged(torch.cat(rows), torch.tensor(list(map(len, rows)), dtype=torch.int64))
        if mask is None:
            lengths = torch.full((sequence.shape[0],), sequence.shape[1], dtype=torch.int64)
            return Ragged(sequence.flatten(0, 1), lengths)
        return real.of(sequence, mask)


def _check_shapes(layer: str, parts: list[Tensor], axis: int) -> None:
    """Raise StepError for parts that differ in more than the length of their sequence."""
    others = [(*part.shape[:axis], *part.shape[axis + 1 :]) for part in parts]
    other = next((part for part, rest in zip(parts, others, strict=True) if rest != others[0]), None)
    if other is not None:
        got = f"shapes {tuple(parts[0].shape)} and {tuple(other.shape)} of {layer!r}"
        advice = "Pass calls='all', or enter a block for each batch."
        raise StepError("give calls that go on from each other when they are joined", got, advice)


def _real_rows(layer: str, value: Tensor, mask: Tensor | None) -> list[Tensor]:
    """The rows of a nested tensor, or of another one, without the positions that a mask leaves out."""
    rows = rows_of(value, layer) if value.is_nested else list(as_dense(value).unbind())
    return rows if mask is None else [row[is_real[: len(row)]] for row, is_real in zip(rows, mask, strict=True)]


class _RealPositions:
    """Leaves padding out. Layers share their mask, and reading it makes an accelerator wait: it is read once."""

    def __init__(self) -> None:
        # By the id of a mask: the mask, which keeps its id from being used again; where the real positions are in it
        # when it is flattened, None for everywhere; and how many each row has, on the CPU.
        self._known: dict[int, tuple[Tensor, Tensor | None, Tensor]] = {}

    def of(self, sequence: Tensor, mask: Tensor) -> Ragged:
        """The real positions of ``(batch, seq, *features)``: a view when all of them are."""
        if id(mask) not in self._known:
            lengths = mask.sum(1).cpu()
            is_whole = bool((lengths == mask.shape[1]).all())
            self._known[id(mask)] = mask, None if is_whole else mask.flatten().nonzero().squeeze(1), lengths
        _, positions, lengths = self._known[id(mask)]
        hold([sequence, mask])  # the step may end on another stream than the forward ran on
        flat = sequence.flatten(0, 1)
        return Ragged(flat if positions is None else flat.index_select(0, positions), lengths)
