"""Batches that do not fit into memory, or have rows that cannot be run: they are run in pieces."""

from __future__ import annotations

import gc
import traceback
import warnings
from collections.abc import Callable

import torch

from activation_extractor._display import plural
from activation_extractor.errors import add_note
from activation_extractor.runs._batches import Batch

_TEXTS = ("out of memory", "can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED")  # of RuntimeErrors
_TRIED_ROWS = 100
_OF_DEVICE = ("CUDA error", "HIP error", "device-side assert")  # in errors after which it computes nothing more
_LOST = "After this error the device computes nothing: rows were not tried alone. On the CPU, the row would be found."

Failed = Callable[[Exception], None]


class Pieces:
    """Runs batches; one that does not fit into memory is halved until it does, and later ones begin at that size.

    With `skips_rows`, a batch that raises another error is halved until single rows are left that raise it; these are
    left out, and so is a single row that does not fit.
    """

    def __init__(self, *, skips_rows: bool = False) -> None:
        self._skips_rows = skips_rows
        self._most: int | None = None  # elements of a batch that fits; None as long as all do
        self.is_final = False  # set it where what is raised from then on is not to be tried again
        self._has_run = False
        self._failed: list[Exception] = []  # of rows that were left out as long as none has run

    def run(self, batch: Batch, forward: Callable[[Batch], None], leave_out: Failed | None = None) -> None:
        """Call `forward` with a batch, or with pieces of it in their order; raises what it raises.

        `leave_out` is called in place of the piece that is a row to be left out. What was raised before a piece ended
        is raised again where the batch cannot be cut, or the device is of no use any more; and once a hundred rows were
        to be left out and none has run.
        """
        rows = batch.rows or 1
        pieces = 1 if self._most is None else max(1, min(rows, -(-batch.elements // self._most)))
        if pieces == 1:
            if not self._fails(batch, forward, leave_out):
                return
            pieces = 2
        size = -(-rows // pieces)
        for start in range(0, rows, size):
            self.run(batch.part(range(start, min(start + size, rows))), forward, leave_out)

    def _fails(self, batch: Batch, forward: Callable[[Batch], None], leave_out: Failed | None) -> bool:
        """Call `forward`; returns whether the batch has to be cut."""
        self.is_final = False
        try:
            forward(batch)
        except Exception as error:
            if self.is_final:
                raise
            is_memory = is_out_of_memory(error)
            if leave_out and self._skips(error, is_memory=is_memory):
                if batch.rows == 1:
                    self._note_failed(error)
                    leave_out(error)
                    return False
            elif not is_memory:
                raise
            if why := _cannot_cut(batch):
                add_note(error, f"The batch was not run in smaller pieces: {why}.")
                raise
        else:
            self._has_run, self._failed = True, []
            return False
        self._make_room(batch, is_memory=is_memory)
        return True

    def _skips(self, error: Exception, *, is_memory: bool) -> bool:
        """Whether rows that raise an error are left out; not where each later one would raise it too."""
        is_lost = not is_memory and isinstance(error, RuntimeError) and any(text in str(error) for text in _OF_DEVICE)
        if is_lost and self._skips_rows:
            add_note(error, _LOST)
        return self._skips_rows and not is_lost

    def _make_room(self, batch: Batch, *, is_memory: bool) -> None:
        if not is_memory:
            return
        if self._most is None:
            text = f"A batch of {plural(batch.rows or 1, 'row')} does not fit into memory. It is run in smaller pieces,"
            warnings.warn(f"{text} and so are others of its size; rows and their order stay the same.", stacklevel=2)
        self._most = max(1, -(-batch.elements // 2))
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def check_ran(self) -> None:
        """Raise what the first row raised that was left out, if there is one and none has run."""
        if self._failed:
            add_note(self._failed[0], f"None of the {plural(len(self._failed), 'row')} could be run.")
            raise self._failed[0]

    def _note_failed(self, error: Exception) -> None:
        _forget_frames(error)
        if self._has_run:
            return
        self._failed.append(error)
        if len(self._failed) == _TRIED_ROWS:
            add_note(self._failed[0], f"None of the first {_TRIED_ROWS} rows could be run.")
            raise self._failed[0]


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that a device or the machine has no memory left."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _TEXTS)


def _forget_frames(error: BaseException | None) -> None:
    """Forget the local variables of what was called: tensors that are as large as the batch."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__


def _cannot_cut(batch: Batch) -> str:
    """Why a batch cannot be cut; empty where it can."""
    if batch.rows is None:
        return "how many rows it has cannot be told, give them ids"
    if batch.rows < 2:
        return "it has a single row"
    try:
        batch.part(range(1))
    except ValueError as error:
        return f"it holds {error}"
    return ""
