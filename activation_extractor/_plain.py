"""The commonest cases, each in one function: outputs, the last call of several, kept whole or reduced.

Everything here is said again, more generally, in `_taps` and `_keepers`. A captured call costs a few microseconds, and
most of that is memory that has to be fetched: each function that it goes through and each object that only its own
layer uses costs a tenth of one. So a hook here goes through no other function, shares what it can with the hooks of
the other layers, and has of its own only its module and its name.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from activation_extractor._context import open_here
from activation_extractor._keepers import Place, note_reduction, own_result
from activation_extractor._layers import Target
from activation_extractor._layout import sequence_second
from activation_extractor._options import Options
from activation_extractor._root import current_cut, cuts
from activation_extractor._taps import backward_task, is_transformed, picker
from activation_extractor._values import snapshot
from activation_extractor.errors import InferenceReferenceError, TransformedCallError
from activation_extractor.reducers import full, owns_result

Hook = Callable[..., None]
MakeHook = Callable[[Target], Hook]


def plain_hooks(options: Options, place: Place) -> MakeHook | None:
    """What makes a forward hook for a target that `is_plain`; None where these options ask for more."""
    if options.calls != "last" or not options.detach or options.to is not None or options.max_bytes is not None:
        return None
    reducers = options.reducers.values()
    if full not in reducers:
        return _reducing_hooks(place)
    if len(reducers) > 1 or options.has_sink:
        return None
    return _copying_hooks(place) if options.copy else _referring_hooks(place)


def is_plain(target: Target) -> bool:
    """Whether a target can be recorded by a hook of `plain_hooks`."""
    return target.side == "output" and target.select is None


def _copying_hooks(place: Place) -> MakeHook:
    plain, targets, reducer = Tensor, _Targets(), _only_reducer(place)

    def make(target: Target) -> Hook:
        module, entry, name = target.module, place.kept.entry((target.name, reducer)), targets.add(target)

        def record_copy(called: nn.Module, args: Any, output: Any) -> None:
            if place not in open_here() or called is not module or backward_task() != -1:
                return
            if is_transformed():
                raise TransformedCallError(targets[name].layer)
            if type(output) is plain:
                # What is copied at once needs no version counter: `data` does what `detach()` does, at half the price.
                entry.tensor = output.data.clone() if output.requires_grad else output.clone()
            else:
                entry.tensor = snapshot(targets.pick(name, output))
            if entry.forward == place.forward_number:
                place.ran_again(targets[name])
            entry.forward = place.forward_number
            if cuts and (cut := current_cut()) is not None:
                cut.ran(place, name)

        return record_copy

    return make


def _referring_hooks(place: Place) -> MakeHook:  # noqa: C901 - one function, see above
    """Hooks that keep references; these hold their graphs until `Kept` reads them, or until the block ends."""
    plain, targets, reducer = Tensor, _Targets(), _only_reducer(place)

    def make(target: Target) -> Hook:
        module, entry, name = target.module, place.kept.entry((target.name, reducer)), targets.add(target)

        def record_reference(called: nn.Module, args: Any, output: Any) -> None:
            if place not in open_here() or called is not module or backward_task() != -1:
                return
            if is_transformed():
                raise TransformedCallError(targets[name].layer)
            if type(output) is not plain:
                output = targets.pick(name, output)
            try:
                entry.version = output._version
            except RuntimeError:  # an inference tensor has none
                raise InferenceReferenceError from None
            entry.tensor = output
            if entry.forward == place.forward_number:
                place.ran_again(targets[name])
            entry.forward = place.forward_number
            if cuts and (cut := current_cut()) is not None:
                cut.ran(place, name)

        return record_reference

    return make


def _reducing_hooks(place: Place) -> MakeHook:  # noqa: C901 - one function, see above
    options, masks, plain = place.options, place.masks, Tensor
    axis, has_sink, is_usual = options.sequence_axis, options.has_sink, options.sequence_axis in (None, 1)
    reducers = [(name, reducer, owns_result(reducer)) for name, reducer in options.reducers.items()]
    # Our own reducers do not write to what they are given: `data` will do for them.
    are_ours = all(is_ours for _, _, is_ours in reducers)

    def make(target: Target) -> Hook:  # noqa: C901
        module, layer, name = target.module, target.layer, target.name
        entries = [(place.kept.entry((name, one)), one, reducer, is_ours) for one, reducer, is_ours in reducers]
        counted = entries[0][0]

        def record_reduced(called: nn.Module, args: Any, output: Any) -> None:  # noqa: C901
            if place not in open_here() or called is not module or backward_task() != -1:
                return
            if is_transformed():
                raise TransformedCallError(layer)
            if has_sink:
                place.check_step(target)
            if type(output) is not plain:
                output = picker(target)(output)
            if output.requires_grad:
                output = output.data if are_ours else output.detach()
            sequence = output if is_usual and output.dim() == 3 else sequence_second(layer, output, axis)
            mask = None if place.is_unmasked else masks.find(layer, sequence, place.call)
            for entry, reduced, reducer, is_ours in entries:
                try:
                    result = reducer(sequence, mask)
                except Exception as error:
                    note_reduction(error, layer, reduced, sequence)
                    raise
                entry.tensor = result if is_ours else own_result(layer, reduced, sequence, result)
            if counted.forward == place.forward_number:
                place.ran_again(target)
            counted.forward = place.forward_number
            if cuts and (cut := current_cut()) is not None:
                cut.ran(place, name)

        return record_reduced

    return make


def _only_reducer(place: Place) -> str:
    return next(iter(place.options.reducers))


class _Targets(dict[str, Target]):
    """What hooks rarely need, by recorded name."""

    def add(self, target: Target) -> str:
        self[target.name] = target
        return target.name

    def pick(self, name: str, output: Any) -> Tensor:
        """The tensor to record in what the layer returned."""
        return picker(self[name])(output)
