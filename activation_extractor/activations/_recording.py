"""One entered block: its hooks, its steps, and how both end."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

from activation_extractor._format._rows import KeptColumn, RowId
from activation_extractor._hooks import _context
from activation_extractor._hooks._forwards import Forward, StopForward, unwatch, watch
from activation_extractor._hooks._stance import eager_stance
from activation_extractor._hooks._taps import Attached, Detach, tap, tap_gradient
from activation_extractor._private_torch import backward_task
from activation_extractor.activations._fast_recorders import is_plain, plain_hooks
from activation_extractor.activations._options import Options
from activation_extractor.activations._recorded import Kept
from activation_extractor.activations._recorders import GradientKeeper, keeper
from activation_extractor.activations._results import Results
from activation_extractor.errors import (
    GradientNotFoundError,
    InferenceReferenceError,
    LayerNotRunError,
    StepError,
    StopEarlyError,
    add_note,
)
from activation_extractor.layers._selections import Target
from activation_extractor.reducers._mask_fit import MaskCheck
from activation_extractor.reducers._masks import CallArguments, Masks
from activation_extractor.sinks import Sink
from activation_extractor.sinks._steps import make_step


class Recording:
    """What happens between entering a block and leaving it.

    Args:
        root: the plain model.
        targets: what to record on it.
        options: how.
        masks: how to find a layer's mask.
        sink: where finished steps go, or None when the whole block is one step.
    """

    def __init__(
        self, root: nn.Module, targets: Sequence[Target], options: Options, masks: Masks, sink: Sink | None
    ) -> None:
        self.options, self.is_open = options, False
        self.kept = Kept(options.calls, options.max_bytes, detach=options.detach)
        self.results = Results(targets, options, self.kept)
        self.masks = masks
        self.call: CallArguments | None = None
        self.ran: set[str] = set()  # in the forward that is under way
        self.forward_number = 0
        self.is_unmasked: bool | None = None  # not known before a layer asks: a forward may make its own mask
        self._root: nn.Module | None = root
        self._targets = tuple(targets)
        self._gradients: dict[str, GradientKeeper] = {}
        self._sink, self._steps = sink, 0
        self._in_step = sink is None
        self._groups = False  # whether the open step is a `step` block
        self._forward_thread: int | None = None
        self._has_warned = self._was_cut = False
        self._checks: list[MaskCheck] | None = None if sink is None else []
        self._undo: list[Detach] = []

    @property
    def stops_early(self) -> bool:
        """Whether the forward is to be cut short."""
        return self.options.stop_early

    def open(self) -> None:
        """Attach everything; on an error nothing stays attached."""
        if not self.options.copy and torch.is_inference_mode_enabled():
            raise InferenceReferenceError
        root = self._root
        assert root is not None
        undo = self._undo
        try:
            self._attach(undo)
            # Functions, which copying `acts` in the block leaves alone.
            undo.append(lambda: unwatch(root, self))
            watch(root, self)
            undo.append(lambda: eager_stance.leave(self))
            eager_stance.enter(self)
            undo.append(lambda: _context.leave(self))
            _context.enter(self)
        except BaseException:
            _call_all(undo)
            raise
        self.is_open = True

    def close(self, error: BaseException | None) -> None:
        """Detach everything; end the step that is the block, unless the body failed.

        Args:
            error: what the body raised, if anything.

        Raises:
            LayerNotRunError, GradientNotFoundError: only when the body raised nothing.
            StopEarlyError: the body failed over the output that `stop_early` left out.
        """
        self.is_open = False
        _call_all(self._undo)
        self.kept.close()
        self._root = None
        try:
            if error is None and self._sink is None:
                self.kept.check()
                self._check_complete()
            if self._was_cut and isinstance(error, AttributeError | TypeError) and "NoneType" in str(error):
                raise StopEarlyError from error
        finally:
            self._targets, self._gradients, self.call = (), {}, None
            self._close_sink(error)

    def _close_sink(self, error: BaseException | None) -> None:
        if self._sink is None:
            return
        try:
            self._sink.close()
        except Exception as sink_error:
            if error is None:
                raise
            if sink_error is not error:  # a step may have raised it already
                add_note(error, f"The sink could not be closed either: {sink_error}")

    def _attach(self, undo: list[Detach]) -> None:
        attached, make_hook = Attached(), plain_hooks(self.options, self)
        undo.append(lambda: attached.detach())
        for target in self._targets:
            if make_hook is not None and is_plain(target):
                attached.add(target.module, make_hook(target))
            else:
                undo.append(self._tap(target))
        attached.hide()

    def _tap(self, target: Target) -> Detach:
        if target.side != "gradient":
            return tap(target, self, keeper(target, self))
        gradients = self._gradients[target.name] = GradientKeeper(target, self)
        return tap_gradient(target, self, gradients.expect)

    # -- what keepers ask of their place ------------------------------------------------------------------------------

    def check_step(self, target: Target) -> None:
        """Refuse a call that belongs to no step, so that nothing is recorded that no sink would ever see."""
        if not self._in_step:
            raise StepError(
                "hold every recorded call when there is a sink",
                f"a call of {target.layer!r} outside the model's own call",
                "Wrap what belongs together in `with acts.step(): ...`, or capture the module that is called.",
            )
        if target.side == "gradient" and self._sink is not None and not self._groups:
            raise StepError(
                "hold forward and backward when gradients go to a sink",
                f"a forward of {target.layer!r} outside a step block",
                "Wrap both in `with acts.step(): ...`.",
            )

    def look_for_masks(self) -> bool:
        """Whether no layer has a mask in the forward that is under way."""
        self.is_unmasked = self.call is not None and self.masks.has_none(self.call)
        return self.is_unmasked

    def ran_again(self, target: Target) -> None:
        """Warn, once, that only the last call of several in one forward is kept; a recomputation is none."""
        if self.options.calls == "last" and self.call is not None and not self._has_warned and backward_task() == -1:
            self._has_warned = True
            warnings.warn(
                f"Layer {target.layer!r} ran several times in one forward and its last value is kept. "
                "Pass calls='all' or calls='join' to keep them all.",
                stacklevel=2,
            )

    # -- the model's own calls ----------------------------------------------------------------------------------------

    def awaited(self, members: frozenset[int]) -> set[str]:
        """The names of what is wanted from the modules with these ids."""
        return {target.name for target in self._targets if id(target.module) in members}

    def forward(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> AbstractContextManager[None]:
        """Span one forward of the model; with a sink, and outside a `step` block, it is a step."""
        if self.call is None:
            return Forward(self, CallArguments(self.masks.positions, args, kwargs, self._checks))
        self._check_thread()
        return nullcontext()  # the model calls itself: part of the outer forward

    def begin_forward(self, call: CallArguments) -> AbstractContextManager[None] | None:
        """Begin a forward; returns its step, if it is one."""
        self._forward_thread = threading.get_ident()
        self.call = call
        self.forward_number += 1
        self.is_unmasked = None
        self.ran.clear()
        return None if self._in_step else self._step(None, {})

    def end_forward(self) -> None:
        """End a forward."""
        self.call = self.is_unmasked = None

    def note_cut(self) -> None:
        """Note that a forward was cut short and returned None."""
        self._was_cut = self.stops_early

    def _check_thread(self) -> None:
        if threading.get_ident() != self._forward_thread:
            raise StepError(
                "see one forward at a time",
                "two in different threads of one context",
                "Enter a capture of its own in each thread.",
            )

    # -- steps --------------------------------------------------------------------------------------------------------

    @contextmanager
    def step(self, ids: list[RowId] | None, keep: Mapping[str, KeptColumn]) -> Iterator[None]:
        """Group what runs inside into one step."""
        if self._sink is None:
            raise StepError("have a sink to go to", "none", "Without a sink the whole block is one step.")
        if not self.is_open or self._in_step:
            got = "one inside another step" if self.is_open else "one after the block was left"
            advice = "Begin it in the with-block, between forwards."
            raise StepError("begin inside the with-block and outside other steps", got, advice)
        self._groups = True
        try:
            with self._step(ids, keep):
                yield
        finally:
            self._groups = False

    @contextmanager
    def _step(self, ids: list[RowId] | None, keep: Mapping[str, KeptColumn]) -> Iterator[None]:
        self._begin_step()
        try:
            yield
        except StopForward:
            self._end_step(ids, keep)
            raise
        finally:
            self._in_step = False
        self._end_step(ids, keep)

    def _begin_step(self) -> None:
        self.results.clear()
        if self._checks:
            self._checks.clear()
        self._in_step = True
        for gradients in self._gradients.values():
            gradients.forget()

    def _end_step(self, ids: list[RowId] | None, keep: Mapping[str, KeptColumn]) -> None:
        self._check_complete()
        columns = self.results.columns()
        if self._sink is not None and (columns or ids is not None or keep):
            step = make_step(self._steps, columns, ids, keep, self._checks or ())
            if not self._sink.reads_later:
                step.check_masks()
            self._sink.write(step)
            self._steps += 1

    def _check_complete(self) -> None:
        """Raise for what was requested and did not come."""
        if self.options.missing == "skip":
            return
        came = set(self.kept.names)
        outputs = [target.layer for target in self._targets if target.side != "gradient" and target.name not in came]
        idle = [target.layer for target in self._targets if self._never_ran(target)]
        if outputs or idle:
            raise LayerNotRunError(list(dict.fromkeys(outputs + idle)))
        lacking = [name for name, gradients in self._gradients.items() if gradients.lacks]
        if lacking:
            raise GradientNotFoundError(lacking)

    def _never_ran(self, target: Target) -> bool:
        return target.side == "gradient" and not self._gradients[target.name].calls


def _call_all(undo: list[Detach]) -> None:
    """Undo everything, the last thing first, each of them harmless twice: what was interrupted is done again."""
    while undo:
        try:
            undo[-1]()
        except KeyboardInterrupt:
            _call_all(undo)
            raise
        except BaseException:
            undo.pop()
            _call_all(undo)
            raise
        undo.pop()
