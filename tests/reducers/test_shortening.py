"""Masks of layers behind the place where a model shortens its sequence."""

from __future__ import annotations

import inspect
import re

import pytest
import torch
import transformers as tf
from models import output_of
from torch import Tensor, nn

from activation_extractor import capture, extract
from activation_extractor.errors import MaskError

SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32, "vocab_size": 20}
SPEECH = {
    "conv_dim": [8, 8, 8],
    "conv_kernel": [10, 3, 2],
    "conv_stride": [5, 2, 2],
    "num_feat_extract_layers": 3,
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
    "feat_extract_norm": "layer",
    "do_stable_layer_norm": True,
    "layerdrop": 0.0,
}
SEQ2SEQ = {
    "vocab_size": 20,
    "d_model": 16,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
    "num_mel_bins": 8,
    "decoder_start_token_id": 2,
    "pad_token_id": 1,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SAMPLES = (400, 300, 251)


def speech(name: str, kind: str = "Model", **more: object) -> nn.Module:
    torch.manual_seed(0)
    return getattr(tf, name + kind)(getattr(tf, name + "Config")(**{**SIZES, **SPEECH, **more})).eval()


def padded(rows: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Rows ``(seq, ...)`` padded on the right, and their mask."""
    lengths = torch.tensor([len(row) for row in rows])
    return nn.utils.rnn.pad_sequence(rows, batch_first=True), (torch.arange(max(lengths)) < lengths[:, None]).long()


def assert_as_alone(model: nn.Module, layers: list[str], rows: list[Tensor], *, attends: bool = True, **axis) -> None:
    """Each row's mean in a padded batch is its mean alone; without `attends`, over as many positions as alone."""
    batch, mask = padded(rows)
    with torch.no_grad(), capture(model, layers, reduce=["mean", "full"], **axis) as acts:
        model(batch, attention_mask=mask)
    for number, row in enumerate(rows):
        with torch.no_grad(), capture(model, layers, reduce=["mean", "full"], **axis) as alone:
            model(row[None], attention_mask=torch.ones(1, len(row), dtype=torch.int64))
        for layer in layers:
            expected = alone[layer, "mean"][0]
            if not attends:
                shape = alone[layer, "full"].shape[1:]
                expected = acts[layer, "full"][number, : shape[0], : shape[1]].mean(acts_axis(acts, layer))
            torch.testing.assert_close(acts[layer, "mean"][number], expected, atol=1e-5, rtol=0)


def acts_axis(acts, layer: str) -> int:
    """Where the sequence of one row is: behind the channels in a convolution over time."""
    return 1 if acts[layer, "full"].shape[1] == acts[layer, "mean"].shape[1] else 0


CONVOLUTIONS = [f"feature_extractor.conv_layers.{number}.conv" for number in range(3)]
FRAMES = ["feature_projection", "encoder.layers.1", "encoder"]


@pytest.mark.filterwarnings("ignore:Support for mismatched key_padding_mask")  # WavLM's
@pytest.mark.parametrize("name", ["Wav2Vec2", "Hubert", "UniSpeech", "UniSpeechSat", "WavLM"])
def test_each_layer_of_a_speech_model_leaves_out_what_padding_became(name):
    rows = [torch.randn(samples) for samples in SAMPLES]
    more = {"num_buckets": 20, "max_bucket_distance": 40} if name == "WavLM" else {}
    assert_as_alone(speech(name, **more), [*CONVOLUTIONS, *FRAMES], rows)


@pytest.mark.parametrize(("name", "blocks"), [("SEW", "encoder.layers.1"), ("SEWD", "encoder.encoder.layer.1")])
def test_frames_that_are_squeezed_for_the_blocks_and_stretched_again_are_counted(name, blocks):
    more = {"squeeze_factor": 2, "position_buckets": 8, "max_position_embeddings": 64}
    rows = [torch.randn(samples) for samples in SAMPLES]
    layers = [*CONVOLUTIONS, "encoder.pool", blocks, "encoder.upsample", "encoder"]
    assert_as_alone(speech(name, **more if name == "SEWD" else {"squeeze_factor": 2}), layers, rows)


def test_models_that_look_at_padding_have_the_positions_of_the_row_alone():
    rows = [torch.randn(samples) for samples in SAMPLES]
    model = speech("Data2VecAudio", num_conv_pos_embeddings=2, conv_pos_kernel_size=3)
    assert_as_alone(model, [*CONVOLUTIONS, *FRAMES], rows, attends=False)
    model = speech("Wav2Vec2Conformer", conv_depthwise_kernel_size=3)
    assert_as_alone(model, [*CONVOLUTIONS, *FRAMES], rows, attends=False)


def test_heads_and_adapters_behind_the_encoder_are_counted():
    rows = [torch.randn(samples) for samples in SAMPLES]
    axis = {"sequence_axis": {"adapter": 1}}  # it holds convolutions
    model = speech("Wav2Vec2", add_adapter=True, num_adapter_layers=2, output_hidden_size=16)
    assert_as_alone(model, ["adapter.layers.0.conv", "adapter", "encoder.layers.1"], rows, attends=False, **axis)
    assert_as_alone(speech("Wav2Vec2", "ForCTC"), ["lm_head", "wav2vec2.encoder.layers.0"], rows)
    assert_as_alone(speech("Wav2Vec2", "ForSequenceClassification"), ["projector"], rows)


def test_spectrograms_are_counted_through_the_functions_of_their_models():
    rows = [torch.randn(frames, 8) for frames in (41, 30, 21)]
    bert = speech("Wav2Vec2Bert", feature_projection_input_dim=8, add_adapter=True, conv_depthwise_kernel_size=3)
    assert_as_alone(bert, ["encoder.layers.1", "adapter"], rows, attends=False)
    sizes = {key: value for key, value in SIZES.items() if key != "vocab_size"}
    config = tf.ParakeetEncoderConfig(**sizes, conv_kernel_size=3, subsampling_conv_channels=4, num_mel_bins=8)
    assert_as_alone(tf.ParakeetEncoder(config).eval(), ["subsampling", "layers.1"], rows, attends=False)


# -- encoder and decoder ----------------------------------------------------------------------------------------------


def speech_to_text() -> nn.Module:
    sizes = {"num_conv_layers": 2, "conv_kernel_sizes": (5, 5), "conv_channels": 16, "input_feat_per_channel": 8}
    return tf.Speech2TextModel(tf.Speech2TextConfig(**SEQ2SEQ, **sizes, max_source_positions=200)).eval()


@pytest.mark.parametrize("layer", ["encoder.layers.1", "encoder", "decoder.layers.1.encoder_attn.k_proj"])
def test_keys_of_shortened_frames_are_those_of_the_encoder_although_a_cache_is_carried(layer):
    model, (frames, mask) = speech_to_text(), padded([torch.randn(count, 8) for count in (40, 38, 21)])
    with torch.no_grad(), capture(model, layer, reduce=["mean", "full"]) as acts:
        model(frames, attention_mask=mask, decoder_input_ids=torch.full((3, 2), 3))
    for row, count in enumerate((10, 10, 6)):  # twice half, rounded up
        torch.testing.assert_close(acts[layer, "mean"][row], acts[layer, "full"][row, :count].mean(0))


@pytest.mark.parametrize("layer", ["encoder.conv2", "encoder.layers.1"])
def test_the_encoder_of_whisper_is_given_no_mask_and_has_all_positions(layer):
    model = tf.WhisperModel(tf.WhisperConfig(**SEQ2SEQ, max_source_positions=20)).eval()
    call = {"input_features": torch.randn(2, 8, 40), "decoder_input_ids": torch.full((2, 2), 3)}
    axis = 2 if "conv" in layer else 1

    def mean(count, **options):
        with torch.no_grad(), capture(model, layer, reduce=["mean", "full"], **options) as acts:
            model(**call)
        full = acts[layer, "full"].movedim(axis, 1)[1, :count]
        torch.testing.assert_close(acts[layer, "mean"][1], full.mean(0))

    mean(20)
    call["attention_mask"] = torch.tensor([[1] * 40, [1] * 20 + [0] * 20])
    with pytest.raises(MaskError, match="'attention_mask', without which 'encoder' was called") as caught:
        mean(20)
    none, named = (eval(text) for text in re.findall(r"mask=(\{.*?\})", str(caught.value)))
    mean(20, mask=none)
    mean(10, mask=named)


def test_merged_patches_of_pictures_are_all_real():
    config = tf.SwinConfig(image_size=32, patch_size=2, embed_dim=8, depths=[1, 1], num_heads=[1, 2], window_size=4)
    model, layers = tf.SwinModel(config).eval(), ["encoder.layers.0", "encoder.layers.1", "layernorm"]
    with torch.no_grad(), capture(model, layers, reduce=["mean", "full"]) as acts:
        model(torch.randn(2, 3, 32, 32))
    for layer in layers:
        torch.testing.assert_close(acts[layer, "mean"], acts[layer, "full"].mean(1))


# -- models of one's own ----------------------------------------------------------------------------------------------


class FrontEnd(nn.Module):
    def __init__(self, *front: nn.Module) -> None:
        super().__init__()
        self.front, self.norm, self.head = nn.ModuleList(front), nn.LayerNorm(8), nn.Linear(8, 3)

    def forward(self, x, attention_mask=None):
        x = x.transpose(1, 2)
        for module in self.front:
            x = module(x)
        return self.head(self.norm(x.transpose(1, 2)))


FRONTS = {
    "patches": lambda: [nn.Conv1d(4, 8, 4, stride=4)],
    "overlapping": lambda: [nn.Conv1d(4, 8, 5, stride=2), nn.GELU(), nn.Conv1d(8, 8, 3, stride=2)],
    "dilated": lambda: [nn.Conv1d(4, 8, 3, dilation=2), nn.MaxPool1d(2)],
    "same": lambda: [nn.Conv1d(4, 8, 1), nn.Conv1d(8, 8, 3, padding="same"), nn.AvgPool1d(3)],
}


@pytest.mark.parametrize("front", FRONTS)
def test_convolutions_and_poolings_say_how_they_shorten(front):
    model = FrontEnd(*FRONTS[front]()).eval()
    rows = [torch.randn(length, 4) for length in (40, 29, 21)]
    assert_as_alone(model, ["norm", "head"], rows, attends=front != "same")


def test_padding_on_the_left_of_what_is_shortened_is_an_error_that_can_be_followed():
    model, mask = FrontEnd(*FRONTS["patches"]()), torch.tensor([[1] * 8, [0] * 3 + [1] * 5])
    text = "The mask for layer 'head' must have its padding on the right, as the model shortens its sequence before"
    with pytest.raises(MaskError, match=text), capture(model, "head", reduce="mean"):
        model(torch.randn(2, 8, 4), attention_mask=mask)
    for advised in ({"mask": None}, {"mask": mask.flip(1)}):
        with capture(model, "head", reduce="mean", **advised):
            model(torch.randn(2, 8, 4), attention_mask=mask)


class Merged(nn.Module):
    """Puts each two positions together."""

    def __init__(self) -> None:
        super().__init__()
        self.patch_merging, self.head = nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x, attention_mask=None):
        return self.head(self.patch_merging(x.reshape(len(x), -1, 8)))


@pytest.mark.parametrize("flips", [False, True])
def test_merged_positions_are_real_where_all_of_a_group_are(flips):
    model, x, mask = Merged(), torch.randn(2, 8, 4), torch.tensor([[1] * 8, [1] * 6 + [0] * 2])
    mask = mask.flip(1) if flips else mask
    with capture(model, "head", reduce=["mean", "full"]) as acts:
        model(x, attention_mask=mask)
    real = acts["head", "full"][1, 1:] if flips else acts["head", "full"][1, :3]
    torch.testing.assert_close(acts["head", "mean"][1], real.mean(0))
    mask[1, 5 if not flips else 2] = 0  # half of a group
    with pytest.raises(MaskError, match=r"must have shape \(2, 4\), got shape \(2, 8\)"):
        with capture(model, "head", reduce="mean"):
            model(x, attention_mask=mask)


class Latents(nn.Module):
    """Half as many latents as positions, and nothing that shortens."""

    def __init__(self) -> None:
        super().__init__()
        self.latents, self.resampler = nn.Parameter(torch.randn(1, 4, 4)), nn.MultiheadAttention(4, 1, batch_first=True)

    def forward(self, x, attention_mask=None):
        return self.resampler(self.latents.expand(len(x), -1, -1), x, x)[0]


def test_half_as_many_positions_are_no_reason_to_believe_that_a_mask_is_theirs():
    model = Latents()
    with pytest.raises(MaskError, match=r"must have shape \(2, 4\), got shape \(2, 8\)\. Pass mask=None if"):
        with capture(model, "resampler", reduce="mean"):
            model(torch.randn(2, 8, 4), attention_mask=torch.tensor([[1] * 8, [1] * 6 + [0] * 2]))


def test_a_row_that_is_shorter_than_one_window_is_named():
    rows = [torch.randn(samples) for samples in (400, 9)]
    batch, mask = padded(rows)
    model = speech("Wav2Vec2")
    with pytest.raises(MaskError, match="must have a real position in every row, got none in row 1"):
        with torch.no_grad(), capture(model, "feature_extractor.conv_layers.0.conv", reduce="mean"):
            model(batch, attention_mask=mask)


def test_a_run_stores_the_frames_of_each_row_alone(tmp_path):
    model, rows = speech("Wav2Vec2"), [torch.randn(samples) for samples in SAMPLES]
    batch, mask = padded(rows)
    batches = [{"input_values": batch, "attention_mask": mask}]
    layers = ["feature_projection.projection", "encoder.layers.1"]
    store = extract(model, batches, layers, reduce=["mean", "full"], out=tmp_path, progress=False)
    for number, row in enumerate(rows):
        with torch.no_grad():
            expected = output_of(model.encoder.layers[1], lambda one=row: model(one[None]))[0]
        assert store["encoder.layers.1", "full"][number].shape == expected.shape
        torch.testing.assert_close(
            store["encoder.layers.1", "mean"].torch()[number], expected.mean(0), atol=1e-5, rtol=0
        )


class Cached(nn.Module):
    """Continues a text with a cache; beside it there is a vision tower that merges patches, which is not called."""

    def __init__(self) -> None:
        super().__init__()
        self.patch_merger, self.layers = nn.Linear(8, 8), nn.ModuleList([nn.Embedding(20, 8)])

    def forward(self, input_ids, attention_mask=None, past_key_values=None):
        return self.layers[0](input_ids)


def test_a_longer_mask_of_a_cached_step_is_not_one_of_a_shortened_sequence():
    model, mask = Cached(), torch.tensor([[1] * 12, [0] * 3 + [1] * 9])
    with capture(model, "layers.0", reduce=["mean", "full"]) as acts:
        model(torch.randint(20, (2, 4)), attention_mask=mask, past_key_values=object())
    torch.testing.assert_close(acts["layers.0", "mean"], acts["layers.0", "full"].mean(1))


def test_a_step_of_a_decoder_beside_a_shortened_encoder_has_the_last_columns_of_its_mask():
    model = tf.WhisperModel(tf.WhisperConfig(**SEQ2SEQ, max_source_positions=20)).eval()
    call = {"input_features": torch.randn(2, 8, 40), "decoder_input_ids": torch.full((2, 2), 3)}
    with torch.no_grad():
        name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
        call |= {"decoder_input_ids": torch.full((2, 1), 3), name: model(**call, use_cache=True)[name]}
        with capture(model, "decoder.layers.1", reduce=["mean", "full"]) as acts:
            model(**call, decoder_attention_mask=torch.tensor([[1, 1, 1], [0, 1, 1]]))
    torch.testing.assert_close(acts["decoder.layers.1", "mean"], acts["decoder.layers.1", "full"][:, 0])
