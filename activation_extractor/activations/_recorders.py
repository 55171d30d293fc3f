"""What happens to a recorded tensor: copied or reduced where it lives, then kept."""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor

from activation_extractor._hooks._forwards import current_cut
from activation_extractor._hooks._taps import Keep
from activation_extractor._private_torch import version_of
from activation_extractor.activations._options import Options
from activation_extractor.activations._recorded import Kept
from activation_extractor.errors import InferenceReferenceError
from activation_extractor.layers._selections import Target
from activation_extractor.reducers import Reducer, full
from activation_extractor.reducers._masks import CallArguments, Masks
from activation_extractor.reducers._reducers import reduce_sequence
from activation_extractor.reducers._sequence_axis import has_sequence, sequence_second


class Place(Protocol):
    """Where recorded values go: the recording that a keeper works for."""

    options: Options
    kept: Kept
    masks: Masks
    call: CallArguments | None
    forward_number: int
    is_unmasked: bool | None
    ran: set[str]

    @property
    def is_open(self) -> bool: ...

    def check_step(self, target: Target) -> None: ...

    def look_for_masks(self) -> bool: ...

    def ran_again(self, target: Target) -> None: ...


def keeper(target: Target, place: Place) -> Keep:
    """What keeps the outputs or inputs of one target, call by call."""
    keep_value = _value_keeper(target, place)

    def keep(value: Tensor) -> None:
        place.check_step(target)
        keep_value(value, place.call, None)
        if target.name in place.ran:
            place.ran_again(target)
        place.ran.add(target.name)
        _tell_cut(target, place)

    return keep


class GradientKeeper:
    """Keeps the gradients of one target, each at the place of the call that it belongs to.

    Backward visits the calls from the last to the first. Where a checkpoint ran a call without a graph and runs it
    again in backward, the gradient belongs to the last call that still lacks one.

    Attributes:
        calls: for each call of the step so far, what the model's own call was given.
    """

    def __init__(self, target: Target, place: Place) -> None:
        self.calls: list[CallArguments | None] = []
        self._lacking: set[int] = set()
        self._target, self._place = target, place
        self._keep_value = _value_keeper(target, place)

    def expect(self, is_recomputed: bool) -> Keep:
        """A place for the gradient of the call that is under way."""
        if is_recomputed:
            return self._keep_recomputed
        self._place.check_step(self._target)
        calls, index = self.calls, len(self.calls)
        calls.append(self._place.call)
        self._lacking.add(index)

        def keep(gradient: Tensor) -> None:
            if calls is self.calls:  # still the same step
                self._keep(index, gradient)

        return keep

    def forget(self) -> None:
        """Begin a new step."""
        self.calls, self._lacking = [], set()

    @property
    def lacks(self) -> bool:
        """Whether a gradient that is wanted has not come."""
        wanted = {len(self.calls) - 1} if self._place.options.calls == "last" else set(range(len(self.calls)))
        return bool(wanted & self._lacking)

    def _keep_recomputed(self, gradient: Tensor) -> None:
        if self._lacking:
            self._keep(max(self._lacking), gradient)

    def _keep(self, index: int, gradient: Tensor) -> None:
        self._lacking.discard(index)
        if self._place.options.calls != "last":
            self._keep_value(gradient, self.calls[index], index)
        elif index == len(self.calls) - 1:
            self._keep_value(gradient, self.calls[index], None)


def _value_keeper(target: Target, place: Place) -> Any:
    """What reduces and keeps one value: ``(value, the model's call, index of the layer's call)``."""
    options, kept = place.options, place.kept
    keeps_parts = options.calls == "join"  # reduced when it is whole
    reducers = [((target.name, name), name, reducer) for name, reducer in options.reducers.items()]

    def keep_value(value: Tensor, call: CallArguments | None, index: int | None) -> None:
        if options.detach and value.requires_grad:
            value = value.detach()
        if keeps_parts:
            _keep_whole((target.name, "full"), value, call, index)
            return
        for key, name, reducer in reducers:
            if reducer is full:
                _keep_whole(key, value, call, index)
            else:
                kept.put(key, _moved(_reduced(target, name, reducer, value, call, place), options), index=index)

    def _keep_whole(key: tuple[str, str], value: Tensor, call: CallArguments | None, index: int | None) -> None:
        kept.put(key, *_whole(value, options), index)
        if _needs_mask(value, options):
            sequence = sequence_second(target.layer, value, options.sequence_axis)
            kept.put_mask(target.name, place.masks.for_layer(target.layer, sequence, call), index)

    return keep_value


def _needs_mask(value: Tensor, options: Options) -> bool:
    """Whether a value that is kept whole will be reduced, or freed of its padding, later."""
    if options.calls == "join" and any(reducer is not full for reducer in options.reducers.values()):
        return True
    return options.has_sink and has_sequence(value, options.sequence_axis)


def _reduced(
    target: Target, name: str, reducer: Reducer, value: Tensor, call: CallArguments | None, place: Place
) -> Tensor:
    sequence = sequence_second(target.layer, value, place.options.sequence_axis)
    return reduce_sequence(target.layer, name, reducer, sequence, place.masks.for_layer(target.layer, sequence, call))


def _moved(value: Tensor, options: Options) -> Tensor:
    return value if options.to is None else value.to(options.to)


def _whole(value: Tensor, options: Options) -> tuple[Tensor, int | None]:
    """A copy; or the value itself, and its version when the layer returned it."""
    if options.copy:
        return (value.clone() if options.to is None else value.to(options.to, copy=True)), None
    if value.is_inference():
        raise InferenceReferenceError
    return value, version_of(value)


def _tell_cut(target: Target, place: Place) -> None:
    cut = current_cut()
    if cut is not None:
        cut.ran(place, target.name)
