"""The microbatches of a pipeline's stage, whose values are those of one batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from activation_extractor._hooks._context import unrecorded
from activation_extractor._hooks._forwards import RunForward
from activation_extractor._private_torch import microbatch, uses_pipelines
from activation_extractor.activations._forward_state import ForwardState
from activation_extractor.activations._options import Options
from activation_extractor.activations._recorded_values import Key, Recorded
from activation_extractor.errors import StepError
from activation_extractor.layers._selections import Target
from activation_extractor.reducers import full
from activation_extractor.reducers._layouts import Layouts

_Piece = tuple[Tensor, Tensor | None]  # a value and its mask


class Microbatches:
    """Sets the values of microbatches aside while the next one runs, and joins them along the batch."""

    def __init__(
        self,
        root: nn.Module,
        targets: Sequence[Target],
        options: Options,
        state: ForwardState,
        recorded: Recorded,
        take_any_rows: Callable[[], None],
    ) -> None:
        self._options, self._state, self._recorded = options, state, recorded
        self._take_any_rows = take_any_rows  # of a step, which has those of several calls
        self._targets, self._layouts = {it.name: it for it in targets}, Layouts(options.sequence_axis, root)
        self._pieces: dict[Key, list[_Piece]] = {}
        self._last = (0, -1)  # the stage and the number of the latest one

    @classmethod
    def of(cls, root: nn.Module, targets: Sequence[Target], options: Options, *state: Any) -> Microbatches | None:
        """What a block needs; None in a process without pipelines."""
        return cls(root, targets, options, *state) if uses_pipelines() else None

    def around(self, run: RunForward) -> RunForward:
        """What runs a forward as `run` does, and sees to it that those of microbatches are kept together."""

        def run_microbatch(call: Any, /, *args: Any, **kwargs: Any) -> Any:
            part = microbatch()
            if part is True:
                return unrecorded(partial(call, *args, **kwargs))
            if part is not False and self._state.call is None:
                self._begin(part)
            return run(call, *args, **kwargs)

        return run_microbatch

    def _begin(self, part: tuple[int, int]) -> None:
        """A microbatch is about to run; that its values cannot be joined with those before is an error later.

        An error now would leave the processes of other stages waiting for what this one sends.
        """
        before, self._last = self._last, part
        if not part[1] or part != (before[0], before[1] + 1):
            self._pieces.clear()
            return
        if not self._state.in_step:  # each is a step of its own
            return
        self._take_any_rows()
        if self._options.calls == "join":
            self._refuse("hold one sequence when calls are joined", "Pass calls='last', which joins their rows.")
        elif self._options.calls == "last" and any(it.side == "gradient" for it in self._targets.values()):
            self._refuse(
                "hold whole batches when gradients are recorded", "Pass calls='all', which keeps those of each."
            )
        elif self._options.calls == "last":
            for key, piece in self._recorded.take_all():
                self._pieces.setdefault(key, []).append(piece)
            self._state.was_read = True  # they are not replaced

    def _refuse(self, condition: str, advice: str) -> None:
        self._state.refused = StepError(condition, "microbatches of a pipeline", advice)

    def join(self) -> None:
        """Join what was set aside with the values of the latest microbatch; raises what was refused."""
        self._state.check_refused()
        pieces, self._pieces = self._pieces, {}
        for key, several in pieces.items():
            self._recorded.prepend(key, several, self._joined(key))

    def forget(self) -> None:
        """Let go of what was set aside: a new step begins, or nothing is wanted any more."""
        self._pieces = {}

    def _joined(self, key: Key) -> Callable[[list[Tensor]], Tensor]:
        """What joins the values of a key.

        Raises:
            StepError: by which axis is not known.
        """
        target = self._targets.get(key[0])
        is_whole = self._options.reducers.get(key[1], full) is full

        def join(parts: list[Tensor]) -> Tensor:
            axis = 0
            if is_whole and target is not None and parts[0].dim() == 3 and not parts[0].is_nested:
                layout = self._layouts.of(target)
                axis = int((layout.of_three if layout.axis is None else layout.axis) == 0)
            shapes = {(*part.shape[:axis], *part.shape[axis + 1 :]) for part in parts if not part.is_nested}
            if len(shapes) != 1 or any(part.is_nested or not part.dim() for part in parts):
                advice = "Pass calls='all', which keeps the values of each."
                raise StepError("hold microbatches that are alike", f"others of layer {key[0]!r}", advice)
            return torch.cat(parts, axis)

        return join
