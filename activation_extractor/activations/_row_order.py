"""Whether the rows of one forward go on in the next, as joining their values needs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from activation_extractor.reducers._calls import CallArguments


class RowOrder:
    """Compares the cache that a forward is given with what the forward before it left there.

    Beam search reorders the rows of the cache between forwards, so that row 0 of the next forward may go on from
    another row. It makes new tensors of them: as long as a tensor is the same one, nothing is compared.
    """

    def __init__(self) -> None:
        self._left: Tensor | None = None

    def is_kept(self, call: CallArguments) -> bool:
        """Whether the rows of the cache in a call that begins are those that the last forward left there."""
        left, given = self._left, _keys(call.cache)
        if left is None or given is None or given is left or given.dim() < 3:
            return True
        length = min(left.shape[-2], given.shape[-2])  # a cache may be cropped; (batch, heads, seq, features)
        before, now = left[..., :length, :], given[..., :length, :]
        return before.shape == now.shape and torch.equal(before, now.to(before.device))

    def end(self, call: CallArguments) -> None:
        """The forward has ended."""
        self._left = _keys(call.cache)


def _keys(cache: Any) -> Tensor | None:
    """The keys of the first layer in a cache of attention, of whatever make; None where there are none."""
    cache = getattr(cache, "self_attention_cache", cache)
    for attribute in ("layers", "key_cache"):
        cache = getattr(cache, attribute, cache)
    if isinstance(cache, tuple | list):
        found = (_keys(getattr(member, "keys", member)) for member in cache if not isinstance(member, dict))
        return next((keys for keys in found if keys is not None), None)
    return cache if isinstance(cache, Tensor) else None
