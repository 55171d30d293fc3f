"""What makes batches of values: as they are, by a callable beside the model, or by a processor of transformers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from activation_extractor.cli._encoder import Encoder
from activation_extractor.cli._forward_arguments import first_argument
from activation_extractor.cli.inputs import Kind, Row
from activation_extractor.cli.inputs._images import load_image
from activation_extractor.errors import ActivationError, ArgumentError
from activation_extractor.layers._modules import unwrap


class ValueEncoder(Encoder):
    """Rows in their order: `read` makes a piece of a row's value, `make` what the model is called with of pieces."""

    def __init__(
        self, batch_rows: int, make: Callable[[list[Any]], dict[str, Any]], read: Callable[[Any], Any]
    ) -> None:
        self.batch_rows = self.rows_at_once = batch_rows
        self._make, self._read = make, read
        self._decoder_start: int | None = None

    def prepare(self, rows: Sequence[Row]) -> list[list[Any] | ActivationError]:
        """For each row its value, or why it cannot be read."""
        made: list[list[Any] | ActivationError] = []
        for row in rows:
            try:
                made.append([self._read(row.value)])
            except ActivationError as error:
                made.append(error)
        return made

    def batch(self, pieces: Sequence[Any]) -> dict[str, Any]:
        """What the model is called with."""
        made = self._make(list(pieces))
        if self._decoder_start is None:
            return made
        return {**made, "decoder_input_ids": torch.full((len(pieces), 1), self._decoder_start)}

    def start_decoder(self, token: int) -> None:
        """Give the model's decoder a token to begin with, for each row."""
        self._decoder_start = token


def value_encoder(kind: Kind, model: nn.Module, prepare: Any, batch_rows: int) -> ValueEncoder:
    """The encoder of rows that have no tokens; `prepare` is what comes with the model.

    Raises:
        ArgumentError: the model cannot be given rows of this kind.
    """
    options: dict[str, Any] = {"return_tensors": "pt"} if is_processor(prepare) else {}
    read: Callable[[Any], Any] = np.array
    if kind == "text":
        if prepare is None or is_processor(prepare):
            refuse(model, "a tokenizer for text", "tokenizer")
        read, options = str, {}
    elif kind == "image":
        if prepare is None or is_tokenizer(prepare):
            refuse(model, "an image processor", "image processor")
        read = load_image
    elif prepare is None or is_tokenizer(prepare):
        return ValueEncoder(batch_rows, lambda arrays: {first_argument(model): _tensor(arrays)}, np.asarray)
    elif hasattr(prepare, "sampling_rate"):
        options |= {"padding": True, "sampling_rate": prepare.sampling_rate} if options else {}
    return ValueEncoder(batch_rows, lambda values: checked(prepare(values, **options), model), read)


def is_tokenizer(prepare: Any) -> bool:
    """Whether this is a tokenizer of transformers, decided by what is used of it."""
    return hasattr(prepare, "pad") and hasattr(prepare, "model_max_length")


def is_processor(prepare: Any) -> bool:
    """Whether this is something else of transformers that prepares inputs: images, sound."""
    return hasattr(prepare, "model_input_names") and not is_tokenizer(prepare)


def refuse(model: nn.Module, needed: str, noun: str) -> None:
    advice = f"Let the factory return (model, {noun}), or (model, callable)."
    raise ArgumentError("the model", f"come with {needed}", type(unwrap(model)).__name__, advice)


def _tensor(arrays: Sequence[np.ndarray[Any, Any]]) -> Tensor:
    array = np.stack(arrays)
    try:
        return torch.from_numpy(array.astype(array.dtype.newbyteorder("="), copy=False))
    except TypeError as error:
        advice = "Save it as float32, or as integers."
        raise ArgumentError("input", "hold numbers that torch has", str(array.dtype), advice) from error


def checked(made: Any, model: nn.Module) -> dict[str, Any]:
    """What a callable made of rows, as keyword arguments."""
    if isinstance(made, Tensor):
        return {first_argument(model): made}
    if not isinstance(made, Mapping):
        raise ArgumentError("what the callable beside the model returns", "be a mapping or a tensor", made)
    return dict(made)
