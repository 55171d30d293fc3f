"""Texts as the tokens that a model is called with."""

from __future__ import annotations

import pytest
import torch
from tiny import tiny_bert, tiny_tokenizer
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import (
    BertConfig,
    BertModel,
    CanineTokenizer,
    EsmTokenizer,
    GPT2Config,
    GPT2Model,
    PreTrainedTokenizerFast,
    XGLMConfig,
    XGLMModel,
)

from activation_extractor.cli._texts import Texts
from activation_extractor.errors import ArgumentError


class Forward(nn.Module):
    """A model that only has a signature."""

    def forward(self, input_ids, attention_mask=None):
        raise AssertionError


class Everything(nn.Module):
    def forward(self, **batch):
        raise AssertionError


def with_types(tokenizer):
    """A tokenizer that returns types, 1 for the letters, and a name that nobody takes."""

    class Typed(type(tokenizer)):
        def __call__(self, texts, **options):
            made = super().__call__(texts, **options)
            made["token_type_ids"] = [[int(token > 3) for token in row] for row in made["input_ids"]]
            made["colours"] = [[7] * len(row) for row in made["input_ids"]]
            return made

    tokenizer.__class__ = Typed
    return tokenizer


def esm_tokenizer(folder):
    letters = "<cls> <pad> <eos> <unk> L A G V S E R T I D P K Q N F Y M H W C X . - <mask>"
    (folder / "vocab.txt").write_text("\n".join(letters.split()))
    return EsmTokenizer(str(folder / "vocab.txt"))


def no_unknown():
    """Letters, of which others are left out without a trace."""
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE({"A": 0, "C": 1}, [])))


def batch_of(texts, model=None, tokenizer=None, **options):
    rows = Texts(model or tiny_bert(), tokenizer or tiny_tokenizer(), **options)
    return rows.batch(rows.tokenize(texts))


def test_what_the_tokenizer_returns_reaches_a_model_whose_forward_takes_it():
    batch = batch_of(["ACD", "M"], tokenizer=with_types(tiny_tokenizer()))
    assert batch["token_type_ids"].tolist() == [[0, 1, 1, 1, 0], [0, 1, 0, 0, 0]]
    assert list(batch) == ["input_ids", "attention_mask", "token_type_ids"]
    assert list(batch_of(["A"], Forward(), with_types(tiny_tokenizer()))) == ["input_ids", "attention_mask"]


def test_a_value_for_each_token_that_the_tokenizer_does_not_pad_gets_zeros():
    for side, last in (("right", [7, 7, 7, 0, 0]), ("left", [0, 0, 7, 7, 7])):
        tokenizer = with_types(tiny_tokenizer())
        tokenizer.padding_side = side
        batch = batch_of(["ACD", "M"], Everything(), tokenizer)
        assert batch["colours"].tolist() == [[7] * 5, last]


def test_a_keyword_of_transformers_counts_if_a_module_inside_names_it():
    bert = BertModel(BertConfig(vocab_size=24, hidden_size=16, num_hidden_layers=1, num_attention_heads=2))
    assert "colours" not in batch_of(["A"], bert, with_types(tiny_tokenizer()))
    from transformers import LlamaConfig, LlamaModel

    llama = LlamaModel(LlamaConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=24))
    assert "token_type_ids" not in batch_of(["A"], llama, with_types(tiny_tokenizer()))


def test_a_model_that_takes_no_mask_gets_rows_of_one_length_and_they_still_count_alone():
    class NoMask(nn.Module):
        def forward(self, tokens):
            raise AssertionError

    texts = Texts(NoMask(), tiny_tokenizer())
    assert texts.why_equal_lengths
    batch = texts.batch(texts.tokenize(["ACD", "MKP"]))
    assert list(batch) == ["tokens", "pooling_mask"]
    assert batch["pooling_mask"].all()


def test_padding_on_the_left_of_learned_positions_would_move_them():
    tokenizer = tiny_tokenizer()
    tokenizer.padding_side = "left"
    assert Texts(tiny_bert(), tokenizer).why_equal_lengths
    assert not Texts(Forward(), tokenizer).why_equal_lengths
    sines = XGLMModel(XGLMConfig(vocab_size=24, d_model=16, num_layers=1, attention_heads=2, ffn_dim=32))
    assert Texts(sines, tokenizer).why_equal_lengths
    assert not Texts(tiny_bert(), tiny_tokenizer()).why_equal_lengths


def test_a_tokenizer_without_a_padding_token_pads_with_its_last_one_or_not_at_all():
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token, tokenizer.eos_token = None, "[SEP]"
    assert batch_of(["ACD", "M"], tokenizer=tokenizer)["attention_mask"].tolist() == [[1] * 5, [1, 1, 1, 0, 0]]
    tokenizer.pad_token = tokenizer.eos_token = None
    texts = Texts(tiny_bert(), tokenizer)
    assert texts.why_equal_lengths
    assert texts.batch(texts.tokenize(["ACD", "MKP"]))["input_ids"].shape == (2, 5)


def test_special_tokens_are_found_where_a_tokenizer_does_not_mark_them(tmp_path):
    class Unmarked(EsmTokenizer):
        def get_special_tokens_mask(self, ids, *others, **options):
            return [0] * (len(ids) + 2)

    esm_tokenizer(tmp_path)
    texts = Texts(Forward(), Unmarked(str(tmp_path / "vocab.txt")), skip_special_tokens=True)
    (row,) = texts.tokenize(["MK<unk>L"])
    assert row.special == [1, 0, 0, 0, 0, 1]
    assert texts.batch([row])["pooling_mask"].tolist() == [[False, True, True, True, True, False]]


def test_a_tokenizer_of_ones_own_need_not_know_what_is_asked_for():
    class Own:
        model_max_length, padding_side, pad_token, eos_token = 10, "right", "p", None

        def __call__(self, texts, truncation=False, max_length=None):
            ids = [[ord(letter) for letter in text] for text in texts]
            return {"input_ids": [row[:max_length] if truncation else row for row in ids]}

        def pad(self, rows, **options):
            width = max(map(len, rows["input_ids"]))
            lists = {name: [row + [0] * (width - len(row)) for row in rows[name]] for name in rows}
            return lists | {"attention_mask": [[int(token > 0) for token in row] for row in lists["input_ids"]]}

    batch = batch_of(["abc", "d" * 20], Forward(), Own())
    assert batch["input_ids"].shape == (2, 10)
    assert batch["attention_mask"].sum(1).tolist() == [3, 10]


def test_characters_that_the_tokenizer_does_not_know_are_counted(tmp_path):
    letters, words = Texts(tiny_bert(), tiny_tokenizer()), Texts(Forward(), esm_tokenizer(tmp_path))
    cases = {"MKT": 0, "mkT": 2, "M>K1.": 3, "M[UNK]K": 0, "m[UNK]K": 1}
    assert [row.unknown for row in letters.tokenize(list(cases))] == list(cases.values())
    cases = {"MKT": 0, "MKTacdLL": 3, "mk t": 3, "M-K.1>A": 2, "M<unk>K": 0, "M<mask>K": 0, "m<unk>K": 1}
    assert [row.unknown for row in words.tokenize(list(cases))] == list(cases.values())
    assert [row.unknown for row in Texts(Forward(), no_unknown()).tokenize(["AC", "AacC", "ac"])] == [0, 2, 2]


def test_tokenizers_of_bytes_and_of_characters_know_everything():
    inner = Tokenizer(models.BPE({letter: n for n, letter in enumerate(pre_tokenizers.ByteLevel.alphabet())}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    for tokenizer in (PreTrainedTokenizerFast(tokenizer_object=inner), CanineTokenizer()):
        rows = Texts(Forward(), tokenizer).tokenize(["naïve 🧬 acgt", "e\u0301"])
        assert [row.unknown for row in rows] == [0, 0]


def test_what_is_unknown_may_be_known_in_upper_case():
    texts = Texts(tiny_bert(), tiny_tokenizer())
    assert texts.known_in_upper_case(["acd"])
    assert not texts.known_in_upper_case(["AC1"])
    upper = Texts(tiny_bert(), tiny_tokenizer(), upper=True)
    assert not upper.known_in_upper_case(["acd1"])
    assert upper.tokenize(["acD"])[0].entries == texts.tokenize(["ACD"])[0].entries


def test_a_text_that_is_cut_counts_what_is_unknown_in_all_of_it():
    (row,) = Texts(tiny_bert(), tiny_tokenizer(), max_length=5).tokenize(["MKTacd"])
    assert (row.length, row.counted(skips_special_tokens=True), row.is_cut, row.unknown) == (5, 3, True, 3)


def test_a_text_that_the_tokenizer_refuses_is_named():
    inner = Tokenizer(models.WordLevel({"A": 0}, "missing"))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    texts = Texts(Forward(), PreTrainedTokenizerFast(tokenizer_object=inner))
    with pytest.raises(
        ArgumentError, match=r"the text of a row must be one that the tokenizer takes, got 'Ab'\. It raised Exc"
    ):
        texts.tokenize(["A", "Ab"])


def test_gpt2_padded_with_its_last_token_computes_what_it_computes_for_each_row_alone():
    torch.manual_seed(0)
    model = GPT2Model(GPT2Config(vocab_size=24, n_embd=16, n_layer=2, n_head=2, n_positions=40)).eval()
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token, tokenizer.eos_token = None, "[SEP]"
    texts = ["ACDEF", "MK"]
    with torch.no_grad():
        batch = model(**batch_of(texts, model, tokenizer)).last_hidden_state
        for row, text in enumerate(texts):
            alone = model(**tokenizer([text], return_tensors="pt")).last_hidden_state[0]
            torch.testing.assert_close(batch[row, : len(alone)], alone, atol=1e-5, rtol=1e-5)
