"""Which positions are real, from the causal mask of a generation with a cache of fixed size."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

_LEAST_BIAS = -1e3  # what is added to the scores of positions that are not seen is below
_FULL = "full_attention"  # in a dict of masks, that of the layers that see all earlier positions


def real_in_causal(mask: Any, begins_at: int) -> Tensor | None:
    """The mask ``(batch, queries)`` from which a causal one was made; None where it was not made that way.

    Each real position sees itself and the real ones before it, and nobody sees the others. What positions see that are
    not real is of no account.

    Args:
        mask: ``(batch, 1, queries, keys)``, bool, or what is added to attention scores; a dict may hold several.
        begins_at: the key of the first query.
    """
    mask = mask.get(_FULL) if isinstance(mask, Mapping) else mask
    if not isinstance(mask, Tensor) or mask.dim() != 4 or mask.shape[1] != 1 or mask.is_meta:
        return None
    queries = mask.shape[2]
    seen = mask[:, 0, :, begins_at : begins_at + queries]
    if seen.shape[2] != queries:
        return None
    seen = seen > _LEAST_BIAS if seen.is_floating_point() else seen != 0
    real = seen.diagonal(dim1=1, dim2=2)
    is_causal = (seen == real[:, None].expand_as(seen).tril()) | ~real[:, :, None]
    return real if bool(is_causal.all()) else None
