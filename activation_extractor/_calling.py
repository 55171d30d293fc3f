"""Calling a model with the batches of a data set."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from activation_extractor.errors import ArgumentTypeError


def call_model(model: nn.Module, batch: Any) -> None:
    """Call a model with a batch, its tensors moved to the model's device.

    Raises:
        ArgumentTypeError: the batch is neither a mapping, a tuple nor a tensor.
    """
    place = next((tensor.device for tensor in (*model.parameters(), *model.buffers())), None)

    def moved(value: Any) -> Any:
        return value.to(place) if isinstance(value, Tensor) and place is not None else value

    if isinstance(batch, Mapping):
        model(**{name: moved(value) for name, value in batch.items()})
    elif isinstance(batch, tuple | list):
        model(*map(moved, batch))
    elif isinstance(batch, Tensor):
        model(moved(batch))
    else:
        raise ArgumentTypeError("a batch", "be a mapping, a tuple or a tensor", type(batch).__name__)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in ``eval()``; afterwards each module's training flag as it was."""
    flags = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, flag in flags:
            module.training = flag
