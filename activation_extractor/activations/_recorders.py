"""What happens to a recorded tensor: copied or reduced where it lives, then stored in the block's memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from activation_extractor._hooks._context import outermost_function, unrecorded
from activation_extractor._hooks._forwards import current_cut
from activation_extractor._hooks._taps import Record
from activation_extractor._private_torch import version_of
from activation_extractor._tensors import moved
from activation_extractor.activations._combinations import WHOLE, recorded_reducers
from activation_extractor.activations._forward_state import ForwardState
from activation_extractor.activations._options import Options
from activation_extractor.activations._recorded_values import Recorded
from activation_extractor.errors import InferenceReferenceError, StepError
from activation_extractor.layers._selections import Target
from activation_extractor.reducers import full
from activation_extractor.reducers._calls import CallArguments
from activation_extractor.reducers._masks import Masks
from activation_extractor.reducers._reducers import reduce_sequence
from activation_extractor.reducers._sequence_axis import USUAL, Layout, check_batch_first, has_sequence, sequence_second


class Call(NamedTuple):
    """A call of a layer: what the call around it was given, the stamp, and its number; None for the next one."""

    arguments: CallArguments | None
    stamp: int
    number: int | None = None


RecordCall = Callable[[Tensor, Call], None]


class Shared(NamedTuple):
    """What all recorders of a block share: how to record, the forward under way, where values go, masks and layouts."""

    options: Options
    state: ForwardState
    recorded: Recorded
    masks: Masks
    layouts: Mapping[str, Layout]


def mask_source(options: Options, masks: Masks) -> Callable[..., Tensor | None]:
    """What finds a layer's mask; no block records what a user's callable calls meanwhile."""
    return partial(unrecorded, masks.for_layer) if callable(options.mask) else masks.for_layer


def recorder(target: Target, shared: Shared) -> Record:
    """What records the outputs or inputs of one target, call by call."""
    state, record_call = shared.state, _call_recorder(target, shared)
    joined = _JoinedCalls(target, shared) if shared.options.calls == "join" else None
    stamp = 0

    def record(value: Tensor) -> None:
        nonlocal stamp
        if state.call is None and not state.takes_call(target.layer, stamp):
            return
        state.check_step(target)
        if stamp:
            state.check_order(target.layer)
        if joined is not None and state.call is not None:
            joined.check(value, state.call)
        record_call(value, Call(state.call_of(target.layer), state.stamp))
        if stamp == state.stamp:
            state.ran_again(target)
        stamp = state.stamp
        if (cut := current_cut()) is not None:
            cut.ran(state, target.name)

    return record


class _JoinedCalls:
    """Whether the calls of a layer in one forward are parts of the sequence, or of the batch."""

    def __init__(self, target: Target, shared: Shared) -> None:
        layout = shared.layouts.get(target.name, USUAL)
        self._layer, self._is_time_first = target.layer, (layout.of_three if layout.axis is None else layout.axis) == 0
        self._call: CallArguments | None = None
        self._rows = 0

    def check(self, value: Tensor, call: CallArguments) -> None:
        """Refuse calls whose rows together are those of the batch.

        Raises:
            StepError: they are.
        """
        axis = int(self._is_time_first and value.dim() == 3 and not value.is_nested)
        rows = value.size(axis) if value.dim() else 1
        self._rows = rows + (self._rows if call is self._call else 0)
        self._call = call
        if rows < self._rows and self._rows in call.rows():
            got = f"{self._layer!r} on parts of a batch of {self._rows} rows"
            advice = f"Pass calls='all', and put them together with torch.cat(acts[{self._layer!r}])."
            raise StepError("hold whole batches when calls are joined", got, advice)


class GradientRecorder:
    """Records the gradients of one target, each as that of the call that it belongs to.

    Backward visits the calls from the last to the first. Where a checkpoint ran a call without a graph and runs it
    again in backward, the gradient belongs to the last call of this checkpoint that still lacks one.
    """

    def __init__(self, target: Target, shared: Shared) -> None:
        self._calls: list[Call] = []
        self._lacking: set[int] = set()
        self._checkpoints: dict[int, int | None] = {}  # by call, of those without a graph
        self._target, self._state = target, shared.state
        self._records_last = shared.options.calls == "last"
        self._record_call = _call_recorder(target, shared)

    def expect(self, is_recomputed: bool) -> Record | None:
        """What records the gradient of the call that is under way; None where the call does not count."""
        if is_recomputed:
            return partial(self._record_recomputed, outermost_function())
        state, calls, index = self._state, self._calls, len(self._calls)
        if state.call is None and not state.takes_call(self._target.layer, self.last_stamp or 0):
            return None
        state.check_step(self._target)
        calls.append(Call(state.call_of(self._target.layer), state.stamp, index))
        self._lacking.add(index)
        if not torch.is_grad_enabled():
            self._checkpoints[index] = outermost_function()

        def record(gradient: Tensor) -> None:
            if calls is self._calls:  # still the same step
                self._record(index, gradient)

        return record

    def forget(self) -> None:
        """Begin a new step."""
        self._calls, self._lacking, self._checkpoints = [], set(), {}

    @property
    def last_stamp(self) -> int | None:
        """The stamp of the last call; None where the layer has not run."""
        return self._calls[-1].stamp if self._calls else None

    @property
    def stamps(self) -> set[int]:
        """The stamps of all calls."""
        return {call.stamp for call in self._calls}

    @property
    def has_run(self) -> bool:
        """Whether the layer has run in a call that counts."""
        return any(self._state.counts(call.stamp) for call in self._calls)

    @property
    def lacks(self) -> bool:
        """Whether a gradient that is wanted has not come."""
        calls, lacking = self._calls, self._lacking
        if self._records_last:
            return len(calls) - 1 in lacking
        has_forward = any(call.stamp > 0 for call in calls)  # beside one, calls by hand do not count
        return any(calls[index].stamp > 0 or not has_forward for index in lacking)

    def _record_recomputed(self, checkpoint: int | None, gradient: Tensor) -> None:
        lacking = [index for index in self._lacking if self._checkpoints.get(index) == checkpoint]
        if lacking:
            self._record(max(lacking), gradient)

    def _record(self, index: int, gradient: Tensor) -> None:
        self._lacking.discard(index)
        call = self._calls[index]
        if not self._records_last:
            self._record_call(gradient, call)
        elif index == len(self._calls) - 1:
            self._record_call(gradient, call._replace(number=None))


def _call_recorder(target: Target, shared: Shared) -> RecordCall:
    """What reduces or copies one value and stores it."""
    options, recorded, layout = shared.options, shared.recorded, shared.layouts.get(target.name, USUAL)
    # With calls="join" the parts are stored whole, and are reduced when they are read.
    reducers = {"full": full} if options.calls == "join" else recorded_reducers(target, options.reducers)

    def record_call(value: Tensor, call: Call) -> None:
        if options.detach and value.requires_grad:
            value = value.detach()
        for name, reducer in reducers.items():
            if reducer is full:
                _record_whole(name, target, value, call, shared, layout)
                continue
            sequence = sequence_second(target.layer, value, layout)
            if call.arguments is not None and not options.has_sink:  # whose steps are compared with the batch
                check_batch_first(target.layer, sequence, layout, call.arguments.outermost.batch)
            mask = mask_source(options, shared.masks)(target, sequence, call.arguments)
            result = unrecorded(reduce_sequence, target.layer, name, reducer, sequence, mask)
            result = result.detach() if options.detach else result  # a reducer may have weights of its own
            if options.to is not None:
                result = moved(result, options.to, target.layer)
            recorded.put((target.name, name), result, call.stamp, index=call.number)

    return record_call


def _record_whole(reducer: str, target: Target, value: Tensor, call: Call, shared: Shared, layout: Layout) -> None:
    key = (target.name, reducer)
    options, recorded = shared.options, shared.recorded
    if options.copy:
        copied = value.clone() if options.to is None else moved(value, options.to, target.layer, copy=True)
        slot = recorded.put(key, copied, call.stamp, index=call.number)
    elif value.is_inference():
        raise InferenceReferenceError
    else:
        slot = recorded.put(key, value, call.stamp, version_of(value), call.number)
    is_joined = options.calls == "join" or reducer == WHOLE
    is_reduced_later = is_joined and any(reducer is not full for reducer in options.reducers.values())
    if is_reduced_later or (options.has_sink and has_sequence(value, layout)):
        sequence = sequence_second(target.layer, value, layout)
        slot.mask = mask_source(options, shared.masks)(target, sequence, call.arguments)
