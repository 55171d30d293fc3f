"""``--mask``, as `extract` takes it."""

from __future__ import annotations

from collections.abc import Sequence

from activation_extractor.errors import ArgumentError

DEFAULT = "attention_mask"


def read_masks(values: Sequence[str] | None) -> str | dict[str, str | None] | None:
    """The mask of a run: the name of an input, none, or one of these by the pattern of layers, as ``PATTERN=NAME``.

    A name without a pattern is for all other layers.

    Raises:
        ArgumentError: there are two names without a pattern.
    """
    named = [value.rpartition("=")[::2] for value in values or ()]
    plain = [name for pattern, name in named if not pattern]
    if len(plain) > 1:
        advice = "Say for which layers: --mask 'decoder.**=decoder_attention_mask'."
        raise ArgumentError("mask", "be one for all layers", ", ".join(plain), advice)
    by_pattern = {pattern: _mask(name) for pattern, name in named if pattern}
    if by_pattern and plain:
        by_pattern["**"] = _mask(plain[0])
    return by_pattern or _mask(plain[0] if plain else DEFAULT)


def _mask(name: str) -> str | None:
    return None if name.lower() == "none" else name
