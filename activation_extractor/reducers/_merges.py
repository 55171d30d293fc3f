"""From the reduced windows of a row to what the whole row would have been reduced to."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from activation_extractor.errors import ArgumentTypeError
from activation_extractor.reducers._pooling import WeightedMean
from activation_extractor.reducers._reducers import _FEW_OPERATIONS, Reducer, first, full, last, max, mean

Merge = Callable[[Sequence[Tensor], Sequence[float]], Tensor]
"""``(parts, counts) -> tensor``: what the windows of a row were reduced to, in order, and how many positions counted in
each, which is never 0; of a weighted mean, the sum of their weights.

A part is ``(*features)``; of `full`, ``(positions, *features)``. The result is of that kind.
"""


def merge_of(name: str, reducer: Reducer) -> Merge | None:
    """How the windows of a row are merged: the reducer's own ``merge``, or that of a built-in one; else None.

    Raises:
        ArgumentTypeError: the reducer's ``merge`` is not callable.
    """
    built_in = (merge for known, merge in _MERGES if known is reducer)  # it need not be hashable
    merge = (
        _merge_means if isinstance(reducer, WeightedMean) else next(built_in, None) or getattr(reducer, "merge", None)
    )
    if merge is None or callable(merge):
        return merge
    raise ArgumentTypeError(f"merge of reducer {name!r}", "be a callable (parts, counts) -> tensor", merge)


def _merge_means(parts: Sequence[Tensor], counts: Sequence[float]) -> Tensor:
    """The mean over all positions: the means of windows by their numbers of positions, in at least float32."""
    means = torch.stack([*parts])
    dtype = means.dtype
    means = means.to(torch.promote_types(_FEW_OPERATIONS.get(dtype, dtype), torch.float32))
    weights = (torch.tensor(counts, dtype=torch.float64) / sum(counts)).to(means)
    return (means * weights.reshape(-1, *[1] * (means.dim() - 1))).sum(0).to(dtype)


def _merge_maxima(parts: Sequence[Tensor], counts: Sequence[float]) -> Tensor:
    return max(torch.stack([*parts])[None], None)[0]


def _take_first(parts: Sequence[Tensor], counts: Sequence[float]) -> Tensor:
    return parts[0]


def _take_last(parts: Sequence[Tensor], counts: Sequence[float]) -> Tensor:
    return parts[-1]


def _join(parts: Sequence[Tensor], counts: Sequence[float]) -> Tensor:
    return torch.cat([*parts])


_MERGES: list[tuple[Reducer, Merge]] = [
    (mean, _merge_means),
    (max, _merge_maxima),
    (first, _take_first),
    (last, _take_last),
    (full, _join),
]
