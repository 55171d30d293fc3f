"""Batches that do not fit into memory, run in pieces."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable

import torch

from activation_extractor._display import plural
from activation_extractor.errors import add_note
from activation_extractor.runs._batches import Batch

_TEXTS = (
    "out of memory",
    "can't allocate memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
)  # of RuntimeErrors that are no subclass


class Pieces:
    """Runs batches; one that does not fit into memory is halved until it does, and later ones begin at that size."""

    def __init__(self) -> None:
        self._most: int | None = None  # elements of a batch that fits; None as long as all do

    def run(self, batch: Batch, forward: Callable[[Batch], None]) -> None:
        """Call `forward` with a batch, or with pieces of it in their order; raises what it raises.

        What was raised before a piece ended is raised again where the batch cannot be cut, or is a single row.
        """
        rows = batch.rows or 1
        pieces = 1 if self._most is None else min(rows, -(-batch.elements // self._most))
        if pieces == 1:
            failed = self._try(batch, forward)
            if failed:
                self.run(batch, forward)  # in pieces, once nothing holds what did not fit
            return
        size = -(-rows // pieces)
        for start in range(0, rows, size):
            self.run(batch.part(range(start, min(start + size, rows))), forward)

    def _try(self, batch: Batch, forward: Callable[[Batch], None]) -> bool:
        """Call `forward`; returns whether the batch has to be cut."""
        try:
            forward(batch)
            return False
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            why = self._cannot_cut(batch)
            if why:
                add_note(error, f"The batch was not run in smaller pieces: {why}.")
                raise
        rows = batch.rows or 1
        if self._most is None:
            text = f"A batch of {plural(rows, 'row')} does not fit into memory. It is run in smaller pieces, and so are"
            warnings.warn(f"{text} others of its size; the rows and their order stay the same.", stacklevel=2)
        self._most = -(-batch.elements // 2)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return True

    @staticmethod
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


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that a device or the machine has no memory left."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(text in str(error) for text in _TEXTS)
