"""Models of transformers by folder or id, with what prepares their inputs; only tensors are unpickled."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from torch import nn

from activation_extractor._display import examples, one_line, quiet
from activation_extractor.errors import ArgumentError, MissingExtraError

KINDS = "be a folder with a config.json, the id of a transformers model, or 'package.module:factory'"


def load_transformers(name: str, trust_remote_code: bool, dtype: Any) -> tuple[nn.Module, Any, tuple[str, ...]]:
    """Load a model by folder or id, what prepares its inputs (None if nothing does), and notes for its user.

    Raises:
        ArgumentError: there is no such model, or transformers cannot load it.
        MissingExtraError: transformers is not installed.
    """
    is_folder = Path(name).is_dir()
    if is_folder and not Path(name, "config.json").is_file():
        raise ArgumentError("model", KINDS, name, "The folder holds no config.json.")
    if find_spec("transformers") is None:
        raise MissingExtraError(f"The model {name!r}", "demo", "transformers")
    from transformers import AutoConfig

    trust = {"trust_remote_code": trust_remote_code}  # left out, transformers asks on stdin
    options: dict[str, Any] = trust if dtype is None else {**trust, "dtype": dtype}
    with quiet(shows_downloads=not is_folder):
        try:
            config = AutoConfig.from_pretrained(name, **trust)
            model, info = _auto_model(config).from_pretrained(
                name, config=config, weights_only=True, output_loading_info=True, **options
            )
        except Exception as error:  # of every kind: from the hub, the files, torch and the model's own code
            raise _refusal(name, error, trust_remote_code) from error
        prepare, notes = _find_prepare(name, model, trust)
    if missing := sorted(info["missing_keys"]):
        notes = (f"Random numbers stand for what is not among the saved weights: {examples(missing)}.", *notes)
    return model, prepare, notes


def _auto_model(config: Any) -> Any:
    """What loads a model by its configuration: an encoder that was saved alone has no decoder of random numbers."""
    from transformers import AutoModel, AutoModelForTextEncoding
    from transformers.models.auto.modeling_auto import MODEL_FOR_TEXT_ENCODING_MAPPING

    is_encoder = any(name.endswith("EncoderModel") for name in getattr(config, "architectures", None) or ())
    return AutoModelForTextEncoding if is_encoder and type(config) in MODEL_FOR_TEXT_ENCODING_MAPPING else AutoModel


def _refusal(name: str, error: Exception, trusts_code: bool) -> ArgumentError:
    """What is wrong with a model, in one sentence where transformers writes an essay."""
    from huggingface_hub import errors as hub
    from huggingface_hub.constants import HF_HUB_OFFLINE

    causes = list(_causes(error))
    why = "HF_HUB_OFFLINE is set" if HF_HUB_OFFLINE else "huggingface.co was not reached"
    reasons = {
        hub.GatedRepoError: f"Its authors ask for consent first, at huggingface.co/{name}.",
        hub.RepositoryNotFoundError: "There is no such folder, and no such public model on huggingface.co.",
        hub.LocalEntryNotFoundError: f"There is no such folder, it is not in the cache, and {why}.",
        hub.HFValidationError: "There is no such folder.",
    }
    for kind, reason in reasons.items():
        if any(isinstance(cause, kind) for cause in causes):
            return ArgumentError("model", KINDS, name, reason)
    if not trusts_code and isinstance(error, ValueError) and _has_code(name):
        advice = "Read that code, then pass trust_remote_code=True."
        return ArgumentError("model", "run without code of its own", name, advice)
    if any(isinstance(cause, pickle.UnpicklingError) for cause in causes):
        advice = "Other objects in them are never unpickled: convert them to safetensors."
        return ArgumentError("model", "have weights that hold tensors alone", name, advice)
    return ArgumentError("model", "be one that transformers loads", name, f"{one_line(error, briefly=True)}.")


def _causes(error: BaseException) -> Iterator[BaseException]:
    """The error, what caused it, what caused that, ...; how deep the one of the hub lies depends on the release."""
    yield error
    cause = error.__cause__ or error.__context__
    if cause is not None:
        yield from _causes(cause)


def _has_code(name: str) -> bool:
    """Whether a model comes with Python code, which its config.json lists."""
    from transformers import PretrainedConfig

    try:
        return "auto_map" in PretrainedConfig.get_config_dict(name)[0]
    except Exception:  # a config.json that cannot be read was the first error already
        return False


def _find_prepare(name: str, model: nn.Module, trust: dict[str, bool]) -> tuple[Any, tuple[str, ...]]:
    """What prepares the main input of a model, and a note when there is nothing."""
    from transformers import AutoFeatureExtractor, AutoImageProcessor, AutoTokenizer

    options: dict[str, Any] = dict(trust)
    kind, loader = "feature extractor", AutoFeatureExtractor
    if model.main_input_name == "input_ids":
        kind, loader = "tokenizer", AutoTokenizer
    elif model.main_input_name == "pixel_values":
        kind, loader = "image processor", AutoImageProcessor
        options |= {} if find_spec("torchvision") else {"backend": "pil"}
    try:
        prepare = loader.from_pretrained(name, **options)
    except Exception as error:  # the files are missing, or a package that reads them
        return None, (f"No {kind} was loaded with it ({one_line(error, briefly=True)}).",)
    if kind == "tokenizer" and len(prepare) <= len(prepare.all_special_ids):
        return None, ("No tokenizer was loaded with it (it has no vocabulary).",)
    return prepare, ()
