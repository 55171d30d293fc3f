"""Sounds as samples of one channel, as soundfile reads them and soxr resamples them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import numpy as np

from activation_extractor.cli.inputs._media_file import MediaFile
from activation_extractor.errors import ArgumentError, MissingExtraError

_SUFFIXES = ".wav .flac .ogg .oga .opus .mp3 .aif .aiff .aifc .au .snd .caf .w64 .rf64"
_SIZES = re.compile(r": (\d+) \(should be (\d+)\)")  # of the parts of a file: what it says, and what is there
_UNKNOWN = 0x7FFF0000  # sizes from here on are those of streams whose end was not known yet
_TOLERATED = 64  # bytes; some programs count headers among the samples
_ABOUT = (".mp3", ".ogg", ".oga", ".opus")  # files that say only about how long they are


def check_audio() -> None:
    """Make sure that sounds can be read.

    Raises:
        MissingExtraError: soundfile is not installed.
    """
    if find_spec("soundfile") is None:
        raise MissingExtraError("Reading sounds", "audio", "soundfile")


def sound_suffixes() -> frozenset[str]:
    """Suffixes of the files that soundfile can decode."""
    return frozenset(_SUFFIXES.split())


def check_sound(file: MediaFile) -> None:
    """Read the header of a sound.

    Raises:
        ArgumentError: it is no sound, or is damaged or empty.
    """
    import soundfile

    with _reading(file):
        info = soundfile.info(file.source(), verbose=True)
        sizes = [(int(said), int(there)) for said, there in _SIZES.findall(info.extra_info)]
        _check_whole(file, not any(there + _TOLERATED < said < _UNKNOWN for said, there in sizes))
        _check_samples(file, info.frames)


def load_sound(file: MediaFile, rate: int | None = None) -> tuple[np.ndarray[Any, Any], int]:
    """The samples of a sound, float32 ``(time,)``, and how many a second has; the mean of several channels.

    Args:
        file: the sound.
        rate: of the samples that are wanted, to which others are resampled; None for the sound's own.

    Raises:
        ArgumentError: it cannot be read whole.
        MissingExtraError: it has another rate, and soxr is not installed.
    """
    import soundfile

    with _reading(file):
        with soundfile.SoundFile(file.source()) as opened:
            frames, own = opened.frames, opened.samplerate
            samples = opened.read(dtype="float32", always_2d=True)
        is_about = file.name.lower().endswith(_ABOUT)
        _check_whole(file, len(samples) >= frames * (0.95 if is_about else 1))
        _check_samples(file, len(samples))
    mono = samples[:, 0] if samples.shape[1] == 1 else samples.mean(axis=1)
    if rate is None or own == rate:
        return np.ascontiguousarray(mono), own
    if find_spec("soxr") is None:
        raise MissingExtraError(f"Resampling {file.name!r} from {own:,} to {rate:,} samples a second", "audio", "soxr")
    import soxr

    resampled = soxr.resample(mono, own, rate)
    _check_samples(file, len(resampled))
    return resampled.astype(np.float32, copy=False), rate


def _check_whole(file: MediaFile, is_whole: bool) -> None:
    if not is_whole:
        raise ArgumentError("a sound", "be whole", file.name, "Its file ends early. Remove or repair it.")


def _check_samples(file: MediaFile, count: int) -> None:
    if not count:
        raise ArgumentError("a sound", "hold samples", file.name, "Remove it.")


@contextmanager
def _reading(file: MediaFile) -> Iterator[None]:
    """What goes wrong with a sound in the block is one sentence that names it."""
    try:
        yield
    except ArgumentError:
        raise
    except Exception as error:  # soundfile's own, or of the file
        raise ArgumentError("a sound", "be a file that can be read", file.name, "Remove or repair it.") from error
