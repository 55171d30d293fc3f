"""The steps of a block: how they begin and end, and what must have been recorded by then."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from torch import nn

from activation_extractor._display import examples
from activation_extractor._format._stored_rows import KeptColumn, RowId
from activation_extractor._hooks._compiled_models import eager_stance
from activation_extractor._hooks._forwards import StopForward
from activation_extractor.activations._forward_state import ForwardState
from activation_extractor.activations._recorders import GradientRecorder
from activation_extractor.activations._results import Results
from activation_extractor.errors import GradientNotFoundError, LayerNotRunError, StepError, add_note
from activation_extractor.layers._modules import ModuleTree
from activation_extractor.layers._selections import Target
from activation_extractor.reducers._calls import CallArguments
from activation_extractor.reducers._mask_fit import MaskCheck
from activation_extractor.sinks import Sink
from activation_extractor.sinks._step import make_step

_EARLIER = "run in an earlier forward of the block, not in the last one: read it in between, or pass calls='all'"
_BY_HAND = "called by hand, outside of the model's own forward, which counts in blocks without such a forward"

_ALONE = (
    "run in an earlier forward of the block and called alone after it, as generate() calls an encoder: enter a block "
    "of its own for each"
)
_UNTAPPED = "it has no tap, which it needs if it runs inside of a compiled graph: pass it to instrument()"
_COMPILED = "the compiler's stance was set inside of the block, so that compiled code ran, which calls no hooks"
_CLEARED = "its value was let go with acts.clear() before the step ended"


class Steps:
    """The steps of a block; without a sink the whole block is one.

    With `may_lack` a step is complete although a layer did not run in it; with `is_time_first` the batch may be the
    second axis of what the model is called with.

    Attributes:
        checks: what is still to be checked of masks in the open step; None without a sink, when it is checked at once.
    """

    def __init__(
        self,
        state: ForwardState,
        results: Results,
        gradients: Mapping[str, GradientRecorder],
        sink: Sink | None,
        root: nn.Module,
        *,
        may_lack: bool,
        is_time_first: bool = False,
    ) -> None:
        self.checks: list[MaskCheck] | None = None if sink is None else []
        self._state, self._results, self._gradients, self._sink = state, results, gradients, sink
        self._may_lack, self._is_time_first, self._count = may_lack, is_time_first, 0
        self._rows: set[int] | None = set()  # that the calls of the open step may have; None where a call does not say
        self._root: nn.Module | None = root
        state.in_step = state.spans_backward = sink is None

    @contextmanager
    def group(self, ids: list[RowId] | None, keep: Mapping[str, KeptColumn]) -> Iterator[None]:
        """Make one step of what runs inside, with row ids and further columns.

        Raises:
            StepError: there is no sink, the block was left, or another step is open.
        """
        state = self._state
        if self._sink is None:
            raise StepError("have a sink to go to", "none", "Without a sink the whole block is one step.")
        if not state.is_open or state.in_step:
            got = "one inside another step" if state.is_open else "one after the block was left"
            advice = "Begin it in the with-block, between forwards."
            raise StepError("begin inside the with-block and outside other steps", got, advice)
        state.spans_backward = True
        try:
            with self.step(ids, keep, keeps_all=True):
                yield
        finally:
            state.spans_backward = False

    @contextmanager
    def step(
        self, ids: list[RowId] | None = None, keep: Mapping[str, KeptColumn] | None = None, *, keeps_all: bool = False
    ) -> Iterator[None]:
        """Make one step of what runs inside; it reaches the sink unless that fails. A forward cut short is no failure.

        Raises:
            LayerNotRunError, GradientNotFoundError: see `check_complete`.
        """
        self._results.begin_step()
        if self.checks:
            self.checks.clear()
        self._rows = set()
        if self._state.call is not None:
            self.add_call(self._state.call)
        self._state.begin_step(keeps_all=keeps_all)
        self._state.in_step = True
        self._state.missed.clear()
        for gradients in self._gradients.values():
            gradients.forget()
        try:
            yield
        except StopForward:
            self._end(ids, keep or {})
            raise
        finally:
            self._state.in_step = False
        self._end(ids, keep or {})

    def add_call(self, call: CallArguments) -> None:
        """A forward begins whose rows are to be those of the open step."""
        rows = call.rows(may_be_second=self._is_time_first)
        self._rows = self._rows | rows if rows and self._rows is not None else None

    def take_any_rows(self) -> None:
        """The open step may have other rows than each call in it."""
        self._rows = None

    def check_complete(self) -> None:
        """Make sure that everything requested was recorded in the step that ends.

        Raises:
            LayerNotRunError: a layer did not run.
            GradientNotFoundError: a layer ran, and no gradient came for it.
        """
        if self._may_lack:
            return
        gradients, lacks = self._gradients, self._state.lacks
        held = set(self._results.recorded_names)
        ran = held.union(name for name, recorder in gradients.items() if recorder.has_run)
        cleared = {name for name, stamp in self._results.cleared.items() if self._state.counts(stamp)} - held
        names = ran | cleared if self._sink is None else ran - cleared  # which cannot be stored
        idle = [it.layer for it in self._state.targets if it.name not in names or lacks(it.layer)]
        if idle:
            layers = list(dict.fromkeys(idle))
            raise LayerNotRunError(layers, {**dict(self._reasons(layers)), **self._state.missed})
        lacking = [name for name, recorder in gradients.items() if recorder.lacks]
        if lacking:
            raise GradientNotFoundError(lacking)

    def check_any(self) -> None:
        """Raise LayerNotRunError when there was no step because each call was in another context, or in backward."""
        missed = self._state.missed
        if missed and not (self._count or self._may_lack):
            raise LayerNotRunError([*missed], missed)

    def _reasons(self, layers: Sequence[str]) -> Iterator[tuple[str, str]]:
        """Why layers did not run, where it is known."""
        assert self._root is not None
        tree = ModuleTree(self._root)
        for target in self._state.targets:
            gradients = self._gradients.get(target.name)
            stamp = self._results.last_stamp(target.name) if gradients is None else gradients.last_stamp
            if target.layer not in layers:
                continue
            is_displaced = target.layer in self._state.displaced or self._state.lacks(target.layer)
            if is_displaced or (found := tree.find(target.layer)) is None or found[1] is not target.module:
                yield target.layer, "another module took its place since the block began"
            elif target.name in self._results.cleared and self._sink is not None:
                yield target.layer, _CLEARED
            elif target.name in self._state.untapped:
                yield target.layer, _UNTAPPED
            elif self._state.stance_was_lost or eager_stance.is_lost:
                yield target.layer, _COMPILED
            elif stamp is not None and self._sink is None:
                is_alone = self._has_left_out(target)
                yield target.layer, _ALONE if is_alone else _EARLIER if stamp > 0 else _BY_HAND

    def _has_left_out(self, target: Target) -> bool:
        gradients = self._gradients.get(target.name)
        stamps = self._results.stamps(target.name) if gradients is None else gradients.stamps
        return self._state.has_left_out(target.layer, stamps)

    def warn_of_left_out(self, stacklevel: int) -> None:
        """Warn of calls of layers alone that are not among the values which are kept together."""
        state = self._state
        if not (state.left_out and state.keeps_together):
            return
        layers = dict.fromkeys(target.layer for target in state.targets if self._has_left_out(target))
        if layers:
            warnings.warn(
                f"Layer {examples(layers)} was called alone, outside of the model's own forward, as generate() calls "
                "an encoder, and that call is left out since an earlier forward has run the layer. Enter a block of "
                "its own for each, or make each a step of its own.",
                stacklevel=stacklevel,
            )

    def close(self, error: BaseException | None) -> None:
        """Close the sink; when that fails although the block has failed already, `error` gets a note of it."""
        self._root = None
        if self._sink is None or sys.is_finalizing():  # nothing can be written when the interpreter closes a generator
            return
        try:
            self._sink.close()
        except Exception as sink_error:
            if error is None:
                raise
            if sink_error is not error:  # a step may have raised it already
                add_note(error, f"The sink could not be closed either: {sink_error}")

    def _end(self, ids: list[RowId] | None, keep: Mapping[str, KeptColumn]) -> None:
        self.check_complete()
        self.warn_of_left_out(stacklevel=7)
        results = self._results
        columns = results.columns(as_recorded=self._sink is not None and self._sink._takes_inference)
        if self._sink is not None and (columns or ids is not None or keep):
            step = make_step(self._count, columns, ids, keep, self.checks or ())
            rows = (self._rows if columns and ids is None else None) or {step.rows}
            if step.rows not in rows and all((results.last_stamp(it) or 0) > 0 for it in results.recorded_names):
                got = f"{step.rows} in {next(iter(columns))!r} beside {min(rows)} in the model's call"
                advice = "Pass sequence_axis= if a layer has the batch elsewhere, or ids= if a sample has several rows."
                raise StepError("have the rows of its batch", got, advice)
            if not self._sink.reads_later:
                step.check_masks()
            self._sink.write(step)
            self._count += 1
