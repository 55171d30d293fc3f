"""Tiny models of transformers with tokenizers of their own, as folders that load without a network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

LETTERS = "ACDEFGHIKLMNPQRSTVWY"


def tiny_tokenizer(limit: int = 64, returns: tuple[str, ...] = ("input_ids", "attention_mask")) -> Any:
    """A token for each letter, CLS and SEP around them.

    What tokenizers return by default depends on the release: transformers 4 adds token_type_ids.
    """
    vocabulary = {token: number for number, token in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *LETTERS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    options = {"model_max_length": limit, "model_input_names": list(returns)}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **options, **names)


def tiny_bert() -> BertModel:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32}
    return BertModel(BertConfig(vocab_size=24, max_position_embeddings=64, **sizes)).eval()


def save_bert(folder: Path) -> str:
    tiny_bert().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)
