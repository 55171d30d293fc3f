"""What makes batches of rows."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from activation_extractor.cli.inputs import Row
from activation_extractor.errors import ActivationError

EXAMPLES = 20  # texts that are tried in upper case


@dataclass
class Tally:
    """What was seen of texts.

    Attributes:
        rows: how many there were.
        characters: of all of them.
        positions: tokens that count, of all of them.
        cut: rows that were too long, and cut.
        windowed: rows that were too long, and are run in windows.
        unknown: characters that the tokenizer does not know.
        unknown_rows: rows that hold some.
        lost: rows that hold nothing else.
        examples: some texts that hold unknown characters.
    """

    rows: int = 0
    characters: int = 0
    positions: int = 0
    cut: int = 0
    windowed: int = 0
    unknown: int = 0
    unknown_rows: int = 0
    lost: int = 0
    examples: list[str] = field(default_factory=list)

    def add(self, other: Tally) -> None:
        """Count what another one counted."""
        for each in fields(self):
            setattr(self, each.name, getattr(self, each.name) + getattr(other, each.name))
        del self.examples[EXAMPLES:]


class Encoder(ABC):
    """Makes what a model is called with of the rows of a data set: first pieces of each row, then batches of pieces.

    Attributes:
        rows_at_once: how many rows are prepared together.
        batch_rows: how many rows a batch has at most, where rows keep their order.
        has_tokens: whether pieces have a length, and are sorted by it.
        makes_pooling_mask: whether batches say which positions count.
        pads: whether pieces of several lengths are in a batch.
        has_windows: whether pieces are windows of rows, and say which.
    """

    has_tokens = False
    makes_pooling_mask = False
    pads = False
    has_windows = False
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

    def start_decoder(self, token: int) -> None:  # noqa: B027
        """Give the model's decoder a token to begin with, for each row."""

    def count(self, values: Sequence[Any], pieces: Sequence[Sequence[Any]]) -> Tally:  # noqa: ARG002
        """What is seen of some rows, by their values and their pieces."""
        return Tally(len(values))

    def notes(self, tally: Tally, first: str) -> list[str]:  # noqa: ARG002
        """Sentences for a user; `first` is what comes before the number of rows that were counted."""
        return []
