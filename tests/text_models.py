"""Tiny models of text, each with what prepares its input, as a command line names them."""

from __future__ import annotations

import torch
from tiny import tiny_bert, tiny_tokenizer
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
from torch import nn
from transformers import (
    EsmConfig,
    EsmModel,
    GPTJConfig,
    GPTJModel,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaModel,
)

SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}


def build(kind, config, **sizes):
    torch.manual_seed(0)
    return kind(config(vocab_size=24, pad_token_id=0, **SIZES | sizes)).eval()


def dna():
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *"ACGTN"]
    inner = Tokenizer(models.WordLevel({name: number for number, name in enumerate(names)}, "[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    inner.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, model_max_length=64, **special)
    return build(EsmModel, EsmConfig, position_embedding_type="rotary", max_position_embeddings=64), tokenizer


def roberta():
    return build(RobertaModel, RobertaConfig, max_position_embeddings=33), tiny_tokenizer(10**30)


def rotary():
    model = build(EsmModel, EsmConfig, position_embedding_type="rotary", max_position_embeddings=20)
    return model, tiny_tokenizer(20)


def typed():
    class Typed(type(tiny_tokenizer())):
        def __call__(self, texts, **options):
            made = super().__call__(texts, **options)
            made["token_type_ids"] = [[int(token > 8) for token in row] for row in made["input_ids"]]
            return made

    tokenizer = tiny_tokenizer()
    tokenizer.__class__ = Typed
    return tiny_bert(), tokenizer


def short():
    torch.manual_seed(0)
    config = GPTJConfig(vocab_size=24, n_positions=10, n_embd=16, n_layer=1, n_head=2, rotary_dim=4)
    return GPTJModel(config).eval(), tiny_tokenizer(20)


def maskless():
    class Maskless(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = tiny_bert()

        def forward(self, tokens):
            return self.blocks(tokens)

    return Maskless(), tiny_tokenizer()


def fragile():
    """A model that does not run on the letter W, once it has run on its example."""

    class Fragile(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = tiny_bert()

        def forward(self, input_ids, attention_mask):
            if (input_ids == tiny_tokenizer().convert_tokens_to_ids("W")).any():
                raise IndexError("index out of range in self")
            return self.blocks(input_ids, attention_mask)

    return Fragile(), tiny_tokenizer()


def heedless():
    """A model that takes a mask, and averages over padding too."""

    class Heedless(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.layer = nn.Embedding(24, 8), nn.Linear(8, 8)

        def forward(self, input_ids, attention_mask):
            values = self.embed(input_ids)
            return self.layer(values + values.mean(1, keepdim=True))

    torch.manual_seed(0)
    return Heedless(), tiny_tokenizer()
