"""One entered block: what is attached to the model for it, and how all of it is taken off again."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from activation_extractor._hooks import _context
from activation_extractor._hooks._compiled_models import eager_stance
from activation_extractor._hooks._forwards import RunForward, is_watched, unwatch, watch
from activation_extractor._hooks._module_registrations import module_registrations
from activation_extractor._hooks._tapped_modules import call_tap
from activation_extractor._hooks._taps import Attached, Detach, detach_all, tap, tap_gradient
from activation_extractor._hooks._watched_calls import watch_calls
from activation_extractor._private_torch import hook_counter
from activation_extractor.activations._block_taps import BlockTaps, check_kept
from activation_extractor.activations._fast_recorders import fast_hooks
from activation_extractor.activations._forward_state import ForwardState
from activation_extractor.activations._microbatches import Microbatches
from activation_extractor.activations._options import Options
from activation_extractor.activations._recorded_values import Recorded
from activation_extractor.activations._recorders import GradientRecorder, Shared, recorder
from activation_extractor.activations._results import Results
from activation_extractor.activations._row_order import RowOrder
from activation_extractor.activations._sharded import Sharding
from activation_extractor.activations._steps import Steps
from activation_extractor.errors import InferenceReferenceError, StopEarlyError
from activation_extractor.layers._modules import ModuleTree
from activation_extractor.layers._places import Places
from activation_extractor.layers._selections import Target
from activation_extractor.reducers._calls import CallArguments
from activation_extractor.reducers._masks import Masks, Watched
from activation_extractor.reducers._sequence_axis import Layout
from activation_extractor.sinks import Sink

if TYPE_CHECKING:
    from typing_extensions import Self


_IN_GRAPHS = (
    "Its layers run inside of compiled graphs. Undo instrument() with handle.remove(), or leave the option out."
)


class Plan(NamedTuple):
    """What a capture has decided about one model.

    Attributes:
        root: the plain model.
        targets: what is recorded.
        masks: where masks come from.
        layouts: where the sequence is, by recorded name.
        watched: the modules whose calls may say which positions are real.
        is_combined: whether some targets are combined to one column.
        plain: of each target, whether it is an output as it is, that nothing is taken out of or combined with.
        is_spread: tells whether processes share the model so that layers may hold parts of their values.
    """

    root: nn.Module
    targets: tuple[Target, ...]
    masks: Masks
    layouts: Mapping[str, Layout]
    watched: Watched
    is_combined: bool
    plain: tuple[bool, ...]
    is_spread: Callable[[], bool]


class OpenBlock:
    """What happens between entering a block and leaving it: a context manager that is entered once.

    Finished steps go to the sink; without one the whole block is one step.

    Attributes:
        state: the forward that is under way.
        results: what is recorded, as it is handed out.
        steps: the block's steps.
    """

    def __init__(self, plan: Plan, options: Options, sink: Sink | None) -> None:
        root, targets, masks, layouts, _, is_combined, _, is_spread = plan
        self.state = ForwardState(
            targets,
            stops_early=options.stop_early,
            keeps_all=options.calls != "last",
            order=RowOrder() if options.calls == "join" else None,
        )
        self.state.unpacks = options.needs_layouts
        recorded = Recorded(options.calls, options.max_bytes, self.state, detach=options.detach)
        self.results = Results(targets, options, recorded, self.state, layouts, is_combined=is_combined)
        self._shared = Shared(options, self.state, recorded, masks, layouts)
        self._gradients: dict[str, GradientRecorder] = {}
        self.steps = Steps(
            self.state,
            self.results,
            self._gradients,
            sink,
            root,
            may_lack=options.missing == "skip",
            is_time_first=bool(layouts) and any(0 in (layout.of_three, layout.axis) for layout in layouts.values()),
        )
        self._sharding = Sharding.of(root, options, self.state, is_spread)
        self.results.microbatches = Microbatches.of(
            root, targets, options, self.state, recorded, self.steps.take_any_rows
        )
        self._plan: Plan | None = plan
        self._undo: list[Detach] = []
        self._taps: BlockTaps | None = None
        self._places: Places | None = None  # where the layers were when this was asked first

    def __enter__(self) -> Self:
        """Attach everything; on an error nothing stays attached."""
        if not self._shared.options.copy and torch.is_inference_mode_enabled():
            raise InferenceReferenceError
        state, undo = self.state, self._undo
        assert self._plan is not None
        root, watched = self._plan.root, self._plan.watched
        try:
            if (call := call_tap(root)) is None:
                undo.append(lambda: module_registrations.leave(state))
                module_registrations.enter(state)
            else:
                self._taps = BlockTaps(call, self._shared, self.steps, is_spread=self._sharding is not None)
            for layer, (module, positions) in watched.items():
                self._watch(layer, module, positions)
            self._attach_hooks()
            if self._taps is None:
                run: RunForward = self._run_forward
                for part in (self._sharding, self.results.microbatches):
                    run = run if part is None else part.around(run)
                undo.append(lambda: unwatch(root, state))
                watch(root, state, run)
                state.is_watched = lambda: is_watched(root)
                undo.append(lambda: eager_stance.leave(state))
                eager_stance.enter(state)
            else:
                undo += self._taps.undo
                self._taps.begin(root)
            undo.append(lambda: _context.leave(state))
            _context.enter(state)
        except BaseException:
            detach_all(undo)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Detach everything; end the step that is the block, unless the body failed.

        Raises:
            LayerNotRunError, GradientNotFoundError, TransformedCallError: only when the body raised nothing.
            StopEarlyError: the body failed over the output that `stop_early` left out.
        """
        state, recorded, options = self.state, self._shared.recorded, self._shared.options
        state.is_open, state.stance_was_lost = False, eager_stance.is_lost
        detach_all(self._undo)
        self._plan = self._places = None  # what is recorded outlives the block, and must not keep the model
        microbatches, self.results.microbatches = self.results.microbatches, None
        try:
            if microbatches is not None and error is None:
                microbatches.join()
            recorded.close()
            state.close_order()
            if error is None:
                check_kept(state)
            if error is None and options.has_sink:
                self.steps.check_any()
            elif error is None:
                recorded.check()
                self.steps.check_complete()
                self.results.settle()
                state.warn_of_replaced()
                if state.left_out:
                    self.steps.warn_of_left_out(stacklevel=5)
            if state.was_cut and isinstance(error, AttributeError | TypeError) and "NoneType" in str(error):
                raise StopEarlyError from error
        finally:
            self._gradients.clear()
            state.targets, state.call, state.inner = (), None, None
            state.put_last, state.is_watched, state.find_displaced = set, lambda: True, frozenset
            self.steps.close(error)

    def _attach_hooks(self) -> None:
        attached, make_hook, state, sharding = Attached(), fast_hooks(self._shared), self.state, self._sharding
        self._undo.append(lambda: attached.detach())
        assert self._plan is not None
        if sharding is not None:
            make_hook = None
            self._undo.append(sharding.hooks.detach)
            sharding.attach(self._plan.root)
        for target, is_plain in zip(state.targets, self._plan.plain, strict=True):
            if self._taps is not None and target.name in self._taps:
                continue
            if is_plain and make_hook is not None:
                attached.add(target.module, make_hook(target))
            elif target.side == "gradient":
                gradients = self._gradients[target.name] = GradientRecorder(target, self._shared)
                settle = {} if sharding is None else {"settle": partial(sharding.settle_gradient, target)}
                self._undo.append(tap_gradient(target, state, gradients.expect, attached, **settle))
            else:
                pick = None if sharding is None else sharding.pick(target)
                tap(target, state, recorder(target, self._shared), attached, pick)
        attached.hide()
        state.hooks_made, state.put_last = hook_counter.next_id, lambda: attached.put_last()
        if sharding is not None:
            state.put_last = lambda: sharding.hooks.put_last() | attached.put_last()
        state.find_displaced = lambda: self._displaced(attached)

    def _displaced(self, attached: Attached) -> frozenset[str]:
        """The layers whose names mean other modules by now; their hooks are off until they have their places again.

        A layer deeper in a module that was wrapped keeps its hooks: no other module has its name.
        """
        assert self._plan is not None
        if not self.state.displaced and self._places is not None and not self._places.may_have_changed():
            return frozenset()  # what was registered is elsewhere: some models slice a list of layers in each forward
        tree, targets = ModuleTree(self._plan.root), self._plan.targets
        places = ((target, tree.find(target.layer)) for target in targets)
        layers = {target.layer for target, place in places if place is not None and place[1] is not target.module}
        if not layers and self._places is None:
            self._places = Places(self._plan.root, {target.layer for target in targets})
        if layers or self.state.displaced:
            hooked = targets if self._taps is None else self._taps.set_aside(layers)
            behind = [target.layer in layers for target in hooked if target.side != "input"]
            attached.set_aside(behind, [target.layer in layers for target in hooked if target.side == "input"])
        return frozenset(layers)

    def _watch(self, layer: str, module: nn.Module, positions: Mapping[str, int]) -> None:
        """Note the calls of a module in the model that may say which positions are real."""
        state, steps, masks, has_sink = self.state, self.steps, self._shared.masks, self._shared.options.has_sink

        def begin(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            call = CallArguments(positions, args, kwargs, steps.checks, layer=layer)
            state.begin_inner(call, has_mask=masks.is_given(call))
            if call.outer is None and has_sink:
                steps.add_call(call)

        end = partial(state.end_inner, layer)
        if self._taps is None or not self._taps.watch(layer, module, begin, end):
            self._undo.append(watch_calls(module, state, begin, end))

    def _run_forward(self, call: Any, /, *args: Any, **kwargs: Any) -> Any:
        """Run one forward of the model; with a sink, and outside of a `group` of steps, it is a step."""
        state = self.state
        if state.call is not None:  # the model calls itself, which is part of the outer forward
            state.check_thread()
            return call(*args, **kwargs)
        if hook_counter.next_id != state.hooks_made:
            state.reorder()
        arguments, order = CallArguments(self._shared.masks.positions, args, kwargs, self.steps.checks), state.order
        if order is not None:
            state.broken = state.broken or order.broken(arguments)
        state.begin(arguments)
        failed = True
        try:
            if state.in_step:
                if self._shared.options.has_sink:
                    self.steps.add_call(arguments)
                result = call(*args, **kwargs)
            else:
                with self.steps.step():
                    result = call(*args, **kwargs)
            failed = False
            if hook_counter.next_id != state.hooks_made:
                state.reorder(*(target.module for target in state.targets))
            if order is not None:
                order.end(arguments)
        finally:
            state.end(failed=failed)
        return result
