"""What the hooks of one block share about the forward, and the step, that is under way."""

from __future__ import annotations

import threading
import warnings

from activation_extractor._hooks._context import Owner
from activation_extractor._private_torch import backward_task
from activation_extractor.errors import StepError
from activation_extractor.layers._selections import Target
from activation_extractor.reducers._masks import CallArguments


class ForwardState(Owner):
    """The forward of the model that is under way; `warns` is for a layer that runs several times in it.

    Attributes:
        call: what the model's own call was given; None outside of one.
        forward_number: how many forwards have begun.
        is_unmasked: whether no layer has a mask in this forward; None until a layer asks, since the model may make a
            mask of its own before.
        in_step: whether what is recorded now belongs to a step; always, where there is no sink.
        spans_backward: whether the step will still be open in backward, so that gradients belong to it.
    """

    __slots__ = ("_thread", "_warns", "call", "forward_number", "in_step", "is_unmasked", "spans_backward")

    def __init__(self, targets: tuple[Target, ...], *, stops_early: bool, warns: bool) -> None:
        super().__init__(targets, stops_early=stops_early)
        self.call: CallArguments | None = None
        self.forward_number = 0
        self.is_unmasked: bool | None = None
        self.in_step = self.spans_backward = True
        self._warns, self._thread = warns, -1

    def begin(self, call: CallArguments) -> None:
        """A forward begins."""
        self.call, self.is_unmasked, self._thread = call, None, threading.get_ident()
        self.forward_number += 1

    def end(self) -> None:
        """The forward has ended, whether or not it failed."""
        self.call = self.is_unmasked = None

    def check_thread(self) -> None:
        """Raise StepError for a forward that begins while another one is under way in another thread."""
        if threading.get_ident() != self._thread:
            advice = "Enter a capture of its own in each thread."
            raise StepError("see one forward at a time", "two in different threads of one context", advice)

    def check_step(self, target: Target) -> None:
        """Refuse a call that belongs to no step, so that nothing is recorded that no sink would ever see.

        Raises:
            StepError: the call is outside of a step, or of a step that backward will be part of.
        """
        if not self.in_step:
            got = f"a call of {target.layer!r} outside the model's own call"
            advice = "Wrap what belongs together in `with acts.step(): ...`, or capture the module that is called."
            raise StepError("hold every recorded call when there is a sink", got, advice)
        if target.side == "gradient" and not self.spans_backward:
            got, advice = f"a forward of {target.layer!r} outside a step block", "Wrap both in `with acts.step(): ...`."
            raise StepError("hold forward and backward when gradients go to a sink", got, advice)

    def ran_again(self, target: Target) -> None:
        """Warn, once, that only the last call of several in one forward is recorded.

        A call outside of a forward does not count, nor does one that checkpointing repeats in backward.
        """
        if self._warns and self.call is not None and backward_task() == self.backward:
            self._warns = False
            warnings.warn(
                f"Layer {target.layer!r} ran several times in one forward and its last value is kept. "
                "Pass calls='all' or calls='join' to keep them all.",
                stacklevel=2,
            )
