"""Loading the model that a command line names, with what turns its data into batches."""

from __future__ import annotations

import importlib
import inspect
import os
import pickle
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from activation_extractor._display import examples, quiet
from activation_extractor._streams import current_accelerator
from activation_extractor.errors import ActivationError, ArgumentError, ArgumentTypeError, MissingExtraError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

_KINDS = "be a folder with a config.json, the id of a transformers model, or 'package.module:factory'"
_TEXTS = ["Hello world.", "A second text."]
_IMAGE_SIZE = 64  # pixels a side, before the image processor resizes it


@dataclass(frozen=True)
class Loaded:
    """A model, ready to run.

    Attributes:
        model: in ``eval()``.
        prepare: what makes a batch: a transformers tokenizer, image processor or feature extractor; a callable that is
            given a list of rows and returns what the model is called with; or None.
        name: what it was loaded by.
        notes: sentences that its user has to know, weights that are random numbers above all.
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
        raise ArgumentTypeError("model", _KINDS, name)
    name = os.fspath(name)
    if dtype not in (None, "auto", *DTYPES):
        raise ArgumentError("dtype", f"be one of {', '.join(map(repr, ('auto', *DTYPES)))}", dtype)
    place = None if device is None else _check_device(device)
    if ":" in name and not Path(name).is_dir():
        loaded = _from_factory(name)
        if dtype in DTYPES:
            loaded.model.to(DTYPES[dtype])
    else:
        loaded = _from_transformers(name, trust_remote_code, DTYPES.get(dtype or "", dtype))
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
    takes_all = any(one.kind is one.VAR_KEYWORD for one in parameters.values())
    return {key: _placed(value, loaded.model) for key, value in batch.items() if takes_all or key in parameters}


def _from_factory(name: str) -> Loaded:
    module_name, _, attribute = name.partition(":")
    if not all(part.isidentifier() for part in (*module_name.split("."), attribute)):
        raise ArgumentError("model", _KINDS, name)
    factory = _attribute(_import(module_name, name), attribute, name)
    if not callable(factory) or isinstance(factory, nn.Module):
        raise ArgumentError(
            "model", "name a function that returns the model", name, f"It is a {type(factory).__name__}."
        )
    try:
        result = factory()
    except ActivationError:  # an error of ours says what to do already
        raise
    except Exception as error:
        raise ArgumentError("model", "name a factory that runs", name, f"It raised {_told(error)}") from error
    model, prepare = result if isinstance(result, tuple) and len(result) == 2 else (result, None)
    if not isinstance(model, nn.Module) or not (prepare is None or callable(prepare)):
        condition = "be a torch.nn.Module, or one and what prepares its batches"
        raise ArgumentTypeError(f"what {name!r} returns", condition, result)
    return Loaded(model, prepare, name)


def _import(module_name: str, name: str) -> Any:
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)  # as `python -m` does; a model may import more of its own when it runs
    importlib.invalidate_caches()
    try:
        return importlib.import_module(module_name)
    except ActivationError:
        raise
    except Exception as error:
        raise ArgumentError("model", "name a module that can be imported", name, _told(error)) from error


def _attribute(module: Any, attribute: str, name: str) -> Any:
    if hasattr(module, attribute):
        return getattr(module, attribute)
    close = get_close_matches(attribute, dir(module), n=3)
    advice = f"Close matches: {examples(close)}." if close else ""
    raise ArgumentError("model", f"name something that {module.__name__!r} holds", name, advice)


def _from_transformers(name: str, trust_remote_code: bool, dtype: Any) -> Loaded:
    is_folder = Path(name).is_dir()
    if is_folder and not Path(name, "config.json").is_file():
        raise ArgumentError("model", _KINDS, name, "The folder holds no config.json.")
    if find_spec("transformers") is None:
        raise MissingExtraError(f"The model {name!r}", "demo", "transformers")
    from transformers import AutoConfig, AutoModel

    trust: dict[str, Any] = {"trust_remote_code": bool(trust_remote_code)}  # left out, transformers asks on stdin
    options = trust if dtype is None else {**trust, _dtype_argument(): dtype}
    with quiet(shows_downloads=not is_folder):
        try:
            config = AutoConfig.from_pretrained(name, **trust)
            model, info = AutoModel.from_pretrained(
                name, config=config, weights_only=True, output_loading_info=True, **options
            )
        except Exception as error:  # of every kind: from the hub, the files, torch and the model's own code
            raise _refusal(name, error) from error
        prepare, lacks = _find_prepare(name, model, trust)
    return Loaded(model, prepare, name, (*_random_weights(info), *lacks))


def _dtype_argument() -> str:
    """What `from_pretrained` calls the dtype of the weights."""
    from transformers import __version__

    return "dtype" if tuple(map(int, __version__.split(".")[:2])) >= (4, 56) else "torch_dtype"


def _refusal(name: str, error: Exception) -> ArgumentError:
    """One sentence for transformers' essay."""
    from huggingface_hub import errors as hub
    from huggingface_hub.constants import HF_HUB_OFFLINE

    chain = list(_chain(error))
    why = "HF_HUB_OFFLINE is set" if HF_HUB_OFFLINE else "huggingface.co was not reached"
    reasons = {
        hub.GatedRepoError: f"Its authors ask for consent first, at huggingface.co/{name}.",
        hub.RepositoryNotFoundError: "There is no such folder, and no such public model on huggingface.co.",
        hub.LocalEntryNotFoundError: f"There is no such folder, it is not in the cache, and {why}.",
        hub.HFValidationError: "There is no such folder.",
    }
    for kind, reason in reasons.items():
        if any(isinstance(one, kind) for one in chain):
            return ArgumentError("model", _KINDS, name, reason)
    if "trust_remote_code" in str(error):
        advice = "Read that code, then pass trust_remote_code (--trust-remote-code)."
        return ArgumentError("model", "run without code of its own", name, advice)
    if any(isinstance(one, pickle.UnpicklingError) for one in chain):
        advice = "What they hold beside tensors is never run: convert them to safetensors."
        return ArgumentError("model", "have weights that hold tensors alone", name, advice)
    return ArgumentError("model", "be one that transformers loads", name, _told(error, briefly=True))


def _chain(error: BaseException) -> Iterator[BaseException]:
    """The error, what it came of, what that came of, ...: transformers tells the same one from deeper and deeper."""
    yield error
    before = error.__cause__ or error.__context__
    if before is not None:
        yield from _chain(before)


def _random_weights(info: Mapping[str, Any]) -> tuple[str, ...]:
    missing = sorted(info["missing_keys"])
    note = f"Random numbers stand for what is not among the saved weights: {examples(missing)}."
    return (note,) if missing else ()


def _find_prepare(name: str, model: nn.Module, trust: dict[str, Any]) -> tuple[Any, tuple[str, ...]]:
    """What prepares the main input of a transformers model, and a note when there is nothing."""
    from transformers import AutoFeatureExtractor, AutoImageProcessor, AutoTokenizer

    options = dict(trust)
    kind, loader = "feature extractor", AutoFeatureExtractor
    if model.main_input_name == "input_ids":
        kind, loader = "tokenizer", AutoTokenizer
    elif model.main_input_name == "pixel_values":
        kind, loader = "image processor", AutoImageProcessor
        options |= {} if find_spec("torchvision") else {"backend": "pil"}
    try:
        prepare = loader.from_pretrained(name, **options)
    except Exception as error:  # the files are missing, or a package that reads them
        return None, (f"No {kind} was loaded with it ({_told(error, briefly=True).rstrip('.')}).",)
    if kind == "tokenizer" and len(prepare) <= len(prepare.all_special_ids):
        return None, ("No tokenizer was loaded with it (its vocabulary is not there).",)
    return prepare, ()


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

            grey = Image.new("RGB", (_IMAGE_SIZE, _IMAGE_SIZE), (128, 128, 128))
            return dict(prepare(images=[grey], return_tensors="pt"))
        if isinstance(prepare, FeatureExtractionMixin):
            rate = prepare.sampling_rate
            return dict(prepare([torch.zeros(rate).numpy()], sampling_rate=rate, return_tensors="pt"))
    proposed = getattr(model, "dummy_inputs", None)
    main = getattr(model, "main_input_name", None)
    return dict(proposed) if isinstance(proposed, Mapping) and main in proposed else None


def _placed(value: Any, model: nn.Module) -> Any:
    """The value on the model's device, in the model's dtype if it is a floating-point tensor."""
    weights = next((one for one in model.parameters() if one.is_floating_point()), None)
    if not isinstance(value, Tensor) or weights is None:
        return value
    return value.to(weights.device, weights.dtype if value.is_floating_point() else None)


def _check_device(device: Any) -> torch.device:
    found = current_accelerator()
    options = [
        "cpu",
        *([] if found is None else [f"{found.type}:{i}" for i in range(torch.accelerator.device_count())]),
    ]
    try:
        place = torch.device(device)
        torch.zeros(1, device=place).item()  # not on 'meta'
    except Exception as error:  # RuntimeError, AssertionError, NotImplementedError: each backend has its own
        raise ArgumentError("device", f"be one of {', '.join(map(repr, options))}", device) from error
    return place


def _told(error: Exception, *, briefly: bool = False) -> str:
    """An error's type and message on one line, or the message's first sentence, ending in a full stop."""
    text = " ".join(str(error).split())
    text = text.split(". ")[0] if briefly else text
    return f"{type(error).__name__}{text and ': ' + text}".rstrip(".") + "."
