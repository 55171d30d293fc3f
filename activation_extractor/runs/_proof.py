"""The proof that a run is the one that is stored: a stored batch is run again and compared.

Digests are the fast answer, and see weights, settings and inputs. They do not see what a hook, a switched-off adapter,
packed or offloaded weights, or other code of a forward change: what the model computes shows all of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from activation_extractor._format._codecs import Codec
from activation_extractor._format._manifest import read_manifest
from activation_extractor._format._shards import REPAIR
from activation_extractor.errors import OtherRunError, StoreError, add_note
from activation_extractor.runs._arithmetic import computed_with, reasons_to_differ, threads_of
from activation_extractor.runs._batch_columns import (
    BatchColumns,
    Difference,
    computed_columns,
    find_difference,
    stored_columns,
)
from activation_extractor.runs._caller import warn_caller
from activation_extractor.runs._devices import devices
from activation_extractor.runs._stored_unit import StoredUnit
from activation_extractor.sinks import Step
from activation_extractor.sinks._step import join, part_of
from activation_extractor.store._verify import altered

_AGAIN = "A batch that is stored was run again, to prove that the run is the one that is stored."
_UNSTABLE = "two runs of the batch give other bits"
_RANDOM = "two runs of the batch give other values, as with random numbers in the model or a reducer"
_OTHER_BATCH = "its rows were in a batch with others"
_DRAWS = "it draws random numbers, and would go on with others than a run that was not interrupted"


class Proof:
    """Runs one stored batch again, and compares it.

    What differs is raised when the unit of the batch has ended: that its batches are other ones is found by then, and
    is the better answer.

    Attributes:
        computed_with: what computes the run.
        is_open: whether a batch is still to be run again.
        is_done: whether one was run again, and its unit has ended without an error.
    """

    def __init__(self, folder: Path, codec: Codec, model: nn.Module) -> None:
        self.computed_with, self.is_open, self.is_done = computed_with(model), True, False
        self._folder, self._codec, self._devices = folder, codec, devices(model)
        self._unit: StoredUnit | None = None  # of the batch that was run again
        self._steps: list[Step] = []  # of the batch that is run again, one for each of its pieces
        self._rows = 0  # of the current unit, in the batches that were run again
        self._difference = self._note = ""
        self._is_random = False

    def take(self, step: Step) -> None:
        """Take a step that a forward gave."""
        self._steps.append(step)

    def run(
        self,
        unit: StoredUnit,
        rows: Sequence[int] | None,
        indices: Sequence[int] | None,
        forward: Callable[[], None],
        *,
        is_same_batch: bool,
    ) -> None:
        """Run the next batch of a unit again.

        Args:
            unit: the unit.
            rows: of the batch in the unit; None means the rows after the last batch's.
            indices: which of the batch's rows these are; None means all.
            forward: runs the batch, and hands its step to `take`, unless the batch gives no rows.
            is_same_batch: whether the rows were in a batch with the same others when they were stored.
        """

        def run_again() -> BatchColumns:
            self._steps = []
            forward()
            if not self._steps:
                return {}
            step = join(self._steps)
            self._steps = [step if indices is None else part_of(step, indices)]
            return computed_columns(self._steps[0], self._codec)

        with _running_again(self._devices) as has_drawn:
            computed = run_again()
            count = sum(step.rows for step in self._steps)
            rows = rows or range(self._rows, self._rows + count)
            self._rows += count
            stored = stored_columns(unit, rows)
            self.is_open, self._unit = not (stored or computed), unit
            different = find_difference(stored, computed, is_exact=True)
            if different is not None:
                reasons = [] if is_same_batch else [_OTHER_BATCH]
                self._judge(stored, computed, run_again, different, [unit.row_name(row) for row in rows], reasons)
            elif has_drawn():
                self._is_random = find_difference(computed, run_again(), is_exact=False) is not None
        self._steps = []  # their tensors may be on an accelerator

    def check_further(self) -> None:
        """Raise an OtherRunError where the values of further batches would not be those of a run in one go."""
        if self._is_random:
            raise OtherRunError(self._folder, [f"what the model computes ({_DRAWS})"])

    def end(self, unit: StoredUnit) -> None:
        """End the unit; where it is that of the batch that was run again, warn if this has other bits now.

        Raises:
            OtherRunError: its batch has other values now.
            StoreError: they are other ones because the shard was damaged.
        """
        if not self.is_open and unit is not self._unit:
            return  # they may end in another order than they begin
        if self.is_open and self._rows != unit.rows and not self._difference:
            self._difference = f"{self._rows} rows in place of {unit.rows}"
        if self._difference:
            for damage in altered(unit.reader.shard(unit.path)):
                raise StoreError(damage.path, "hold what was written", damage.detail, REPAIR)
            raise OtherRunError(self._folder, [f"what the model computes ({self._difference})"])
        if self._note:
            text = f"{str(self._folder)!r} is resumed, although its values differ by rounding ({self._note})."
            warn_caller(text)
        self._rows, self._note, self.is_done = 0, "", not self.is_open

    def _judge(
        self,
        stored: BatchColumns,
        computed: BatchColumns,
        run_again: Callable[[], BatchColumns],
        different: Difference,
        rows: Sequence[str],
        reasons: list[str],
    ) -> None:
        """Decide what it means that a batch has other bits, where there are `reasons` for it or none."""
        manifest = read_manifest(self._folder).content
        reasons = reasons + reasons_to_differ(manifest, self.computed_with)
        with threads_of(manifest) as is_another_number:
            if is_another_number:
                computed = run_again()
                first = find_difference(stored, computed, is_exact=True)
                if first is None:
                    return
                different = first
            if not reasons:
                again = run_again()
                if find_difference(computed, again, is_exact=True) is not None:
                    is_near = find_difference(computed, again, is_exact=False) is None
                    reasons = [_UNSTABLE if is_near else _RANDOM]
        far = find_difference(stored, computed, is_exact=False) if reasons else different
        text = "; ".join([(far or different).describe(rows), *reasons])
        self._difference, self._note = (text, "") if far else ("", text)


@contextmanager
def _running_again(on: Iterable[torch.device]) -> Iterator[Callable[[], bool]]:
    """Leave the random numbers of torch and of these devices as they were; an error says what was run.

    It gives a function that says whether random numbers were drawn.
    """
    accelerators = [device for device in on if device.type in ("cuda", "xpu")]
    kind = accelerators[0].type if accelerators else "cuda"

    def states() -> list[Tensor]:
        return [torch.get_rng_state(), *(torch.get_device_module(kind).get_rng_state(it) for it in accelerators)]

    before = states()
    try:
        with torch.random.fork_rng(accelerators, device_type=kind):
            yield lambda: not all(map(torch.equal, before, states()))
    except Exception as error:
        add_note(error, _AGAIN)
        raise
