"""What a model keeps between decoding steps, as its calls are given it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

# Names under which models take what they keep between decoding steps.
CACHE_ARGUMENTS = frozenset(
    {"past_key_values", "past_key_value", "layer_past", "past", "cache_params", "cache", "mems"}
)


@dataclass(frozen=True)
class SeenCache:
    """Stands in for a cache that a compiled graph was given, of which no more is known.

    Attributes:
        filled: how many positions it held; None where it has no fixed size.
    """

    filled: Tensor | None


def filled(cache: Any) -> int | Tensor | None:
    """How many positions a cache of fixed size holds, of transformers; None for one that grows, and for others.

    The tensor is the cache's own, which counts in place.
    """
    if cache is None:
        return None
    if isinstance(cache, SeenCache):
        return cache.filled
    cache = getattr(cache, "self_attention_cache", cache)
    layers = getattr(cache, "layers", None)
    if layers == [] or not hasattr(layers[0] if isinstance(layers, list) else cache, "max_cache_len"):
        return None
    length: int | Tensor = cache.get_seq_length()
    return length
