"""Loading the model that a command line names, with what turns its data into batches."""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from activation_extractor._streams import current_accelerator
from activation_extractor.cli._transformers import KINDS, load_transformers
from activation_extractor.errors import ArgumentError, ArgumentTypeError
from activation_extractor.runs._factories import built, find_object, is_factory_name

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

_TEXTS = ["Hello world.", "A second text."]


@dataclass(frozen=True)
class Loaded:
    """A model in ``eval()``, the name that it was loaded by, and sentences that its user has to know.

    Batches are made by `prepare`: a transformers tokenizer, image processor or feature extractor; a callable that is
    given a list of rows and returns what the model is called with; or None.
    """

    model: nn.Module
    prepare: Any
    name: str
    notes: tuple[str, ...] = ()


def load_model(
    name: str | os.PathLike[str],
    *,
    trust_remote_code: bool = False,
    dtype: str | None = None,
    device: Any = None,
) -> Loaded:
    """Load a model by a folder, a transformers id or a factory.

    Weights are read from safetensors, or by an unpickler that admits tensors alone: no code in them is run.

    Args:
        name: a folder with a ``config.json``; a transformers id such as ``gpt2``, from the local cache or the hub; or
            ``package.module:factory``, where the module may lie in the current directory and the factory is called
            without arguments and returns the model or ``(model, prepare)``.
        trust_remote_code: run the Python code that comes with a transformers model.
        dtype: ``"float32"``, ``"bfloat16"`` or ``"float16"``; ``"auto"`` is the one that the weights were saved in;
            None leaves it to the loader.
        device: where to move the model.

    Raises:
        ArgumentError: there is no such model, it cannot be loaded, or another argument is not usable.
        MissingExtraError: a folder or an id, and transformers is not installed.

    Example:
        >>> load_model("torch.nn:ReLU").model
        ReLU()
    """
    if not isinstance(name, str | os.PathLike):
        raise ArgumentTypeError("model", KINDS, name)
    name = os.fspath(name)
    if dtype not in (None, "auto", *DTYPES):
        raise ArgumentError("dtype", f"be one of {', '.join(map(repr, ('auto', *DTYPES)))}", dtype)
    place = None if device is None else _check_device(device)
    if ":" in name and not Path(name).is_dir():
        loaded = Loaded(*_from_factory(name), name)
        if dtype in DTYPES:
            loaded.model.to(DTYPES[dtype])
    else:
        model, prepare, notes = load_transformers(name, bool(trust_remote_code), DTYPES.get(dtype or "", dtype))
        loaded = Loaded(model, prepare, name, notes)
    loaded.model.to(place).eval()
    return loaded


def example_batch(loaded: Loaded) -> Mapping[str, Any] | None:
    """A small batch to run the model on once, on its device: two short texts, a grey image, or a second of silence.

    Without something of transformers to prepare it, what the model itself proposes; None when it proposes nothing.
    """
    batch = _example(loaded.model, loaded.prepare)
    if batch is None:
        return None
    parameters, config = inspect.signature(loaded.model.forward).parameters, getattr(loaded.model, "config", None)
    if "decoder_input_ids" in parameters and getattr(config, "is_encoder_decoder", False):
        rows = len(next(iter(batch.values())))
        batch.setdefault("decoder_input_ids", torch.zeros(rows, 1, dtype=torch.long))
    takes_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    batch = {key: value for key, value in batch.items() if takes_all or key in parameters}
    weights = next((weight for weight in loaded.model.parameters() if weight.is_floating_point()), None)
    for key, value in batch.items():
        if isinstance(value, Tensor) and weights is not None:
            batch[key] = value.to(weights.device, weights.dtype if value.is_floating_point() else None)
    return batch


def _from_factory(name: str) -> tuple[nn.Module, Any]:
    """The model that ``package.module:factory`` returns, and what prepares its batches."""
    if not is_factory_name(name):
        raise ArgumentError("model", KINDS, name)
    return built(find_object("model", name), name)


def _example(model: nn.Module, prepare: Any) -> dict[str, Any] | None:
    if "transformers" in sys.modules and prepare is not None:
        from transformers.feature_extraction_utils import FeatureExtractionMixin
        from transformers.image_processing_utils import BaseImageProcessor
        from transformers.tokenization_utils_base import PreTrainedTokenizerBase

        if isinstance(prepare, PreTrainedTokenizerBase):
            pads = prepare.pad_token is not None
            return dict(prepare(_TEXTS if pads else _TEXTS[:1] * 2, padding=pads, return_tensors="pt"))
        if isinstance(prepare, BaseImageProcessor):
            from PIL import Image

            grey = Image.new("RGB", (64, 64), (128, 128, 128))  # pixels; the image processor resizes it
            return dict(prepare(images=[grey], return_tensors="pt"))
        if isinstance(prepare, FeatureExtractionMixin):
            rate = prepare.sampling_rate
            return dict(prepare([torch.zeros(rate).numpy()], sampling_rate=rate, return_tensors="pt"))
    proposed = getattr(model, "dummy_inputs", None)
    main = getattr(model, "main_input_name", None)
    return dict(proposed) if isinstance(proposed, Mapping) and main in proposed else None


def _check_device(device: Any) -> torch.device:
    accelerator, devices = current_accelerator(), ["cpu"]
    if accelerator is not None:
        devices += [f"{accelerator.type}:{index}" for index in range(torch.accelerator.device_count())]
    try:
        place = torch.device(device)
        torch.zeros(1, device=place).item()  # not on 'meta'
    except Exception as error:  # RuntimeError, AssertionError, NotImplementedError: each backend has its own
        raise ArgumentError("device", f"be one of {', '.join(map(repr, devices))}", device) from error
    return place
