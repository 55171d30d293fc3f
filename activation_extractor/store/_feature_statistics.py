"""Statistics of each feature, for normalising, summed up while batches are handed out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class FeatureStatistics:
    """What the tokens that were handed out are like, in float64. Values that are not finite make theirs NaN.

    Attributes:
        tokens: how many there were; rows, of `Store.batches`.
        mean: of each feature, ``(features,)``; ``(keys, features)`` where several keys were asked for.
        std: the standard deviation of each feature, that of a population: divided by the number of tokens.
        mean_norm: the mean over tokens of the Euclidean norm, ``()`` or ``(keys,)``.
    """

    tokens: int
    mean: Tensor
    std: Tensor
    mean_norm: Tensor


@dataclass(frozen=True)
class RunningStatistics:
    """Sums over the batches so far; `add` makes a new object, so that each batch can travel with its own."""

    tokens: int = 0
    mean: Tensor | None = None
    squares: Tensor | None = None  # of distances from the mean
    norms: Tensor | None = None

    def add(self, batch: Tensor, first_feature_axis: int) -> RunningStatistics:
        """Take in a batch of at least one token (T. Chan, G. Golub and R. LeVeque, 1979, equations 2.1)."""
        shape, count = batch.shape[1:], len(batch)
        exact = batch.dtype == torch.float64 or not batch.is_floating_point()
        values = batch.to(torch.float64 if exact else torch.float32, copy=True).reshape(count, -1)
        by_key = values.view(count, *shape[: first_feature_axis - 1], -1)
        norms = torch.linalg.vector_norm(by_key, dim=-1).sum(dim=0, dtype=torch.float64)
        ones = torch.ones(count, dtype=values.dtype)
        about = (ones @ values) / count  # a matrix product sums columns several times faster than `sum` does
        values -= about
        rest = (ones @ values).double() / count  # what rounding left out of the mean
        mean = (about.double() + rest).view(shape)
        squares = ((ones @ values.square_()).double() - rest.square() * count).clamp_(min=0).view(shape)
        if self.mean is None or self.squares is None or self.norms is None:
            return RunningStatistics(count, mean, squares, norms)
        total, shift = self.tokens + count, mean - self.mean
        squares = self.squares + squares + shift.square() * (self.tokens * count / total)
        return RunningStatistics(total, self.mean + shift * (count / total), squares, self.norms + norms)

    def result(self) -> FeatureStatistics | None:
        """The statistics of all batches; None before the first one."""
        if self.mean is None or self.squares is None or self.norms is None:
            return None
        return FeatureStatistics(
            self.tokens, self.mean.clone(), (self.squares / self.tokens).sqrt(), self.norms / self.tokens
        )

    def to_state(self) -> dict[str, Any]:
        """The sums, for a checkpoint."""
        return {"tokens": self.tokens, "mean": self.mean, "squares": self.squares, "norms": self.norms}
