"""The commonest cases, each in one function: outputs, the last call of several, recorded whole or reduced.

`_taps` and `_recorders` do the same for all cases; ``tests/activations/test_fast_recorders_both_ways.py`` holds the two
together. What is gained stands in ``benchmarks/README.md``: one function that all layers of a block share, bound to one
small object of its layer, takes a captured call from 1.24 to 1.11 times the cost of a bare hook that clones
(``captured_call.inference_mode``), and a reduced one from 1.43 to 1.20 (``pooled_call``). Most of a captured call is
memory that has to be fetched, since a layer of any size has driven it out of the caches: each further function, and
each object that only its own layer uses, costs a tenth of a microsecond. So the three hooks repeat guard and ending.

Two questions that `_taps` asks in each call are put off where a value is recorded whole, which gains another tenth.
Within the model's own forward it is not asked whether backward is recomputing: a forward that runs a backward of its
own records the same value again. And that a value is one of a transform's (``vmap``) is found when it is read or the
block ends.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import MethodType
from typing import Any

from torch import Tensor, nn

from activation_extractor._hooks._context import open_here, unrecorded
from activation_extractor._hooks._copied_modules import ours
from activation_extractor._hooks._forwards import current_cut, cuts
from activation_extractor._hooks._taps import pick_tensor
from activation_extractor._private_torch import backward_task, is_transformed, is_wrapped, version_of
from activation_extractor._tensors import snapshot
from activation_extractor.activations._recorded_values import Recorded, Slot
from activation_extractor.activations._recorders import Shared, mask_source
from activation_extractor.errors import InferenceReferenceError, TransformedCallError
from activation_extractor.layers._selections import Target
from activation_extractor.reducers import Reducer, full
from activation_extractor.reducers._reducers import note_reduction, owns_result, reduce_sequence
from activation_extractor.reducers._sequence_axis import Layout, check_batch_first, sequence_second

Hook = Callable[..., None]
MakeHook = Callable[[Target], Hook]


def fast_hooks(shared: Shared) -> MakeHook | None:
    """What makes a forward hook for a layer's whole output; None where the block's options ask for more."""
    options, recorded = shared.options, shared.recorded
    if options.calls != "last" or not options.detach or options.to is not None or options.max_bytes is not None:
        return None
    if full not in options.reducers.values():
        return partial(_bound_to_layer, _reducing_hook(shared), shared)
    if len(options.reducers) > 1 or options.has_sink:
        return None
    record = _copying_hook(shared) if options.copy else _referring_hook(shared)
    return partial(_bound_to_slot, record, recorded, next(iter(options.reducers)))


class _LayerSlot(Slot):
    """What a layer's hook has of its own when it records a whole value: where, and whose it is."""

    __slots__ = ("layer", "module", "target")

    def __init__(self, target: Target) -> None:
        super().__init__()
        self.target, self.layer = target, target.layer
        self.module: nn.Module | None = target.module

    def check(self) -> None:
        if self.tensor is not None and is_wrapped(self.tensor):
            raise TransformedCallError(self.layer)

    def close(self, *, detach: bool) -> None:
        if self.version is not None and self.tensor is not None and not is_wrapped(self.tensor):
            super().close(detach=detach)  # detaching a wrapped value would unwrap it, and `check` would let it pass
        if self.module is not None:  # what is recorded outlives the block, and must not keep the model
            self.module = None
            del self.target


class _ReducedLayer:
    """What a layer's hook has of its own when it reduces: how, where the results go, and whose they are."""

    __slots__ = ("is_usual", "layout", "module", "parts", "stamp", "target")

    def __init__(self, target: Target, layout: Layout, parts: list[tuple[Slot, str, Reducer, bool]]) -> None:
        self.target, self.module, self.parts, self.stamp = target, target.module, parts, 0
        self.layout, self.is_usual = layout, layout.is_usual


def _bound_to_slot(record: Hook, recorded: Recorded, reducer: str, target: Target) -> Hook:
    slot = _LayerSlot(target)
    recorded.add(slot, (target.name, reducer))
    return MethodType(record, slot)


def _bound_to_layer(record: Hook, shared: Shared, target: Target) -> Hook:
    slot_of, reducers = shared.recorded.slot, shared.options.reducers
    parts = [(slot_of((target.name, name)), name, it, owns_result(it)) for name, it in reducers.items()]
    return MethodType(record, _ReducedLayer(target, shared.layouts[target.name], parts))


def _copying_hook(shared: Shared) -> Hook:
    state, usual, turns = shared.state, Tensor, shared.recorded.turns

    @ours
    def record_copy(slot: _LayerSlot, called: nn.Module, args: Any, output: Any) -> None:
        stamp = state.stamp
        is_usual = state.is_settled and called is slot.module and state in open_here()
        if not is_usual and not state.admits(called, slot.module, slot.layer, slot.stamp):
            return
        if slot.tensor is None:
            slot.turn = next(turns)
        if type(output) is usual:
            # What is copied at once needs no version counter: `data` does what `detach()` does, at half the price.
            slot.tensor = output.data.clone() if output.requires_grad else output.clone()
        else:
            slot.tensor = snapshot(pick_tensor(slot.target, state, output))
        if slot.stamp != stamp:
            slot.stamp = stamp
        else:
            state.ran_again(slot.target)
        if cuts and (cut := current_cut()) is not None:
            cut.ran(state, slot.target.name)

    return record_copy


def _referring_hook(shared: Shared) -> Hook:
    """A hook that keeps references; they hold their graphs until they are read or the block ends."""
    state, usual, turns = shared.state, Tensor, shared.recorded.turns

    @ours
    def record_reference(slot: _LayerSlot, called: nn.Module, args: Any, output: Any) -> None:
        stamp = state.stamp
        is_usual = state.is_settled and called is slot.module and state in open_here()
        if not is_usual and not state.admits(called, slot.module, slot.layer, slot.stamp):
            return
        if slot.tensor is None:
            slot.turn = next(turns)
        if type(output) is not usual:
            output = pick_tensor(slot.target, state, output)
        try:
            slot.version = version_of(output)
        except RuntimeError:  # an inference tensor has none
            raise InferenceReferenceError from None
        slot.tensor = output
        if slot.stamp != stamp:
            slot.stamp = stamp
        else:
            state.ran_again(slot.target)
        if cuts and (cut := current_cut()) is not None:
            cut.ran(state, slot.target.name)

    return record_reference


def _reducing_hook(shared: Shared) -> Hook:  # noqa: C901 - one function on purpose, see above
    options, state, recorded, masks, _ = shared
    usual, turns, has_sink = Tensor, recorded.turns, options.has_sink
    mask_for = mask_source(options, masks)

    def begin(slot: Slot, own: _ReducedLayer, sequence: Tensor) -> None:
        slot.turn = next(turns)
        if not has_sink:  # whose steps are compared with the batch
            check_batch_first(own.target.layer, sequence, own.layout, state.batch)

    @ours
    def record_reduced(own: _ReducedLayer, called: nn.Module, args: Any, output: Any) -> None:  # noqa: C901
        stamp, target = state.stamp, own.target
        is_usual = state.is_settled and called is own.module and state in open_here()
        if not is_usual and not state.admits(called, own.module, target.layer, own.stamp):
            return
        if backward_task() not in state.backwards and state.misses(target.layer):
            return
        if is_transformed():
            raise TransformedCallError(target.layer)
        if has_sink:
            state.check_step(target)
        if type(output) is not usual:
            output = pick_tensor(target, state, output)
        if output.requires_grad:
            output = output.data  # nobody writes to it, so that it needs no version counter
        sequence = output if own.is_usual and output.dim() == 3 else sequence_second(target.layer, output, own.layout)
        is_unmasked = state.is_unmasked
        if is_unmasked is None:
            call = state.call
            is_unmasked = state.is_unmasked = call is not None and masks.has_none(call)
        mask = None if is_unmasked else mask_for(target, sequence, state.call_of(target.layer))
        for slot, name, reducer, is_ours in own.parts:
            if is_ours:
                try:
                    result = reducer(sequence, mask)
                except Exception as error:
                    note_reduction(error, target.layer, name, sequence)
                    raise
            else:
                result = unrecorded(reduce_sequence, target.layer, name, reducer, sequence, mask).detach()
            if slot.tensor is None:
                begin(slot, own, sequence)
            slot.tensor, slot.stamp = result, stamp
        if own.stamp != stamp:
            own.stamp = stamp
        else:
            state.ran_again(target)
        if cuts and (cut := current_cut()) is not None:
            cut.ran(state, target.name)

    return record_reduced
