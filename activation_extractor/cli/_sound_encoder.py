"""What makes batches of sounds, by a feature extractor of transformers or a callable beside the model."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np
from torch import nn

from activation_extractor._display import plural
from activation_extractor.cli._encoder import Tally
from activation_extractor.cli._value_encoder import ValueEncoder, checked, is_processor, is_tokenizer, refuse
from activation_extractor.cli.inputs._audio import load_sound
from activation_extractor.cli.inputs._media_file import MediaFile
from activation_extractor.errors import ArgumentError


class SoundEncoder(ValueEncoder):
    """Sounds in their order, resampled to the rate of the feature extractor.

    Where it pads without a mask, as those of some speech models do, only sounds of one length share a batch: the model
    would see the padding as sound.

    Raises:
        ArgumentError: nothing that prepares sounds comes with the model.
    """

    def __init__(self, model: nn.Module, prepare: Any, batch_rows: int) -> None:
        if prepare is None or is_tokenizer(prepare):
            refuse(model, "a feature extractor for sounds", "feature extractor")
        prepare = getattr(prepare, "feature_extractor", prepare)  # a processor has a tokenizer too
        self._way = _way_of(prepare) if is_processor(prepare) else _Way({})
        self._rate: int | None = getattr(prepare, "sampling_rate", None)
        self._asks_rate = self._rate is None
        super().__init__(batch_rows, lambda sounds: checked(prepare(sounds, **self._way.options), model), self._samples)

    def plan(self, pieces: Sequence[Any]) -> list[list[int]]:
        """All together, or each run of sounds of one length."""
        if self._way.shares:
            return super().plan(pieces)
        return [list(run) for _, run in groupby(range(len(pieces)), key=lambda number: len(pieces[number]))]

    def count(self, values: Sequence[Any], pieces: Sequence[Sequence[Any]]) -> Tally:
        """How many sounds are longer than the feature extractor takes."""
        limit = self._way.limit
        return Tally(len(values), cut=sum(len(sound) > limit for sounds in pieces for sound in sounds) if limit else 0)

    def notes(self, tally: Tally, first: str) -> list[str]:
        """What a user should know of sounds."""
        notes = []
        if not self._way.shares:
            notes.append("Only sounds of one length share a batch: the feature extractor makes no mask of padding.")
        if tally.cut and self._rate:
            seconds = self._way.limit / self._rate
            notes.append(
                f"{tally.cut:,} of {first}{plural(tally.rows, 'row')} are longer than {seconds:g} s and are cut."
            )
        return notes

    def _samples(self, file: MediaFile) -> np.ndarray[Any, Any]:
        samples, rate = load_sound(file, None if self._asks_rate else self._rate)
        if self._rate is not None and rate != self._rate:
            got = f"{file.name!r} with {rate:,}, after {self._rate:,}"
            advice = "Let what prepares them have an attribute sampling_rate, and they are resampled to it."
            raise ArgumentError("sounds", "have one rate of samples a second", got, advice)
        self._rate = rate
        return samples


class _Way(NamedTuple):
    """How a feature extractor is called; whether sounds of several lengths may be; the most samples, 0 for any."""

    options: dict[str, Any]
    shares: bool = True
    limit: int = 0


def _way_of(extractor: Any) -> _Way:
    """Found by trying it on a second of noise beside half a second."""
    rate = getattr(extractor, "sampling_rate", None)
    options: dict[str, Any] = {"return_tensors": "pt", **({} if rate is None else {"sampling_rate": rate})}
    noise = np.random.default_rng(0).normal(size=rate or 16000).astype(np.float32)
    half, limit = noise[: len(noise) // 2], _limit(extractor, rate or 0)
    for padding in ({}, {"padding": True}):  # those that pad to a fixed length do so by themselves
        with suppress(Exception):
            both = dict(extractor([noise, half], **options, **padding))
            alone = dict(extractor([half], **options, **padding))
            shares = any("mask" in name for name in both) or all(
                both[name].shape[1:] == alone[name].shape[1:] for name in both
            )
            return _Way({**options, **padding}, shares, limit)
    return _Way({**options, "padding": True}, limit=limit)


def _limit(extractor: Any, rate: int) -> int:
    """How many samples a feature extractor takes of a sound, where it cuts what is longer; else 0."""
    for name, factor in (("n_samples", 1), ("nb_max_samples", 1), ("max_length", rate // 100)):  # frames of 10 ms
        if isinstance(value := getattr(extractor, name, None), int):
            return value * factor
    return 0
