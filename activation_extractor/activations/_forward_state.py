"""What the hooks of one block share about the forward, and the step, that is under way."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Mapping

from torch import Tensor, nn

from activation_extractor._hooks._context import Owner, open_here
from activation_extractor._hooks._module_registrations import module_registrations
from activation_extractor._private_torch import (
    active_tracer,
    backward_task,
    hook_counter,
    microbatch,
    uses_pipelines,
)
from activation_extractor.activations._row_order import Break, RowOrder, goes_on, has_nothing
from activation_extractor.errors import StepError, TransformedCallError
from activation_extractor.layers._places import Places
from activation_extractor.layers._selections import Target
from activation_extractor.reducers._calls import CallArguments


class ForwardState(Owner):
    """The forward of the model that is under way, and which of the values that are recorded count.

    A value is stamped when it is recorded: with the number of the forward that is under way, from 1; outside of the
    model's own call, with minus the number of the forwards that have begun.

    Attributes:
        call: what the model's own call was given; None outside of one.
        stamp: what marks a value that is recorded now.
        is_settled: whether a forward is under way in which a layer has run, so that our hooks are known to be last.
        places_seen: the number of the latest registration of a module when it was last asked who has lost its place.
        places: where the layers are, if registrations are not counted: graphs that slice a list of layers register
            modules, and would be compiled anew.
        displaced: the layers whose places in the model other modules have taken by then.
        find_displaced: finds these layers, and takes the hooks off them.
        refused: an error that is raised when the values are read, or the block ends, and not in a call.
        replaced: how many forwards' values were replaced before anybody read them.
        was_read: whether somebody has read the values of the last forward.
        inner: the latest call of a module in the model that is watched; None before any.
        order: compares the caches of forwards whose values are joined; None where none are.
        broken: why a forward of this step does not go on from the one before it.
        is_unmasked: whether no layer has a mask in this forward; None until a layer asks: the model may make one.
        is_watched: whether forwards of the model are still seen.
        left_out: by layer, how many forwards had begun before calls of it that were not taken, see `takes_call`.
        in_step: whether what is recorded now belongs to a step; always, where there is no sink.
        stance_was_lost: whether others had set another stance of the compiler when the block ended.
        spans_backward: whether the step will still be open in backward, so that gradients belong to it.
    """

    __slots__ = (
        "_begun",
        "_first_stamp",
        "_keeps_all",
        "_keeps_step",
        "_lacking",
        "_thread",
        "_tokens",
        "_warns",
        "broken",
        "call",
        "displaced",
        "find_displaced",
        "in_step",
        "inner",
        "is_settled",
        "is_unmasked",
        "is_watched",
        "left_out",
        "order",
        "places",
        "places_seen",
        "refused",
        "replaced",
        "spans_backward",
        "stamp",
        "stance_was_lost",
        "was_read",
    )

    def __init__(
        self, targets: tuple[Target, ...], *, stops_early: bool, keeps_all: bool, order: RowOrder | None = None
    ) -> None:
        super().__init__(targets, stops_early=stops_early)
        self.call: CallArguments | None = None
        self.inner: CallArguments | None = None
        self.stamp = self.replaced = 0
        self.is_settled = False
        self.is_watched: Callable[[], bool] = lambda: True
        self.is_unmasked: bool | None = None
        self.order = order
        self.broken: Break | None = None
        self.refused: StepError | None = None
        self.in_step = self.spans_backward = self.was_read = True
        self.stance_was_lost = False
        self._keeps_all, self._keeps_step, self._warns = keeps_all, False, not keeps_all
        self._begun, self._first_stamp, self._thread = 0, 1, -1
        self.places_seen = module_registrations.latest
        self.places: Places | None = None
        self.displaced: frozenset[str] = frozenset()
        self._lacking: frozenset[str] = frozenset()
        self._tokens: Mapping[int | str, Tensor] = {}
        self.left_out: dict[str, set[int]] = {}
        self.find_displaced: Callable[[], frozenset[str]] = frozenset

    def begin(self, call: CallArguments) -> None:
        """A forward begins."""
        if not self._keeps_all:
            before, self._tokens = self._tokens, call.tokens
            if not self.was_read:
                is_next = goes_on(before, self._tokens) if (cache := call.cache) is None else not has_nothing(cache)
                self.replaced += not is_next  # the next token of a generation replaces nothing
        self._look_at_places()
        if self.displaced:
            self._lacking |= self.displaced
        self.call, self.is_unmasked, self._thread = call, None, threading.get_ident()
        self._begun += 1
        self.stamp, self.was_read = self._begun, False

    def end(self, *, failed: bool) -> None:
        """The forward has ended; what a failed one has recorded need not be read."""
        self.call = self.inner = self.is_unmasked = None
        self.stamp, self.was_read, self.is_settled = -self._begun, self.was_read or failed, False

    def begin_inner(self, call: CallArguments, *, has_mask: bool) -> None:
        """A watched module is called."""
        call.outer = self.call_of("")
        self.inner = call
        if has_mask:
            self.is_unmasked = False

    def end_inner(self, layer: str) -> None:
        """The innermost call of a watched module that has not ended has."""
        calls = () if self.inner is None else self.inner.chain
        for call in calls:
            if call.layer == layer and not call.has_ended:
                call.has_ended = True
                return

    def call_of(self, layer: str) -> CallArguments | None:
        """The innermost known call in which a layer runs, or which is its own and has just ended."""
        call = self.inner
        while call is not None and call.has_ended and call.layer != layer:
            call = call.outer
        return self.call if call is None else call

    @property
    def batch(self) -> int | None:
        """The rows of the batch, where the model's own call tells them for certain."""
        return None if self.call is None else self.call.batch

    def begin_step(self, *, keeps_all: bool) -> None:
        """A step begins: one forward, or, with `keeps_all`, what the user groups, which counts whole."""
        self._first_stamp = self._begun + (self.call is None)
        self._keeps_step, self.broken = keeps_all, None
        if self.order is not None:
            self.order.forget()
        self._lacking = frozenset() if self.call is None else self.displaced
        self.left_out.clear()

    def admits(self, called: nn.Module, module: nn.Module | None, layer: str, last_stamp: int) -> bool:
        """Whether a call counts that is a forward's first, of a copy, or by hand; puts our hooks last."""
        if called is not module:
            return False
        if self not in open_here() or (self.call is None and not self.takes_call(layer, last_stamp)):
            self.misses(layer)
            return False
        if hook_counter.next_id != self.hooks_made:
            self.reorder(called)
        self.is_settled = self.call is not None
        return True

    def takes_call(self, layer: str, last_stamp: int) -> bool:
        """Whether a call of a layer outside of the model's own counts, from the stamp of the layer's last value.

        It does where no forward of this step has run the layer: an encoder that is called alone, say. It never replaces
        what a forward gave; nor does one that checkpointing repeats in backward.
        """
        if tracer := active_tracer():
            raise TransformedCallError("", tracer)
        if uses_pipelines() and microbatch() is not False:
            advice = "Capture the module of the stage: capture(stage.submod, ...)."
            got = f"microbatches of a part of it, with {layer!r}"
            self.refused = StepError("see each forward of the model", got, advice)
            return False
        self._look_at_places()
        if layer in self.displaced:
            return False
        if last_stamp >= self._first_stamp and not self.is_watched():
            advice = "Call model.compile() before the block."
            raise StepError("see each forward of the model", "one of a model compiled in place since", advice)
        if backward_task() not in self.backwards:
            return False
        if last_stamp >= self._first_stamp:
            self.left_out.setdefault(layer, set()).add(self._begun)
        return last_stamp < self._first_stamp

    def counts(self, stamp: int) -> bool:
        """Whether a value of this stamp is one of the last forward's, or of a step's or all that are kept together.

        A value from outside of a forward counts where a forward came after it, which it may have been made for, and
        where the step has no forward.
        """
        if stamp > 0:
            return stamp == self._begun or self._keeps_all or self._keeps_step
        return -stamp < self._begun or self._begun < self._first_stamp

    @property
    def keeps_together(self) -> bool:
        """Whether the values of several forwards are kept: of all, or of a step."""
        return self._keeps_all or self._keeps_step

    def has_left_out(self, layer: str, stamps: set[int]) -> bool:
        """Whether the next forward did not run the layer for a call that was left out; `stamps` are its values'."""
        numbers = (number for number in self.left_out.get(layer, ()) if number < self._begun)
        if self._keeps_all:
            return any(number + 1 not in stamps for number in numbers)
        return any(number >= max(stamps, default=0) for number in numbers)

    def lacks(self, layer: str) -> bool:
        """Whether another module had the layer's place in a forward of those whose values are kept together."""
        return self.keeps_together and layer in self._lacking

    def _look_at_places(self) -> None:
        """Find out who has lost its place, where somebody may have."""
        is_unchanged = self.places is None or not (self.displaced or self.places.may_have_changed())
        if is_unchanged and module_registrations.latest == self.places_seen:
            return
        self.places_seen = module_registrations.latest
        self.displaced = self.find_displaced()

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

    def check_order(self, layer: str) -> None:
        """Raise StepError for joined calls of a layer, when rows were reordered or positions dropped meanwhile."""
        if self.order is None:
            return
        self.broken = self.broken or self.order.broken_since()
        if self.broken is not None:
            condition, got, advice = self.broken
            raise StepError(condition, got.format(layer), advice)

    def check_refused(self) -> None:
        """Raise what was refused."""
        if self.refused is not None:
            refused, self.refused = self.refused, None
            raise refused

    def close_order(self) -> None:
        """The block ends: let go of the tokens and the cache of the last forward."""
        self._tokens = {}
        if self.order is not None:
            self.broken, self.order = self.broken or self.order.broken_since(), RowOrder()

    def ran_again(self, target: Target) -> None:
        """Warn, once, that only the last call of several in one forward is recorded.

        A call outside of a forward does not count, nor does one that checkpointing repeats in backward.
        """
        if self._warns and self.call is not None and backward_task() in self.backwards:
            self._warns = False
            warnings.warn(
                f"Layer {target.layer!r} ran several times in one forward and its last value is kept. "
                "Pass calls='all' or calls='join' to keep them all.",
                stacklevel=2,
            )

    def warn_of_replaced(self) -> None:
        """Warn of forwards whose values were replaced by those of later ones, unread."""
        if self.replaced and not self._keeps_all:
            warnings.warn(
                f"The model ran {self._begun} times in this block, and the values of {self.replaced} of these "
                "forwards were replaced before they were read: a block without a sink holds the last forward's. To "
                "keep them all pass sink=, use extract(), enter a block for each forward, or pass calls='all'.",
                stacklevel=5,
            )
