"""What happens to a recorded tensor: copied or reduced where it lives, then stored in the block's memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from activation_extractor._hooks._forwards import current_cut
from activation_extractor._hooks._taps import Record
from activation_extractor._private_torch import version_of
from activation_extractor.activations._forward_state import ForwardState
from activation_extractor.activations._options import Options
from activation_extractor.activations._recorded_values import Key, Recorded
from activation_extractor.errors import InferenceReferenceError
from activation_extractor.layers._selections import Target
from activation_extractor.reducers import full
from activation_extractor.reducers._masks import CallArguments, Masks
from activation_extractor.reducers._reducers import reduce_sequence
from activation_extractor.reducers._sequence_axis import has_sequence, sequence_second

# Takes a value, what the model's own call was given, and which call of the layer it is of; None for the next one.
RecordCall = Callable[[Tensor, "CallArguments | None", "int | None"], None]


class Shared(NamedTuple):
    """What all recorders of a block share: how to record, the forward under way, where values go, and the masks."""

    options: Options
    state: ForwardState
    recorded: Recorded
    masks: Masks


def recorder(target: Target, shared: Shared) -> Record:
    """What records the outputs or inputs of one target, call by call."""
    state, record_call = shared.state, _call_recorder(target, shared)
    forward = -1

    def record(value: Tensor) -> None:
        nonlocal forward
        state.check_step(target)
        record_call(value, state.call, None)
        if forward == state.forward_number:
            state.ran_again(target)
        forward = state.forward_number
        if (cut := current_cut()) is not None:
            cut.ran(state, target.name)

    return record


class GradientRecorder:
    """Records the gradients of one target, each as that of the call that it belongs to.

    Backward visits the calls from the last to the first. Where a checkpoint ran a call without a graph and runs it
    again in backward, the gradient belongs to the last call that still lacks one.

    Attributes:
        calls: for each call of the step so far, what the model's own call was given.
    """

    def __init__(self, target: Target, shared: Shared) -> None:
        self.calls: list[CallArguments | None] = []
        self._lacking: set[int] = set()
        self._target, self._state = target, shared.state
        self._records_last = shared.options.calls == "last"
        self._record_call = _call_recorder(target, shared)

    def expect(self, is_recomputed: bool) -> Record:
        """What records the gradient of the call that is under way."""
        if is_recomputed:
            return self._record_recomputed
        self._state.check_step(self._target)
        calls, index = self.calls, len(self.calls)
        calls.append(self._state.call)
        self._lacking.add(index)

        def record(gradient: Tensor) -> None:
            if calls is self.calls:  # still the same step
                self._record(index, gradient)

        return record

    def forget(self) -> None:
        """Begin a new step."""
        self.calls, self._lacking = [], set()

    @property
    def lacks(self) -> bool:
        """Whether a gradient that is wanted has not come."""
        return len(self.calls) - 1 in self._lacking if self._records_last else bool(self._lacking)

    def _record_recomputed(self, gradient: Tensor) -> None:
        if self._lacking:
            self._record(max(self._lacking), gradient)

    def _record(self, index: int, gradient: Tensor) -> None:
        self._lacking.discard(index)
        if not self._records_last:
            self._record_call(gradient, self.calls[index], index)
        elif index == len(self.calls) - 1:
            self._record_call(gradient, self.calls[index], None)


def _call_recorder(target: Target, shared: Shared) -> RecordCall:
    """What reduces or copies one value and stores it."""
    options, recorded = shared.options, shared.recorded
    # With calls="join" the parts are stored whole, and are reduced when they are read.
    reducers = {"full": full} if options.calls == "join" else options.reducers

    def record_call(value: Tensor, call: CallArguments | None, index: int | None) -> None:
        if options.detach and value.requires_grad:
            value = value.detach()
        for name, reducer in reducers.items():
            if reducer is full:
                _record_whole((target.name, name), target.layer, value, call, index, shared)
                continue
            sequence = sequence_second(target.layer, value, options.sequence_axis)
            mask = shared.masks.for_layer(target.layer, sequence, call)
            result = reduce_sequence(target.layer, name, reducer, sequence, mask)
            recorded.put((target.name, name), result if options.to is None else result.to(options.to), index=index)

    return record_call


def _record_whole(
    key: Key, layer: str, value: Tensor, call: CallArguments | None, index: int | None, shared: Shared
) -> None:
    options, recorded = shared.options, shared.recorded
    if options.copy:
        copied = value.clone() if options.to is None else value.to(options.to, copy=True)
        recorded.put(key, copied, index=index)
    elif value.is_inference():
        raise InferenceReferenceError
    else:
        recorded.put(key, value, version_of(value), index)
    is_reduced_later = options.calls == "join" and any(reducer is not full for reducer in options.reducers.values())
    if is_reduced_later or (options.has_sink and has_sequence(value, options.sequence_axis)):
        sequence = sequence_second(layer, value, options.sequence_axis)
        recorded.put_mask(key[0], shared.masks.for_layer(layer, sequence, call), index)
