"""Pictures and sounds as files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import soundfile
from PIL import Image

RATE = 8000  # samples a second


def picture(seed: int = 0, size: tuple[int, int] = (40, 24)) -> Image.Image:
    """A picture of large coloured fields, which JPEG keeps well."""
    fields = np.random.default_rng(seed).integers(0, 255, (2, 3, 3), dtype=np.uint8)
    return Image.fromarray(fields).resize(size, Image.Resampling.NEAREST)


def save_turned(path: Path, orientation: int, seed: int = 0) -> None:
    """A picture whose EXIF data say how to turn it."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    picture(seed).save(path, exif=exif, quality=95)


def sound(seconds: float, seed: int = 0, rate: int = RATE) -> np.ndarray:
    """Some tones, below 400 Hz."""
    time = np.arange(int(seconds * rate)) / rate
    tones = np.random.default_rng(seed).uniform(50, 400, 4)
    return (0.2 * np.sin(2 * np.pi * time[:, None] * tones).sum(1)).astype(np.float32)


def save_sound(path: Path, seconds: float, seed: int = 0, rate: int = RATE) -> None:
    soundfile.write(path, sound(seconds, seed, rate), rate)
