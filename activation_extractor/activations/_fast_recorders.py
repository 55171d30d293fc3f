"""The commonest cases, each in one function: outputs, the last call of several, kept whole or reduced.

Everything here is said again, more generally, in `_taps` and `_keepers`. A captured call costs a few microseconds, and
most of that is memory that has to be fetched, since a layer of any size has driven it out of the caches: each function
that a call goes through and each object that only its own layer uses costs a tenth of one. So a hook here is a function
that all layers of a block share, bound to one small object of its layer.

Two questions that `_taps` asks in each call are put off where a value is kept whole. Within the model's own forward it
is not asked whether backward is recomputing: one that runs a backward of its own would record the same value again.
And that a value is one of a transform's (``vmap``) is seen when it is read or the block ends.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import MethodType
from typing import Any

from torch import Tensor, nn

from activation_extractor._hooks._context import open_here
from activation_extractor._hooks._copies import ours
from activation_extractor._hooks._forwards import current_cut, cuts
from activation_extractor._hooks._taps import picker
from activation_extractor._private_torch import backward_task, is_transformed, is_wrapped, version_of
from activation_extractor._tensors import snapshot
from activation_extractor.activations._options import Options
from activation_extractor.activations._recorded import Entry, Kept
from activation_extractor.activations._recorders import Place
from activation_extractor.errors import InferenceReferenceError, TransformedCallError
from activation_extractor.layers._selections import Target
from activation_extractor.reducers import Reducer, full
from activation_extractor.reducers._reducers import note_reduction, own_result, owns_result
from activation_extractor.reducers._sequence_axis import sequence_second

Hook = Callable[..., None]
MakeHook = Callable[[Target], Hook]


def plain_hooks(options: Options, place: Place) -> MakeHook | None:
    """What makes a forward hook for a target that `is_plain`; None where these options ask for more."""
    if options.calls != "last" or not options.detach or options.to is not None or options.max_bytes is not None:
        return None
    if full not in options.reducers.values():
        return partial(_bound_to_parts, _reducing_hook(place), place)
    if len(options.reducers) > 1 or options.has_sink:
        return None
    record = _copying_hook(place) if options.copy else _referring_hook(place)
    return partial(_bound_to_slot, record, place.kept, next(iter(options.reducers)))


def is_plain(target: Target) -> bool:
    """Whether a target can be recorded by a hook of `plain_hooks`."""
    return target.side == "output" and target.select is None


class _Slot(Entry):
    """What a layer's hook has of its own when it keeps one value: where, of which forward, and whose it is."""

    __slots__ = ("forward", "layer", "module", "target")

    def __init__(self, target: Target) -> None:
        super().__init__()
        self.forward = -1
        self.target, self.layer = target, target.layer
        self.module: nn.Module | None = target.module

    def check(self) -> None:
        if self.tensor is not None and is_wrapped(self.tensor):
            raise TransformedCallError(self.layer)

    def close(self, *, detach: bool) -> None:
        if detach and self.version is not None and self.tensor is not None and not is_wrapped(self.tensor):
            self.detach()  # which would also take off what a transform has wrapped around a value, unseen
        if self.module is not None:  # what is kept outlives the block, and must not keep the model
            self.module = None
            del self.target

    def pick(self, output: Any) -> Tensor:
        """The tensor to record in what the layer returned."""
        return picker(self.target)(output)


class _Reduced:
    """What a layer's hook has of its own when it reduces: how, where the results are kept, and whose they are."""

    __slots__ = ("forward", "module", "parts", "target")

    def __init__(self, target: Target, parts: list[tuple[Entry, str, Reducer, bool]]) -> None:
        self.target, self.module, self.parts, self.forward = target, target.module, parts, -1


def _bound_to_slot(record: Hook, kept: Kept, reducer: str, target: Target) -> Hook:
    slot = _Slot(target)
    kept.keep_in(slot, (target.name, reducer))
    return MethodType(record, slot)


def _bound_to_parts(record: Hook, place: Place, target: Target) -> Hook:
    entry, reducers = place.kept.entry, place.options.reducers
    parts = [(entry((target.name, name)), name, one, owns_result(one)) for name, one in reducers.items()]
    return MethodType(record, _Reduced(target, parts))


def _copying_hook(place: Place) -> Hook:
    plain, turns = Tensor, place.kept.turns

    @ours
    def record_copy(slot: _Slot, called: nn.Module, args: Any, output: Any) -> None:
        if place not in open_here() or called is not slot.module or (place.call is None and backward_task() != -1):
            return
        if slot.tensor is None:
            slot.turn = next(turns)
        if type(output) is plain:
            # What is copied at once needs no version counter: `data` does what `detach()` does, at half the price.
            slot.tensor = output.data.clone() if output.requires_grad else output.clone()
        else:
            slot.tensor = snapshot(slot.pick(output))
        if slot.forward != (number := place.forward_number):
            slot.forward = number
        else:
            place.ran_again(slot.target)
        if cuts and (cut := current_cut()) is not None:
            cut.ran(place, slot.target.name)

    return record_copy


def _referring_hook(place: Place) -> Hook:
    """A hook that keeps references; these hold their graphs until `Kept` reads them, or until the block ends."""
    plain, turns = Tensor, place.kept.turns

    @ours
    def record_reference(slot: _Slot, called: nn.Module, args: Any, output: Any) -> None:
        if place not in open_here() or called is not slot.module or (place.call is None and backward_task() != -1):
            return
        if slot.tensor is None:
            slot.turn = next(turns)
        if type(output) is not plain:
            output = slot.pick(output)
        try:
            slot.version = version_of(output)
        except RuntimeError:  # an inference tensor has none
            raise InferenceReferenceError from None
        slot.tensor = output
        if slot.forward != (number := place.forward_number):
            slot.forward = number
        else:
            place.ran_again(slot.target)
        if cuts and (cut := current_cut()) is not None:
            cut.ran(place, slot.target.name)

    return record_reference


def _reducing_hook(place: Place) -> Hook:  # noqa: C901 - one function on purpose, see above
    options, masks, plain, turns = place.options, place.masks, Tensor, place.kept.turns
    axis, has_sink, is_usual = options.sequence_axis, options.has_sink, options.sequence_axis in (None, 1)
    # Our own reducers do not write to what they are given: `data` will do for them.
    are_ours = all(map(owns_result, options.reducers.values()))

    @ours
    def record_reduced(slot: _Reduced, called: nn.Module, args: Any, output: Any) -> None:  # noqa: C901
        if place not in open_here() or called is not slot.module or backward_task() != -1:
            return
        target = slot.target
        if is_transformed():
            raise TransformedCallError(target.layer)
        if has_sink:
            place.check_step(target)
        if type(output) is not plain:
            output = picker(target)(output)
        if output.requires_grad:
            output = output.data if are_ours else output.detach()
        sequence = output if is_usual and output.dim() == 3 else sequence_second(target.layer, output, axis)
        is_unmasked = place.is_unmasked
        if is_unmasked is None:
            is_unmasked = place.look_for_masks()
        mask = None if is_unmasked else masks.for_layer(target.layer, sequence, place.call)
        for entry, name, reducer, is_ours in slot.parts:
            try:
                result = reducer(sequence, mask)
            except Exception as error:
                note_reduction(error, target.layer, name, sequence)
                raise
            if entry.tensor is None:
                entry.turn = next(turns)
            entry.tensor = result if is_ours else own_result(target.layer, name, sequence, result)
        if slot.forward != (number := place.forward_number):
            slot.forward = number
        else:
            place.ran_again(target)
        if cuts and (cut := current_cut()) is not None:
            cut.ran(place, target.name)

    return record_reduced
