"""``activation-extractor extract`` on pictures and sounds, beside transformers alone."""

from __future__ import annotations

import commands
import numpy as np
import pytest
import torch
import transformers
from media import RATE, picture, save_sound, save_turned, sound
from models import output_of
from releases import VIT_IMAGE_PROCESSOR
from transformers.image_utils import load_image

from activation_extractor import open_store

SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}


def save_vit(folder) -> tuple[str, object, object]:
    torch.manual_seed(0)
    model = transformers.ViTModel(transformers.ViTConfig(image_size=32, patch_size=8, **SIZES)).eval()
    model.save_pretrained(folder)
    processor = getattr(transformers, VIT_IMAGE_PROCESSOR)(size={"height": 32, "width": 32})
    processor.save_pretrained(folder)
    return str(folder), model, processor


def save_wav2vec2(folder, **options) -> tuple[str, object, object]:
    torch.manual_seed(0)
    config = transformers.Wav2Vec2Config(
        **SIZES, conv_dim=(8, 8), conv_stride=(10, 8), conv_kernel=(20, 8), num_feat_extract_layers=2,
        num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2, feat_extract_norm="layer", vocab_size=20,
        do_stable_layer_norm=True,
    )  # fmt: skip
    model = transformers.Wav2Vec2Model(config).eval()
    model.save_pretrained(folder)
    options = {"sampling_rate": RATE, "return_attention_mask": True, "do_normalize": True, **options}
    extractor = transformers.Wav2Vec2FeatureExtractor(**options)
    extractor.save_pretrained(folder)
    return str(folder), model, extractor


def test_pictures_are_embedded_as_transformers_loads_them(tmp_path):
    name, model, processor = save_vit(tmp_path / "vit")
    (tmp_path / "in" / "cats").mkdir(parents=True)
    for number, orientation in enumerate([1, 3, 6, 8, 5]):
        save_turned(tmp_path / "in" / "cats" / f"{number}.jpg", orientation, seed=number)
    arguments = ("--model", name, "--input", tmp_path / "in", "--batch-size", 2, "--keep", "folder", "--reduce", "mean")
    commands.run("extract", *arguments, "--out", tmp_path / "out")
    store = open_store(tmp_path / "out")
    assert list(store.ids) == [f"cats/{number}.jpg" for number in range(5)]
    assert list(store.keep["folder"]) == ["cats"] * 5
    for number in range(5):
        image = load_image(str(tmp_path / "in" / "cats" / f"{number}.jpg"))
        with torch.no_grad():
            states = model(**processor(image, return_tensors="pt"), output_hidden_states=True).hidden_states
        for layer in range(2):
            column = torch.as_tensor(
                store[f"layers.{layer}" if f"layers.{layer}" in store else f"encoder.layer.{layer}"].numpy()
            )
            torch.testing.assert_close(column[number], states[layer + 1][0].mean(0), atol=1e-5, rtol=0)


def test_three_scans_of_16_bits_have_three_embeddings(tmp_path):
    from PIL import Image

    name, *_ = save_vit(tmp_path / "vit")
    (tmp_path / "in").mkdir()
    for number in range(3):
        grey = np.random.default_rng(number).integers(1000, 65535, (32, 32)).astype(np.uint16)
        Image.fromarray(grey).save(tmp_path / "in" / f"{number}.png")
    commands.run("extract", "--model", name, "--input", tmp_path / "in", "--out", tmp_path / "out")
    rows = next(iter(open_store(tmp_path / "out").values())).numpy()
    assert all(np.abs(rows[one] - rows[other]).max() > 1e-3 for one, other in [(0, 1), (0, 2), (1, 2)])


@pytest.mark.parametrize("masks", [True, False])
@pytest.mark.parametrize("kind", ["folder", "table"])
def test_sounds_of_several_lengths_are_embedded_as_each_alone(tmp_path, masks, kind):
    name, model, extractor = save_wav2vec2(tmp_path / "wav2vec2", return_attention_mask=masks)
    (tmp_path / "in").mkdir()
    seconds = (1.0, 0.4, 0.73)
    for number, length in enumerate(seconds):
        save_sound(tmp_path / "in" / f"{number}.flac", length, seed=number)
    source = (tmp_path / "in",)
    if kind == "table":
        (tmp_path / "in" / "x.csv").write_text("path,speaker\n" + "".join(f"{row}.flac,s{row}\n" for row in range(3)))
        source = (tmp_path / "in" / "x.csv", "--path-column", "path", "--keep", "speaker")
    layers = ("--layers", "encoder.layers.*", "--layers", "feature_projection.projection")
    done = commands.run("extract", "--model", name, "--input", *source, *layers, "--out", tmp_path / "out")
    assert ("Only sounds of one length share a batch" in done.stderr) is not masks
    store = open_store(tmp_path / "out")
    for number, length in enumerate(seconds):
        made = extractor(sound(length, number), sampling_rate=RATE, return_tensors="pt")
        with torch.no_grad():
            states = model(made["input_values"], output_hidden_states=True).hidden_states
            features = model.feature_projection(model.feature_extractor(made["input_values"]).transpose(1, 2))[0]
        mean = torch.as_tensor(store["encoder.layers.0"].numpy())[number]
        torch.testing.assert_close(mean, states[1][0].mean(0), atol=1e-5, rtol=1e-4)
        mean = torch.as_tensor(store["feature_projection.projection"].numpy())[number]
        torch.testing.assert_close(mean, features[0].mean(0), atol=1e-5, rtol=1e-4)


def test_whisper_cuts_what_is_too_long_and_its_encoder_is_that_of_transformers(tmp_path):
    sizes = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
    tokens = {"decoder_start_token_id": 2, "pad_token_id": 1, "bos_token_id": 1, "eos_token_id": 2, "vocab_size": 20}
    config = transformers.WhisperConfig(
        **sizes, **tokens, d_model=16, encoder_layers=2, decoder_layers=1, num_mel_bins=80, max_source_positions=50
    )
    model = transformers.WhisperModel(config).eval()
    extractor = transformers.WhisperFeatureExtractor(chunk_length=1)
    for saved in (model, extractor):
        saved.save_pretrained(tmp_path / "whisper")
    rows = extractor([sound(0.5, rate=16000), sound(1.5, 1, 16000)], sampling_rate=16000, return_tensors="pt")[
        "input_features"
    ]
    (tmp_path / "in").mkdir()
    save_sound(tmp_path / "in" / "0.flac", 0.5, rate=16000)
    save_sound(tmp_path / "in" / "1.flac", 1.5, seed=1, rate=16000)
    run = ("--model", tmp_path / "whisper", "--input", tmp_path / "in", "--out", tmp_path / "out")
    done = commands.run("extract", *run, "--layers", "encoder.layers.1", "--reduce", "mean")
    assert "1 of 2 rows are longer than 1 s and are cut." in done.stderr
    assert "The decoder is given its first token alone (2), since the input is for the encoder." in done.stderr
    with torch.no_grad():
        states = output_of(model.encoder.layers[1], lambda: model.encoder(rows))
    column = torch.as_tensor(open_store(tmp_path / "out")["encoder.layers.1"].numpy())
    torch.testing.assert_close(column, states.mean(1), atol=1e-4, rtol=1e-4)


def test_sounds_of_another_rate_are_resampled_to_that_of_the_model(tmp_path):
    name, *_ = save_wav2vec2(tmp_path / "wav2vec2")
    for rate in (RATE, 2 * RATE):
        (tmp_path / f"{rate}").mkdir()
        save_sound(tmp_path / f"{rate}" / "x.wav", 1, rate=rate)
        done = commands.run(
            "extract", "--model", name, "--input", tmp_path / f"{rate}", "--out", tmp_path / f"out{rate}"
        )
        assert (
            "2 blocks left out ('feature_extractor.conv_layers.0', 'feature_extractor.conv_layers.1'), as"
            in done.stderr
        )
    one, other = (next(iter(open_store(tmp_path / f"out{rate}").values())).numpy() for rate in (RATE, 2 * RATE))
    np.testing.assert_allclose(one, other, atol=0.02)


def test_the_mask_may_be_named_or_left_out(tmp_path):
    name, model, extractor = save_wav2vec2(tmp_path / "wav2vec2")
    (tmp_path / "in").mkdir()
    for number, length in enumerate((1.0, 0.4)):
        save_sound(tmp_path / "in" / f"{number}.flac", length, seed=number)
    run = ("extract", "--model", name, "--input", tmp_path / "in", "--layers", "encoder.layers.1", "--reduce", "mean")
    made = extractor([sound(1.0, 0), sound(0.4, 1)], padding=True, sampling_rate=RATE, return_tensors="pt")
    with torch.no_grad():
        states = output_of(model.encoder.layers[1], lambda: model(**made))
    frames = len(model._get_feature_vector_attention_mask(states.shape[1], made["attention_mask"])[1].nonzero())
    for mask, expected in (("none", states[1].mean(0)), ("attention_mask", states[1, :frames].mean(0))):
        for number, option in enumerate((mask, f"encoder.**={mask}")):
            out = tmp_path / f"{mask}{number}"
            commands.run(*run, "--mask", option, "--out", out)
            row = torch.as_tensor(open_store(out)["encoder.layers.1"].numpy())[1]
            if mask == "attention_mask":
                torch.testing.assert_close(row, expected, atol=1e-5, rtol=1e-4)
            else:
                assert (row - states[1, :frames].mean(0)).abs().max() > 1e-3


FACTORY = """
import torch
from torch import nn

class Half(nn.Module):
    def forward(self, x):
        return x[:, ::2]

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.shorter, self.head = Half(), nn.Linear(3, 3)
    def forward(self, x, attention_mask=None):
        return self.head(self.shorter(x))

def halved():
    return Model(), lambda rows: {"x": torch.ones(len(rows), 6, 3), "attention_mask": torch.ones(len(rows), 6).long()}

def additive():
    return Model(), lambda rows: {"x": torch.ones(len(rows), 6, 3), "attention_mask": torch.zeros(len(rows), 1, 1, 6)}
"""


@pytest.mark.parametrize("model", ["halved", "additive"])
def test_the_advice_on_a_mask_that_does_not_fit_can_be_followed(tmp_path, monkeypatch, model):
    (tmp_path / "masked_models.py").write_text(FACTORY)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.txt").write_text("a\nb\n")
    run = ("extract", "--model", f"masked_models:{model}", "--input", "x.txt", "--layers", "head", "--out", "out")
    line = commands.mistake(*run)
    assert line.startswith("The mask for layer 'head' must have shape (")
    assert "Pass --mask none if every position is real" in line
    assert "callable" not in line
    assert "mask=" not in line
    commands.run(*run, "--mask", "none")
    assert commands.mistake(*run, "--mask", "none", "--mask", "x").startswith("--mask must be one for all layers")


def test_a_picture_with_too_many_pixels_may_be_allowed(tmp_path, monkeypatch):
    from PIL import Image

    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 300)
    name, *_ = save_vit(tmp_path / "vit")
    (tmp_path / "in").mkdir()
    picture().save(tmp_path / "in" / "slide.png")
    run = ("extract", "--model", name, "--input", tmp_path / "in", "--out", tmp_path / "out")
    line = commands.mistake(*run)
    assert line == (
        "an image must have at most 600 pixels, got 'slide.png'. Shrink it, or pass --max-pixels if you trust it."
    )
    commands.run(*run, "--max-pixels", 960)
