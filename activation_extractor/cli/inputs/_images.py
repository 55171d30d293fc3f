"""Pictures, turned as their EXIF data say, as Pillow reads them."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec
from typing import Any

import numpy as np

from activation_extractor._arguments import check_size
from activation_extractor.cli.inputs._media_file import MediaFile
from activation_extractor.errors import ArgumentError, MissingExtraError


def check_images() -> None:
    """Make sure that pictures can be read.

    Raises:
        MissingExtraError: Pillow is not installed.
    """
    if find_spec("PIL") is None:
        raise MissingExtraError("Reading images", "images", "pillow")


def set_pixel_limit(max_pixels: int | None) -> None:
    """Say how many pixels a picture may have; None leaves it to Pillow."""
    if max_pixels is not None:
        check_size("max_pixels", max_pixels)
        check_images()
        from PIL import Image

        Image.MAX_IMAGE_PIXELS = max_pixels / 2  # it refuses what has more than twice as many


@cache
def image_suffixes() -> frozenset[str]:
    """Suffixes of the files that Pillow can decode; without it, the usual ones."""
    if find_spec("PIL") is None:
        return frozenset({".png", ".jpg", ".jpeg", ".gif", ".bmp", ".tif", ".tiff", ".webp"})
    from PIL import Image

    kinds = Image.registered_extensions()
    return frozenset(
        suffix for suffix, kind in kinds.items() if kind in Image.OPEN and Image.MIME.get(kind, "").startswith("image/")
    )


def check_image(file: MediaFile) -> None:
    """Read the header of a picture.

    Raises:
        ArgumentError: it is no picture, or has too many pixels.
    """
    with _opened(file):
        pass


def load_image(file: MediaFile) -> Any:
    """A picture as Pillow's RGB image of 8 bits, upright; the first one of several frames.

    16 bits of grey are scaled to 8.

    Raises:
        ArgumentError: it cannot be read whole, or has too many pixels or bits.
    """
    from PIL import Image, ImageOps

    with _opened(file) as image:
        is_deep = image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM"))
        if image.mode in ("I", "F") and not is_deep:
            advice = "Convert it to 8 bits."
            raise ArgumentError("an image", "have 8 or 16 bits for a value, and not 32", file.name, advice)
        upright = ImageOps.exif_transpose(image)
        if is_deep:  # Pillow's own way would make white of all but the darkest 255 greys
            upright = Image.fromarray(np.round(np.asarray(upright, np.float32) / 257).astype(np.uint8))
        return upright.convert("RGB")


@contextmanager
def _opened(file: MediaFile) -> Iterator[Any]:
    """A picture of which the header is read; what goes wrong with it in the block is one sentence that names it."""
    from PIL import Image, UnidentifiedImageError

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of many pixels below the limit, of damaged EXIF data, of palettes
            with Image.open(file.source()) as image:
                yield image
    except ArgumentError:
        raise
    except Image.DecompressionBombError as error:
        condition = f"have at most {int(2 * (Image.MAX_IMAGE_PIXELS or 0)):,} pixels"
        advice = "Shrink it, or pass max_pixels= if you trust it."
        raise ArgumentError("an image", condition, file.name, advice) from error
    except UnidentifiedImageError as error:
        raise ArgumentError("an image", "be a file that can be read", file.name, "Remove or repair it.") from error
    except Exception as error:  # each format has its own way to be damaged
        raise ArgumentError("an image", "be whole", file.name, f"{error}. Remove or repair it.") from error
