"""The commonest case in one function: an output kept whole, the last call of several, nothing else asked.

Everything here is said again, more generally, in `_taps` and `_keepers`. A captured call costs a few microseconds, and
each function that it goes through costs a tenth of one, so this path goes through none.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from activation_extractor._context import open_here
from activation_extractor._keepers import Place
from activation_extractor._layers import Target
from activation_extractor._options import Options
from activation_extractor._root import current_cut, cuts
from activation_extractor._taps import backward_task, is_transformed, picker
from activation_extractor._values import snapshot
from activation_extractor.errors import InferenceReferenceError, TransformedCallError
from activation_extractor.reducers import full


def is_plain(target: Target, options: Options) -> bool:
    """Whether a target can be recorded by `plain_hook`."""
    return (
        target.side == "output"
        and target.select is None
        and list(options.reducers.values()) == [full]
        and options.calls == "last"
        and options.detach
        and options.to is None
        and options.max_bytes is None
        and not options.has_sink
    )


def plain_hook(target: Target, place: Place) -> Callable[..., None]:
    """A forward hook that keeps what the layer returns, as a copy or with ``copy=False`` as a reference.

    A reference still holds its graph: `Kept` detaches it when it is read, and at the latest when the block ends.
    """
    return _copying_hook(target, place) if place.options.copy else _referring_hook(target, place)


def _copying_hook(target: Target, place: Place) -> Callable[..., None]:
    module, pick, name = target.module, picker(target), target.name
    key, values, ran = (name, next(iter(place.options.reducers))), place.kept.values, place.ran

    def record_copy(called: nn.Module, args: Any, output: Any) -> None:
        if place not in open_here() or called is not module or backward_task() != -1:
            return
        if is_transformed():
            raise TransformedCallError(target.layer)
        if type(output) is Tensor:
            # What is copied at once needs no version counter: `data` does what `detach()` does, at half the price.
            values[key] = output.data.clone() if output.requires_grad else output.clone()
        else:
            values[key] = snapshot(pick(output))
        if name in ran:
            place.ran_again(target)
        ran.add(name)
        if cuts and (cut := current_cut()) is not None:
            cut.ran(place, name)

    return record_copy


def _referring_hook(target: Target, place: Place) -> Callable[..., None]:
    module, pick, name = target.module, picker(target), target.name
    key, values, ran = (name, next(iter(place.options.reducers))), place.kept.values, place.ran

    def record_reference(called: nn.Module, args: Any, output: Any) -> None:
        if place not in open_here() or called is not module or backward_task() != -1:
            return
        if is_transformed():
            raise TransformedCallError(target.layer)
        if type(output) is not Tensor:
            output = pick(output)
        try:
            values[key] = output, output._version
        except RuntimeError:  # an inference tensor has none
            raise InferenceReferenceError from None
        if name in ran:
            place.ran_again(target)
        ran.add(name)
        if cuts and (cut := current_cut()) is not None:
            cut.ran(place, name)

    return record_reference
