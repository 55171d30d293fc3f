"""What a sink is, and the one that keeps steps in memory."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, final

import torch
from torch import Tensor

from activation_extractor._format._stored_rows import Ragged, RowId
from activation_extractor.sinks._step import Step


class Sink(ABC):
    """Where finished steps go.

    To write a sink, implement `write`. ``capture(..., sink=MySink())`` calls it after each step that did not fail, in
    the thread of the step, and `close` when the block is left. A capture that is entered again writes further steps.
    `activation_extractor.testing.SinkTests` is a test suite for sinks.

    Attributes:
        reads_later: whether the sink itself calls `Step.check_masks`, which waits for an accelerator, some time before
            it trusts the values. False for nearly all sinks: their steps were checked before `write`.
    """

    reads_later: ClassVar[bool] = False
    _takes_inference: ClassVar[bool] = False  # whether values may be tensors of inference mode, as they were recorded

    def begin(self, about: Mapping[str, Any]) -> None:  # noqa: B027 - most sinks have no use for it
        """Learn what is captured; called whenever a block is entered, before a hook is attached.

        Args:
            about: ``model``, ``layers``, ``reducers``, ``mask``, ``sequence_axis`` and ``calls``, as JSON holds them.
        """

    @abstractmethod
    def write(self, step: Step) -> None:
        """Store a finished step; its tensors are the sink's own from now on."""

    def close(self) -> None:  # noqa: B027 - most sinks have nothing to do here
        """Store what is not stored yet; called whenever a block is left, after an error too."""


@final
class MemorySink(Sink):
    """Keeps every step in memory, on the device where it was reduced.

    Attributes:
        steps: the steps in order.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from activation_extractor import MemorySink, capture
        >>> model, sink = nn.Sequential(nn.Linear(4, 8)), MemorySink()
        >>> with capture(model, "0", sink=sink):
        ...     for _ in range(3):
        ...         _ = model(torch.randn(2, 4))
        >>> sink["0", "full"].shape
        torch.Size([6, 8])
    """

    def __init__(self) -> None:
        self.steps: list[Step] = []

    def write(self, step: Step) -> None:
        """Keep the step."""
        self.steps.append(step)

    def __getitem__(self, key: tuple[str, str]) -> Tensor | list[Tensor]:
        """The rows of a layer and reducer over all steps: one tensor, or a list with a tensor for each ragged row.

        Raises:
            KeyError: no step holds it.
        """
        parts = [step.values[key] for step in self.steps if key in step.values]
        if not parts:
            raise KeyError(key)
        if isinstance(parts[0], Ragged):
            return [row for part in parts if isinstance(part, Ragged) for row in part.rows()]
        return torch.cat([part for part in parts if isinstance(part, Tensor)])

    @property
    def ids(self) -> list[RowId]:
        """The ids of all rows."""
        return [row_id for step in self.steps for row_id in step.ids or ()]
