"""A tiny BERT of transformers, in a folder."""

from __future__ import annotations

from pathlib import Path

import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn

from activation_extractor._display import quiet

SIZES = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}


def bert_config() -> transformers.BertConfig:
    return transformers.BertConfig(vocab_size=12, max_position_embeddings=16, **SIZES)


def save(model: nn.Module, folder: Path, *parts) -> Path:
    with quiet(shows_downloads=False):
        for part in (model, *parts):
            part.save_pretrained(folder)
    return folder


def tokenizer(**special) -> transformers.PreTrainedTokenizerFast:
    words = ["[UNK]", "[PAD]", "Hello", "world.", "A", "second", "text."]
    inner = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="[UNK]", **special)
