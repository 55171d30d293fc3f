"""Pictures as the loader of transformers reads them, but for what it would read wrong."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from media import picture, save_turned
from PIL import Image
from transformers.image_utils import load_image as of_transformers

from activation_extractor.cli.inputs import _images
from activation_extractor.cli.inputs._images import (
    check_image,
    check_images,
    image_suffixes,
    load_image,
    set_pixel_limit,
)
from activation_extractor.cli.inputs._media_file import MediaFile
from activation_extractor.errors import ArgumentError, MissingExtraError


def loaded(path: Path) -> np.ndarray:
    return np.asarray(load_image(MediaFile(path.name, path)))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_picture_is_turned_as_its_exif_data_say(tmp_path, orientation):
    path = tmp_path / "turned.jpg"
    save_turned(path, orientation)
    np.testing.assert_array_equal(loaded(path), np.asarray(of_transformers(str(path))))
    assert loaded(path).shape == ((24, 40, 3) if orientation < 5 else (40, 24, 3))


@pytest.mark.parametrize("suffix", ["png", "tif", "webp"])
def test_other_formats_have_exif_data_too(tmp_path, suffix):
    path = tmp_path / f"turned.{suffix}"
    save_turned(path, 6)
    assert loaded(path).shape == (40, 24, 3)
    np.testing.assert_array_equal(loaded(path), np.asarray(of_transformers(str(path))))


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_grey_of_16_bits_is_scaled(tmp_path, suffix):
    path, grey = tmp_path / f"scan.{suffix}", np.linspace(0, 65535, 24 * 40).reshape(24, 40).astype(np.uint16)
    Image.fromarray(grey).save(path)
    np.testing.assert_array_equal(loaded(path), np.repeat(np.round(grey / 257)[..., None], 3, axis=2))


def test_big_endian_grey_of_16_bits_is_scaled(tmp_path):
    grey = np.arange(0, 65536, 4096, dtype=np.uint16).reshape(4, 4)
    (tmp_path / "scan.pgm").write_bytes(b"P5 4 4 65535\n" + grey.astype(">u2").tobytes())
    np.testing.assert_array_equal(loaded(tmp_path / "scan.pgm")[..., 0], np.round(grey / 257))


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_values_of_32_bits_are_an_error_that_names_the_file(tmp_path, dtype):
    path = tmp_path / "measured.tif"
    Image.fromarray(np.full((4, 4), 70000, dtype=dtype)).save(path)
    with pytest.raises(
        ArgumentError, match=r"8 or 16 bits for a value, and not 32, got .*measured\.tif.*Convert it to 8"
    ):
        loaded(path)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "YCbCr"])
def test_each_mode_becomes_what_transformers_make_of_it(tmp_path, mode):
    path = tmp_path / {"CMYK": "x.jpg", "YCbCr": "x.jpg"}.get(mode, "x.png")
    picture().convert(mode).save(path)
    np.testing.assert_array_equal(loaded(path), np.asarray(of_transformers(str(path))))


def test_a_palette_with_transparency_is_read_without_a_warning(tmp_path):
    path = tmp_path / "logo.png"
    picture().quantize(4).save(path, transparency=bytes([0, 255, 255, 255]))
    np.testing.assert_array_equal(loaded(path), np.asarray(picture().quantize(4).convert("RGB")))


def test_of_an_animation_the_first_frame_is_read(tmp_path):
    path, frames = tmp_path / "moving.gif", [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    frames[0].save(path, save_all=True, append_images=frames[1:])
    assert loaded(path)[0, 0].tolist() == [255, 0, 0]


@pytest.mark.parametrize("suffix", ["png", "jpg", "tif", "gif", "webp"])
def test_a_file_that_ends_early_is_an_error_that_names_it(tmp_path, suffix):
    path = tmp_path / f"cut.{suffix}"
    noise = np.random.default_rng(0).integers(0, 255, (60, 60, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ArgumentError, match=rf"an image must be (whole|a file that can be read), got .*cut\.{suffix}"):
        loaded(path)


def test_a_picture_with_too_many_pixels_is_named_and_can_be_allowed(tmp_path, monkeypatch):
    from PIL import Image

    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 300)
    path = tmp_path / "slide.png"
    picture().save(path)
    file = MediaFile("slide.png", path)
    for read in (check_image, load_image):
        with pytest.raises(
            ArgumentError, match=r"at most 600 pixels, got 'slide\.png'\. Shrink it, or pass max_pixels="
        ):
            read(file)
    set_pixel_limit(1000)
    assert load_image(file).size == (40, 24)  # more than half of the limit, of which Pillow warns


def test_bytes_are_read_as_a_file_is():
    content = io.BytesIO()
    picture().save(content, "PNG")
    image = load_image(MediaFile("row 1", Path(), content.getvalue()))
    np.testing.assert_array_equal(np.asarray(image), np.asarray(picture()))


def test_without_pillow_the_extra_is_named(monkeypatch):
    monkeypatch.setattr(_images, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"Reading images needs pillow.*images"):
        check_images()
    image_suffixes.cache_clear()
    assert ".jpg" in image_suffixes()
    image_suffixes.cache_clear()
