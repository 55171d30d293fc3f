"""What makes batches of rows."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from activation_extractor.cli.inputs import Row
from activation_extractor.errors import ActivationError


class Encoder(ABC):
    """Makes what a model is called with of the rows of a data set: first pieces of each row, then batches of pieces.

    Attributes:
        rows_at_once: how many rows are prepared together.
        batch_rows: how many rows a batch has at most, where rows keep their order.
        has_tokens: whether pieces have a length, and are sorted by it.
        makes_pooling_mask: whether batches say which positions count.
    """

    has_tokens = False
    makes_pooling_mask = False
    rows_at_once: int
    batch_rows: int

    @abstractmethod
    def prepare(self, rows: Sequence[Row]) -> Sequence[list[Any] | ActivationError]:
        """For each row its pieces, or why it has none."""

    @abstractmethod
    def batch(self, pieces: Sequence[Any]) -> dict[str, Any]:
        """What the model is called with."""

    def length(self, piece: Any) -> int:  # noqa: ARG002
        """How many positions a piece has; 0 where that is not known."""
        return 0

    def plan(self, pieces: Sequence[Any]) -> list[list[int]]:
        """Which pieces are batched together."""
        return [list(range(len(pieces)))]
