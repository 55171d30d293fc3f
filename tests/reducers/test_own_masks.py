"""The mask that a layer has by default: its own tower's, stack's or module's, never another one that happens to fit."""

from __future__ import annotations

import inspect
import re

import pytest
import torch
import transformers as tf
from pooling import assert_mean_over
from torch import nn

from activation_extractor import capture, gradients, inputs, outputs
from activation_extractor.errors import MaskError

REAL = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]])
OTHER = torch.tensor([[1, 0, 0, 0, 0], [1, 1, 1, 1, 0]])
ALL = torch.ones(2, 5, dtype=torch.int64)
SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
IDS = torch.tensor([[5, 6, 7, 8, 9], [10, 11, 12, 13, 14]])


def mean_over(expected, model, layer, run, mask="attention_mask"):
    """The mean of a layer, in what `run` calls, is the one over these positions."""
    with torch.no_grad(), capture(model, layer, reduce=["full", "mean"], mask=mask) as acts:
        run()
    (name,) = acts.names
    assert_mean_over(expected, (acts[name, "full"], acts[name, "mean"]))


def assert_refused(model, layer, run, reason):
    """The error says what to pass, and with that it works."""
    with pytest.raises(MaskError, match=re.escape(reason)) as caught:
        mean_over(ALL, model, layer, run)
    none, named = (eval(text) for text in re.findall(r"mask=(\{.*?\})", str(caught.value)))
    mean_over(ALL, model, layer, run, mask=none)
    assert list(named.values()) == ["attention_mask"]


# -- towers -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def clip():
    torch.manual_seed(0)
    text = {**SIZES, "vocab_size": 50, "max_position_embeddings": 20, "bos_token_id": 1, "eos_token_id": 2}
    config = tf.CLIPConfig(text_config=text, vision_config={**SIZES, "image_size": 32, "patch_size": 16})
    return tf.CLIPModel(config).eval()


def test_a_mask_of_the_text_is_not_one_of_the_image_although_it_fits(clip):
    images = torch.randn(2, 3, 32, 32)

    def run():
        clip(input_ids=IDS, attention_mask=REAL, pixel_values=images)

    for layer in ("text_model.encoder.layers.1", "text_model", "text_model.embeddings"):
        mean_over(REAL, clip, layer, run)
    got = "got 'attention_mask' of a model that takes input_ids and pixel_values"
    for layer in ("vision_model.encoder.layers.1", "vision_model"):
        assert_refused(clip, layer, run, got)
    masks = {"text_model.**": "attention_mask", "vision_model.**": None}
    mean_over(ALL, clip, "vision_model.encoder.layers.0", run, mask=masks)
    mean_over(REAL, clip, "text_model.encoder.layers.0", run, mask=masks)
    mean_over(ALL, clip, "vision_model.encoder.layers.0", lambda: clip(input_ids=IDS, pixel_values=images))


def test_a_callable_is_asked_for_the_tower_that_was_given_none(clip):
    seen = {}

    def by_hand(layer, activation, mask):
        seen[layer] = mask
        return mask

    with capture(clip, ["text_model", "vision_model"], reduce="mean", mask=by_hand):
        clip(input_ids=IDS, attention_mask=REAL, pixel_values=torch.randn(2, 3, 32, 32))
    assert seen["vision_model"] is None
    assert torch.equal(seen["text_model"], REAL.bool())


def test_a_tower_that_is_called_alone_is_asked_for_its_own_mask(clip):
    text, image = "text_model.encoder.layers.1", "vision_model.encoder.layers.1"
    mean_over(REAL, clip, text, lambda: clip.get_text_features(input_ids=IDS, attention_mask=REAL))
    mean_over(ALL, clip, text, lambda: clip.get_text_features(input_ids=IDS))
    mean_over(ALL, clip, image, lambda: clip.get_image_features(pixel_values=torch.randn(2, 3, 32, 32)))


class Towers(nn.Module):
    """Its towers are told nothing of masks."""

    def __init__(self):
        super().__init__()
        self.embed, self.text, self.image = nn.Embedding(50, 8), nn.Sequential(nn.Linear(8, 8)), nn.Linear(8, 8)

    def forward(self, tokens, patches, attention_mask=None):
        return self.text(self.embed(tokens)), self.image(patches)


@pytest.mark.parametrize("layer", ["text.0", "image", "embed"])
def test_in_a_model_of_two_inputs_a_layer_that_is_told_nothing_asks(layer):
    model, patches = Towers(), torch.randn(2, 5, 8)
    assert_refused(model, layer, lambda: model(IDS, patches, REAL), "a model that takes tokens and patches")
    mean_over(ALL, model, layer, lambda: model(IDS, patches))


def bert():
    torch.manual_seed(0)
    return tf.BertModel(tf.BertConfig(**SIZES, vocab_size=50)).eval()


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.left, self.right = bert(), bert()

    def forward(self, left, right, attention_mask=None, right_mask=None):
        self.left(left, attention_mask=attention_mask)
        return self.right(right, attention_mask=right_mask)


def test_each_of_two_alike_towers_has_the_mask_that_it_was_called_with():
    model = Pair()
    for layer, real in (("left.encoder.layer.1", REAL), ("right.encoder.layer.1", OTHER), ("right", OTHER)):
        mean_over(real, model, layer, lambda: model(IDS, IDS, REAL, OTHER))
    assert_refused(model, "right.encoder.layer.1", lambda: model(IDS, IDS, REAL), "without which 'right' was called")
    mean_over(ALL, model, "right.encoder.layer.1", lambda: model(IDS, IDS, ALL))


def test_what_to_pass_names_the_tower_and_not_what_is_around_all_of_them(clip):
    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = clip

        def forward(self, batch):
            return self.inner(**batch)

    model, images = Wrapped(), torch.randn(2, 3, 32, 32)
    with pytest.raises(MaskError, match=re.escape("Pass mask={'inner.vision_model.**': None}")):
        batch = {"input_ids": IDS, "attention_mask": REAL, "pixel_values": images}
        mean_over(ALL, model, "inner.vision_model.encoder.layers.1", lambda: model(batch))
    mean_over(REAL, model, "inner.text_model.encoder.layers.1", lambda: model(batch))


def test_what_a_module_adds_to_scores_is_no_mask():
    config = tf.LongformerConfig(**SIZES, vocab_size=50, attention_window=4, max_position_embeddings=16)
    model = tf.LongformerModel(config).eval()
    ids, mask = IDS[:, :4], REAL[:, :4]  # a multiple of the window, to which it pads
    mean_over(mask, model, "encoder.layer.1", lambda: model(input_ids=ids, attention_mask=mask))
    mean_over(torch.ones(2, 4), model, "encoder.layer.1", lambda: model(input_ids=ids))


@pytest.mark.parametrize("layer", ["embeddings", "encoder", "encoder.layer.1", "encoder.layer.1.attention.self.query"])
def test_a_model_of_one_kind_of_input_has_one_mask_for_all_of_it(layer):
    model = bert()
    for mask in (REAL, ALL):
        mean_over(mask, model, layer, lambda mask=mask: model(input_ids=IDS, attention_mask=mask))
    mean_over(ALL, model, layer, lambda: model(input_ids=IDS))


def test_a_model_that_makes_the_mask_itself_is_asked_what_it_made():
    class Masking(nn.Module):
        def __init__(self):
            super().__init__()
            self.bert = bert()

        def forward(self, input_ids):
            return self.bert(input_ids=input_ids, attention_mask=(input_ids != 0).long())

    model = Masking()
    for layer in ("bert", "bert.embeddings", "bert.encoder.layer.1"):
        mean_over(REAL, model, layer, lambda: model(IDS * REAL))


class Looking(nn.Module):
    """Its module is called with a mask of which position sees which."""

    def __init__(self):
        super().__init__()
        self.net = Blind()

    def forward(self, x, attention_mask=None):
        return self.net(x, attention_mask=torch.ones(x.shape[1], x.shape[1]).tril())


class Blind(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x, attention_mask=None):
        return self.linear(x)


def test_a_mask_of_which_position_sees_which_is_none_of_padding():
    model = Looking()
    mean_over(ALL, model, "net.linear", lambda: model(torch.randn(2, 5, 8)))
    mean_over(REAL, model, "net.linear", lambda: model(torch.randn(2, 5, 8), REAL))
    with pytest.raises(MaskError, match="got a square 'attention_mask' of 'net' that may say which"):
        mean_over(ALL, model, "net.linear", lambda: model(torch.randn(5, 5, 8)))
    mean_over(torch.ones(5, 5), model, "net.linear", lambda: model(torch.randn(5, 5, 8)), mask=None)
    square = torch.ones(5, 5).tril()
    mean_over(square, model, "net.linear", lambda: model(torch.randn(5, 5, 8), square))


# -- latents and frames -----------------------------------------------------------------------------------------------


def test_a_mask_of_what_latents_attend_to_is_none_of_the_latents():
    sizes = {"num_blocks": 1, "num_self_attends_per_block": 1, "num_self_attention_heads": 2}
    config = tf.PerceiverConfig(d_model=12, d_latents=16, num_latents=5, num_cross_attention_heads=2, **sizes)
    model, x = tf.PerceiverModel(config).eval(), torch.randn(2, 5, 12)
    layer = "encoder.self_attends.0"
    assert_refused(model, layer, lambda: model(x, attention_mask=REAL), "'attention_mask', without which 'encoder' was")
    mean_over(ALL, model, layer, lambda: model(x, attention_mask=ALL))


def test_queries_and_what_they_attend_to_have_a_mask_each():
    config = {**SIZES, "vocab_size": 50, "encoder_hidden_size": 16, "cross_attention_frequency": 1}
    model = tf.Blip2QFormerModel(tf.Blip2QFormerConfig(**config)).eval()
    states = {"query_embeds": torch.randn(2, 5, 16), "encoder_hidden_states": torch.randn(2, 5, 16)}
    cross = "encoder.layer.0.crossattention.attention."
    for layer, real in (("encoder.layer.1", ALL), (cross + "key", REAL), (cross + "query", ALL)):
        mean_over(real, model, layer, lambda: model(**states, encoder_attention_mask=REAL))


def test_frames_of_speech_have_the_mask_that_the_model_makes_for_them():
    sizes = {"conv_dim": (8, 8), "conv_stride": (5, 4), "conv_kernel": (10, 8), "num_feat_extract_layers": 2}
    norm = {"feat_extract_norm": "layer", "do_stable_layer_norm": True}
    position = {"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2}
    model = tf.Wav2Vec2Model(tf.Wav2Vec2Config(**SIZES, **sizes, **norm, **position)).eval()
    samples = torch.ones(2, 800, dtype=torch.int64)
    samples[1, 400:] = 0
    frames = torch.ones(2, 38, dtype=torch.int64)
    frames[1, 18:] = 0
    for layer in ("encoder", "encoder.layers.1", "encoder.layer_norm", "feature_projection"):
        mean_over(frames, model, layer, lambda: model(torch.randn(2, 800), attention_mask=samples))


# -- encoder and decoder ----------------------------------------------------------------------------------------------

BART = {"encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
BART |= {"vocab_size": 50, "d_model": 16, "encoder_ffn_dim": 8, "decoder_ffn_dim": 8, "pad_token_id": 0}
BART |= {"bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1, "forced_eos_token_id": None}


def t5():
    config = tf.T5Config(
        vocab_size=50, d_model=16, d_kv=4, d_ff=16, num_layers=2, num_heads=2, decoder_start_token_id=0
    )
    return tf.T5ForConditionalGeneration(config).eval()


def bart():
    return tf.BartForConditionalGeneration(tf.BartConfig(**BART)).eval()


def two_berts():
    config = tf.BertConfig(**SIZES, vocab_size=50)
    return tf.EncoderDecoderModel(tf.EncoderDecoderConfig.from_encoder_decoder_configs(config, config)).eval()


STACKS = {
    t5: {
        REAL: ["encoder", "encoder.block.1", "decoder.block.1.layer.1.EncDecAttention.k"],
        OTHER: ["decoder", "decoder.block.1", "decoder.block.1.layer.1.EncDecAttention.q", "lm_head"],
    },
    bart: {
        REAL: ["model.encoder.layers.0", "model.decoder.layers.0.encoder_attn.v_proj"],
        OTHER: ["model.decoder.layers.0", "model.decoder.layers.0.encoder_attn.q_proj", "lm_head"],
    },
    two_berts: {
        REAL: ["encoder.encoder.layer.1", "decoder.bert.encoder.layer.0.crossattention.self.key"],
        OTHER: ["decoder.bert.encoder.layer.1", "decoder.bert.embeddings"],
    },
}


@pytest.mark.parametrize("make", STACKS)
def test_keys_and_values_of_cross_attention_have_the_encoders_mask(make):
    torch.manual_seed(0)
    model = make()
    batch = {"input_ids": IDS, "attention_mask": REAL, "decoder_input_ids": IDS, "decoder_attention_mask": OTHER}
    for real, layers in STACKS[make].items():
        for layer in layers:
            mean_over(real, model, layer, lambda: model(**batch))


class Attention(nn.Module):
    """Attends to other states than its own, or to its own."""

    def __init__(self):
        super().__init__()
        self.q_proj, self.k_proj = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x, context=None):
        return self.q_proj(x) + self.k_proj(x if context is None else context).mean(1, keepdim=True)


def test_cross_attention_is_known_by_what_it_is_called_with():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.decoder = nn.Embedding(50, 8), nn.ModuleList([Attention(), Attention()])

        def forward(self, input_ids, decoder_input_ids, attention_mask=None, decoder_attention_mask=None):
            x = self.decoder[0](self.embed(decoder_input_ids))
            return self.decoder[1](x, self.embed(input_ids))

    model = Model()
    for layer in ("decoder.0", "decoder.0.k_proj", "decoder.0.q_proj", "decoder.1", "decoder.1.q_proj"):
        mean_over(OTHER, model, layer, lambda: model(IDS, IDS, REAL, OTHER))
    mean_over(REAL, model, "decoder.1.k_proj", lambda: model(IDS, IDS, REAL, OTHER))


def test_each_part_of_what_a_model_returns_has_its_own_mask():
    model = tf.T5Model(t5().config).eval()
    batch = {"input_ids": IDS, "attention_mask": REAL, "decoder_input_ids": IDS, "decoder_attention_mask": OTHER}
    mean_over(OTHER, model, "", lambda: model(**batch))
    mean_over(REAL, model, outputs("", select="encoder_last_hidden_state"), lambda: model(**batch))
    states = inputs("decoder.block.0", select="encoder_hidden_states")
    mean_over(REAL, model, states, lambda: model(**batch))


@pytest.mark.parametrize(("make", "layers"), [(t5, ["encoder", "encoder.block.1"]), (bart, ["model.encoder.layers.0"])])
def test_generate_calls_the_encoder_alone_with_a_mask_of_its_own(make, layers):
    model = make()
    for layer in layers:
        run = lambda: model.generate(input_ids=IDS, attention_mask=REAL, max_new_tokens=2, do_sample=False)  # noqa: E731
        mean_over(REAL, model, layer, run)


# -- torch's padding masks, in which True is padding ------------------------------------------------------------------

PADDING = REAL == 0
FORMS = {"bool": PADDING, "float": torch.zeros(2, 5).masked_fill(PADDING, float("-inf"))}


def torchs(kind, layer, **kwargs):
    made = layer(8, 2, 16, batch_first=True)
    return kind(made, 2, **kwargs).eval()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("mask", ["attention_mask", "src_key_padding_mask", {"**": "src_key_padding_mask"}])
def test_padding_masks_of_torch_are_found_and_read_in_its_sense(mask, form):
    model, x = (
        torchs(nn.TransformerEncoder, nn.TransformerEncoderLayer, enable_nested_tensor=False),
        torch.randn(2, 5, 8),
    )
    for layer in ("layers.0", "layers.1.linear1", "layers.0.self_attn", inputs("layers.0.self_attn", select="key")):
        mean_over(REAL, model, layer, lambda: model(x, src_key_padding_mask=FORMS[form]), mask=mask)
        mean_over(REAL, model, layer, lambda: model(x, None, FORMS[form]), mask=mask)
    mean_over(ALL, model, "layers.0", lambda: model(x))


def test_the_stacks_of_torchs_transformer_have_a_padding_mask_each():
    masks = {"src_key_padding_mask": PADDING, "tgt_key_padding_mask": OTHER == 0, "memory_key_padding_mask": PADDING}
    x, made = torch.randn(2, 5, 8), nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    encoder = nn.TransformerEncoder(made, 1, enable_nested_tensor=False)
    model = nn.Transformer(8, 2, 1, 1, 16, batch_first=True, custom_encoder=encoder).eval()
    of_memory = inputs("decoder.layers.0.multihead_attn", select="key")
    for real, layers in {REAL: ["encoder", "encoder.layers.0", of_memory], OTHER: ["", "decoder.layers.0"]}.items():
        for layer in layers:
            mean_over(real, model, layer, lambda: model(x, x + 1, **masks))
    decoder = torchs(nn.TransformerDecoder, nn.TransformerDecoderLayer)
    del masks["src_key_padding_mask"]
    wanted = {OTHER: ["", "layers.0", "layers.0.linear1"], REAL: [inputs("", select="memory")]}
    for real, layers in wanted.items():
        for layer in layers:
            mean_over(real, decoder, layer, lambda: decoder(x, x + 1, **masks))


def test_a_padding_mask_is_that_of_an_attentions_keys():
    model, x, other = nn.MultiheadAttention(8, 2, batch_first=True), torch.randn(2, 5, 8), torch.randn(2, 5, 8)
    mean_over(REAL, model, "", lambda: model(x, x, x, key_padding_mask=PADDING))
    mean_over(ALL, model, "", lambda: model(other, x, x, key_padding_mask=PADDING))
    mean_over(REAL, model, inputs("", select="value"), lambda: model(other, x, x, key_padding_mask=PADDING))
    mean_over(ALL, model, inputs("", select="query"), lambda: model(other, x, x, key_padding_mask=PADDING))


def test_a_padding_mask_that_the_model_makes_itself_is_found():
    class Tagger(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(50, 8)
            self.encoder = torchs(nn.TransformerEncoder, nn.TransformerEncoderLayer, enable_nested_tensor=False)

        def forward(self, tokens):
            return self.encoder(self.embed(tokens), src_key_padding_mask=tokens == 0)

    model = Tagger().eval()
    for layer in ("encoder", "encoder.layers.1", "encoder.layers.0.linear2"):
        mean_over(REAL, model, layer, lambda: model(IDS * REAL))


def test_a_layer_by_hand_after_a_tower_was_called_has_none_of_its_mask(clip):
    layer = clip.text_model.encoder.layers[0]
    with pytest.raises(MaskError, match="got a layer that ran outside of such a call"):
        with capture(clip, "text_model.encoder.layers.0", reduce="mean", calls="all"):
            clip.get_text_features(input_ids=IDS, attention_mask=REAL)
            layer(torch.randn(2, 5, 16), *[None] * (len(inspect.signature(layer.forward).parameters) - 2))


def test_gradients_have_the_mask_of_their_own_call(clip):
    wanted = gradients("text_model.encoder.layers.1")
    with capture(clip, wanted, reduce=["full", "mean"]) as acts:
        clip.text_model(input_ids=IDS, attention_mask=REAL).pooler_output.sum().backward()
    (name,) = acts.names
    assert_mean_over(REAL, (acts[name, "full"], acts[name, "mean"]))


def test_a_model_that_takes_no_masks_needs_none_for_a_part_that_is_called_alone():
    class Coder(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder, self.decoder = nn.Conv1d(8, 8, 3), nn.ConvTranspose1d(8, 8, 3)

        def encode(self, x):
            return self.encoder(x)

        def forward(self, sample, return_dict=True):
            return self.decoder(self.encode(sample))

    model = Coder()
    with capture(model, "encoder", reduce="mean") as acts:
        encoded = model.encode(torch.randn(2, 8, 9))
    torch.testing.assert_close(acts["encoder"], encoded.mean(2))
