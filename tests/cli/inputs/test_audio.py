"""Sounds as samples of one channel at the rate that is wanted."""

from __future__ import annotations

import io
import struct
from pathlib import Path

import numpy as np
import pytest
import soundfile
from media import RATE, sound

from activation_extractor.cli.inputs import _audio
from activation_extractor.cli.inputs._audio import check_audio, check_sound, load_sound
from activation_extractor.cli.inputs._media_file import MediaFile
from activation_extractor.errors import ArgumentError, MissingExtraError


def file(path: Path) -> MediaFile:
    return MediaFile(path.name, path)


@pytest.mark.parametrize("suffix", ["wav", "flac", "aiff", "au", "w64"])
def test_samples_are_those_that_were_saved(tmp_path, suffix):
    path = tmp_path / f"tone.{suffix}"
    soundfile.write(path, sound(0.5), RATE)
    check_sound(file(path))
    samples, rate = load_sound(file(path), RATE)
    assert (rate, samples.dtype, samples.shape) == (RATE, np.float32, (4000,))
    np.testing.assert_allclose(samples, sound(0.5), atol=1e-4)


@pytest.mark.parametrize("suffix", ["ogg", "mp3"])
def test_lossy_formats_are_read_whole(tmp_path, suffix):
    path = tmp_path / f"tone.{suffix}"
    soundfile.write(path, sound(1), RATE)
    check_sound(file(path))
    samples, _ = load_sound(file(path))
    assert abs(len(samples) - RATE) < 2000
    assert np.abs(samples).max() > 0.1


@pytest.mark.parametrize("subtype", ["PCM_U8", "PCM_16", "PCM_24", "PCM_32", "FLOAT", "DOUBLE", "ULAW"])
def test_samples_of_every_width_are_from_minus_1_to_1(tmp_path, subtype):
    soundfile.write(tmp_path / "tone.wav", sound(0.2), RATE, subtype=subtype)
    np.testing.assert_allclose(load_sound(file(tmp_path / "tone.wav"))[0], sound(0.2), atol=0.03)


def test_several_channels_are_averaged(tmp_path):
    left, right = sound(0.2), sound(0.2, seed=1)
    soundfile.write(tmp_path / "stereo.wav", np.stack([left, right], 1), RATE, subtype="FLOAT")
    np.testing.assert_allclose(load_sound(file(tmp_path / "stereo.wav"))[0], (left + right) / 2, atol=1e-6)


@pytest.mark.parametrize("rate", [44100, 16000, 6000])
def test_another_rate_is_resampled(tmp_path, rate):
    soundfile.write(tmp_path / "tone.flac", sound(1, rate=rate), rate)
    samples, made = load_sound(file(tmp_path / "tone.flac"), RATE)
    assert (made, len(samples)) == (RATE, RATE)
    np.testing.assert_allclose(samples[500:-500], sound(1)[500:-500], atol=2e-3)


def test_without_the_resampler_both_rates_are_named(tmp_path, monkeypatch):
    soundfile.write(tmp_path / "tone.flac", sound(0.2, rate=44100), 44100)
    monkeypatch.setattr(_audio, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"tone\.flac' from 44,100 to 8,000 samples a second needs soxr"):
        load_sound(file(tmp_path / "tone.flac"), RATE)
    with pytest.raises(MissingExtraError, match=r"Reading sounds needs soundfile"):
        check_audio()


@pytest.mark.parametrize("suffix", ["wav", "flac", "ogg", "aiff", "au", "w64", "mp3"])
def test_a_file_that_ends_early_is_an_error_that_names_it(tmp_path, suffix):
    path = tmp_path / f"cut.{suffix}"
    soundfile.write(path, sound(2), RATE)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ArgumentError, match=rf"a sound must be (whole|a file that can be read), got .*cut\.{suffix}"):
        check_sound(file(path))
        load_sound(file(path))


@pytest.mark.parametrize("said", [0xFFFFFFFF, 0x7FFFFFFF, 0x7FFFF000, 8000 + 44])
def test_a_stream_that_did_not_know_its_length_is_no_file_that_ends_early(tmp_path, said):
    path = tmp_path / "stream.wav"
    soundfile.write(path, sound(0.5), RATE)
    content = bytearray(path.read_bytes())
    content[40:44] = struct.pack("<I", said)
    path.write_bytes(content)
    check_sound(file(path))
    assert len(load_sound(file(path))[0]) == 4000


def test_what_holds_no_sound_is_an_error_that_names_it(tmp_path):
    (tmp_path / "text.wav").write_text("no sound")
    soundfile.write(tmp_path / "empty.wav", np.zeros(0), RATE)
    for name, condition in (("text", "be a file that can be read"), ("empty", "hold samples")):
        for read in (check_sound, load_sound):
            with pytest.raises(ArgumentError, match=rf"a sound must {condition}, got .*{name}\.wav"):
                read(file(tmp_path / f"{name}.wav"))


def test_bytes_are_read_as_a_file_is():
    content = io.BytesIO()
    soundfile.write(content, sound(0.2), RATE, format="FLAC")
    made = MediaFile("row 1", Path(), content.getvalue())
    check_sound(made)
    np.testing.assert_allclose(load_sound(made)[0], sound(0.2), atol=1e-4)
