"""Forwards of an instrumented model: a block hears when they begin and when they end, but not that they fail."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

from activation_extractor._hooks._tapped_modules import check_last
from activation_extractor._private_torch import hook_counter
from activation_extractor.activations._forward_state import ForwardState
from activation_extractor.activations._steps import Steps
from activation_extractor.errors import StepError
from activation_extractor.reducers._calls import CallArguments
from activation_extractor.reducers._masks import Masks


class GraphForwards:
    """Begins and ends the forwards of one block, each a step where there is a sink and no `group` of steps.

    A forward that has not ended when the next one begins, or the block ends, has failed.
    """

    def __init__(self, state: ForwardState, steps: Steps, masks: Masks, *, has_sink: bool) -> None:
        self._state, self._steps, self._masks, self._has_sink = state, steps, masks, has_sink
        self._failed = 0
        self._step = ExitStack()

    def begin(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A forward begins; raises a StepError where hooks of others are behind taps, see `check_last`."""
        state = self._state
        if state.call is not None:
            state.check_thread()
            self.fail()
        if hook_counter.next_id != state.hooks_made:
            state.reorder()
            check_last(state.targets)
        call = CallArguments(self._masks.positions, args, kwargs, self._steps.checks)
        if state.order is not None:
            state.broken = state.broken or state.order.broken(call)
        state.begin(call)
        if not state.in_step:
            self._step.enter_context(self._steps.step())
        elif self._has_sink:
            self._steps.add_call(call)

    def end(self) -> None:
        """The forward that is under way ends.

        Raises:
            StepError: it is part of another one.
            LayerNotRunError: a layer did not run in it, and it is a step.
        """
        state = self._state
        if state.call is None:
            if self._failed:
                advice = "Leave out instrument() for it."
                raise StepError("be of one forward after another", "a model that calls itself", advice)
            return  # it began before the block
        failed = True
        try:
            if state.order is not None:
                state.order.end(state.call)
            self._step.close()
            failed = False
        finally:
            state.end(failed=failed)

    def fail(self) -> None:
        """The forward that is under way, if there is one, has failed: its step is dropped."""
        if self._state.call is None:
            return
        self._failed += 1
        error = StepError("end", "a forward that failed", "")
        self._step.pop_all().__exit__(StepError, error, None)
        self._state.end(failed=True)
