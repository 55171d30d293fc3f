"""`without_tokens`: what is left out is found by token ids, in the call that a layer belongs to."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers as tf
from tiny import tiny_bert, tiny_tokenizer
from torch import nn

from activation_extractor import SafetensorsSink, capture, extract, inputs, open_store, without_tokens
from activation_extractor.errors import ArgumentError, ArgumentTypeError, MaskError, OtherRunError

SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
TEXTS = ["ACDE", "AC", "WYW"]


@pytest.fixture(scope="module")
def bert():
    return tiny_bert()


@pytest.fixture(scope="module")
def t5():
    torch.manual_seed(0)
    config = tf.T5Config(vocab_size=30, d_model=8, d_kv=4, d_ff=16, num_layers=2, num_heads=2)
    return tf.T5Model(config).eval()


def captured(model, layers, batch, **options):
    with torch.no_grad(), capture(model, layers, **options) as acts:
        model(**batch)
    return acts


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("reduce", ["mean", "last", "first", "max"])
def test_special_tokens_and_padding_are_left_out_whichever_side_is_padded(bert, side, reduce):
    tokenizer = tiny_tokenizer()
    tokenizer.padding_side = side
    batch = tokenizer(TEXTS, padding=True, return_tensors="pt")
    acts = captured(bert, "encoder.layer.1", batch, reduce=reduce, mask=without_tokens(tokenizer))
    full = captured(bert, "encoder.layer.1", batch)["encoder.layer.1"]
    for row, text in enumerate(TEXTS):
        start = 1 if side == "right" else 1 + max(map(len, TEXTS)) - len(text)
        inside = full[row, start : start + len(text)]
        pool = {
            "mean": lambda x: x.mean(0),
            "max": lambda x: x.amax(0),
            "first": lambda x: x[0],
            "last": lambda x: x[-1],
        }
        assert torch.allclose(acts["encoder.layer.1"][row], pool[reduce](inside), atol=1e-6)


def test_a_store_holds_whole_activations_without_them(bert, tmp_path):
    tokenizer = tiny_tokenizer()
    batch = tokenizer(TEXTS, padding=True, return_tensors="pt")
    captured(bert, "encoder.layer.1", batch, sink=tmp_path / "out", mask=without_tokens(tokenizer))
    assert [len(row) for row in open_store(tmp_path / "out")["encoder.layer.1"]] == [4, 2, 3]


def test_ids_of_one_s_own_leave_just_these_out_and_no_mask_is_needed(bert):
    ids = torch.tensor([[2, 5, 6, 7, 3], [2, 5, 6, 3, 3]])
    full = captured(bert, "encoder.layer.1", {"input_ids": ids})["encoder.layer.1"]
    for tokens in (3, [3], torch.tensor([3, 3]), np.array([3]), {3}, range(3, 4)):
        last = captured(bert, "encoder.layer.1", {"input_ids": ids}, reduce="last", mask=without_tokens(tokens))
        assert torch.equal(last["encoder.layer.1"], torch.stack([full[0, 3], full[1, 2]]))


def test_of_a_tokenizer_all_special_tokens_count_but_for_what_is_unknown_or_masked():
    names = {"unk_token": "[UNK]", "mask_token": "[MASK]", "additional_special_tokens": ["<lang>"]}
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens(names)
    assert without_tokens(tokenizer).tokens == tuple(sorted([0, 2, 3, tokenizer.convert_tokens_to_ids("<lang>")]))
    tokenizer.eos_token = "[UNK]"  # as GPT-2 has one for all
    assert 1 in without_tokens(tokenizer).tokens


def test_a_row_of_special_tokens_alone_is_an_error_that_names_it(bert):
    batch = tiny_tokenizer()(["AC", "", "W"], padding=True, return_tensors="pt")
    with pytest.raises(MaskError, match="have a real position in every row, got none in row 1"):
        captured(bert, "encoder.layer.1", batch, reduce="mean", mask=without_tokens(tiny_tokenizer()))


@pytest.mark.parametrize("wrong", ["[SEP]", 1.0, [1.5], [True], None, b"3"])
def test_what_is_no_id_is_refused(wrong):
    with pytest.raises(ArgumentTypeError, match="what is given to without_tokens must be token ids or a tokenizer"):
        without_tokens(wrong)


def test_no_ids_and_an_argument_that_is_no_name_are_refused():
    with pytest.raises(ArgumentError, match="must hold at least one token id"):
        without_tokens([])
    with pytest.raises(ArgumentTypeError, match="argument must name an argument of the model"):
        without_tokens([1], argument=3)


# -- models of several parts ------------------------------------------------------------------------------------------


def test_encoder_and_decoder_go_by_their_own_ids(t5):
    ids, decoder_ids = torch.tensor([[5, 6, 1, 0], [5, 1, 0, 0]]), torch.tensor([[0, 7, 1], [0, 1, 0]])
    batch = {"input_ids": ids, "attention_mask": ids != 0, "decoder_input_ids": decoder_ids}
    layers = ["encoder.block.1", "decoder.block.1", "decoder.block.1.layer.1.EncDecAttention.k"]
    last = captured(t5, layers, batch, reduce="last", mask=without_tokens([1]))
    full = captured(t5, layers, batch)
    assert torch.equal(last[layers[0]], torch.stack([full[layers[0]][0, 1], full[layers[0]][1, 0]]))
    assert torch.equal(last[layers[1]], torch.stack([full[layers[1]][0, 1], full[layers[1]][1, 2]]))
    assert torch.equal(last[layers[2]], torch.stack([full[layers[2]][0, 1], full[layers[2]][1, 0]]))


class Pair(nn.Module):
    """An encoder and a decoder without stacks of their own, which are called with states alone."""

    def __init__(self):
        super().__init__()
        self.embed, self.encoder, self.decoder = nn.Embedding(30, 8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, input_ids, attention_mask=None, decoder_input_ids=None, decoder_attention_mask=None):
        return self.encoder(self.embed(input_ids)), self.decoder(self.embed(decoder_input_ids))


def test_a_decoder_that_is_called_with_states_goes_by_the_decoder_s_ids_of_the_model():
    model, ids, decoder_ids = Pair(), torch.tensor([[5, 6, 1], [5, 1, 0]]), torch.tensor([[1, 7, 8], [8, 7, 1]])
    batch = {"input_ids": ids, "attention_mask": ids != 0, "decoder_input_ids": decoder_ids}
    last = captured(model, ["encoder", "decoder"], batch, reduce="last", mask=without_tokens([1]))
    with torch.no_grad():
        encoded, decoded = model(**batch)
    assert torch.equal(last["encoder"], torch.stack([encoded[0, 1], encoded[1, 0]]))
    assert torch.equal(last["decoder"], torch.stack([decoded[0, 2], decoded[1, 1]]))


def test_towers_with_text_go_by_its_ids_and_others_are_refused():
    torch.manual_seed(0)
    text = {**SIZES, "vocab_size": 50, "max_position_embeddings": 20, "bos_token_id": 1, "eos_token_id": 2}
    model = tf.CLIPModel(tf.CLIPConfig(text_config=text, vision_config={**SIZES, "image_size": 32, "patch_size": 16}))
    ids = torch.tensor([[1, 5, 6, 7, 2], [1, 5, 6, 2, 2]])  # as many tokens as patches and a class
    batch = {"input_ids": ids, "pixel_values": torch.rand(2, 3, 32, 32)}
    layer = "text_model.encoder.layers.1"
    last = captured(model.eval(), layer, batch, reduce="last", mask=without_tokens([1, 2]))
    full = captured(model, layer, batch)
    assert torch.equal(last[layer], torch.stack([full[layer][0, 3], full[layer][1, 2]]))
    for mask in ({}, {"attention_mask": torch.ones_like(ids)}):
        with pytest.raises(MaskError, match=r"vision_model\.encoder\.layers\.1"):
            captured(model, "vision_model.encoder.layers.1", {**batch, **mask}, reduce="mean", mask=without_tokens([1]))
    by_part = {"vision_model.**": None, "text_model.**": without_tokens([1, 2])}
    both = captured(model, [layer, "vision_model.encoder.layers.1"], batch, reduce="last", mask=by_part)
    assert torch.equal(both[layer], last[layer])


def test_in_a_cached_generation_each_step_goes_by_its_own_ids():
    torch.manual_seed(0)
    model = tf.GPT2LMHeadModel(tf.GPT2Config(vocab_size=30, n_embd=16, n_layer=2, n_head=2, n_positions=32)).eval()
    ids = torch.tensor([[0, 5, 6], [4, 5, 6]])
    mask = (ids != 0).long()
    options = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    with capture(model, "transformer.h.1", reduce="first", mask=without_tokens([5]), calls="all") as acts:
        model.generate(input_ids=ids, attention_mask=mask, **options)
    with capture(model, "transformer.h.1", calls="all") as whole:
        model.generate(input_ids=ids, attention_mask=mask, **options)
    assert len(acts["transformer.h.1"]) == 3
    first = whole["transformer.h.1"][0]
    assert torch.equal(acts["transformer.h.1"][0], torch.stack([first[0, 2], first[1, 0]]))
    assert torch.equal(acts["transformer.h.1"][2], whole["transformer.h.1"][2][:, 0])


class Renamed(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.out = nn.Embedding(30, 8), nn.Linear(8, 8)

    def forward(self, tokens):
        return self.out(self.embed(tokens))


def test_an_argument_of_another_name_is_found_by_position_too_and_asked_for_where_it_is_not_named():
    model, tokens = Renamed(), torch.tensor([[1, 2, 3], [2, 3, 1]])
    with capture(model, "out", reduce="first", mask=without_tokens([1], argument="tokens")) as acts:
        full = model(tokens)
    assert torch.equal(acts["out"], torch.stack([full[0, 1], full[1, 0]]))
    with pytest.raises(MaskError, match=r"leave tokens out by the ids in 'input_ids' .* got a call without them. Name"):
        captured(model, "out", {"tokens": tokens}, reduce="first", mask=without_tokens([1]))


def test_positions_that_are_no_tokens_are_refused(bert):
    class Halved(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.pool = nn.Embedding(30, 8), nn.Linear(8, 8)

        def forward(self, input_ids, attention_mask=None):
            return self.pool(self.embed(input_ids)[:, ::2])

    batch = {"input_ids": torch.ones(2, 4, dtype=torch.long)}
    for mask in ({}, {"attention_mask": torch.ones(2, 4)}):
        with pytest.raises(MaskError, match=r"layer 'pool' must have shape \(2, 2\), got shape \(2, 4\)"):
            captured(Halved(), "pool", {**batch, **mask}, reduce="mean", mask=without_tokens([3]))


def test_an_additive_mask_is_refused_as_ever(bert):
    batch = {"input_ids": torch.tensor([[2, 5, 3]]), "attention_mask": torch.tensor([[0.0, 0.0, -1e4]])}
    with pytest.raises(MaskError, match="hold zeros and ones, got an additive mask"):
        captured(bert, "encoder.layer.1", batch, reduce="mean", mask=without_tokens([2]))


def test_inputs_of_layers_go_by_the_same_ids(bert):
    batch = tiny_tokenizer()(TEXTS, padding=True, return_tensors="pt")
    layer = inputs("encoder.layer.1")
    acts = captured(bert, layer, batch, reduce="last", mask=without_tokens(tiny_tokenizer()))
    full = captured(bert, layer, batch)["encoder.layer.1:input"]
    assert torch.equal(acts["encoder.layer.1:input"], full[range(3), [4, 2, 3]])


# -- stores -----------------------------------------------------------------------------------------------------------


def test_a_data_set_is_resumed_with_the_same_tokens_and_no_others(bert, tmp_path):
    tokenizer = tiny_tokenizer()
    batches = [dict(tokenizer(TEXTS[row : row + 1], return_tensors="pt")) for row in range(3)]
    options = {"reduce": "mean", "out": tmp_path / "out", "rows_per_unit": 1, "progress": False}
    store = extract(bert, batches, "encoder.layer.1", mask=without_tokens(tokenizer), **options)
    full = captured(bert, "encoder.layer.1", batches[0])["encoder.layer.1"]
    assert torch.allclose(store["encoder.layer.1"][0], full[0, 1:-1].mean(0), atol=1e-6)
    extract(bert, batches, "encoder.layer.1", mask=without_tokens(tokenizer), **options)
    for other in (without_tokens([3]), "attention_mask"):
        with pytest.raises(OtherRunError, match="it differs in mask"):
            extract(bert, batches, "encoder.layer.1", mask=other, **options)


def test_nothing_is_made_anew_for_each_layer(bert, monkeypatch, tmp_path):
    batch, count = tiny_tokenizer()(TEXTS, padding=True, return_tensors="pt"), []
    isin = torch.isin
    monkeypatch.setattr(torch, "isin", lambda *args: count.append(1) or isin(*args))
    sink = SafetensorsSink(tmp_path / "out")
    captured(bert, "encoder.layer.*", batch, reduce=["mean", "last"], mask=without_tokens(tiny_tokenizer()), sink=sink)
    assert len(count) == 1
