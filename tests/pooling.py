"""A layer's mean under a mask policy, and what it should be."""

from __future__ import annotations

import torch
from torch import nn

from activation_extractor import capture


def mean_by(model: nn.Module, layer: str, mask: object, *args: object, **kwargs: object):
    """A layer's whole activation, and its mean under a mask policy."""
    with torch.no_grad(), capture(model, layer, reduce=["full", "mean"], mask=mask) as acts:
        model(*args, **kwargs)
    (name,) = {name for name, _ in acts}
    return acts[name, "full"], acts[name, "mean"]


def assert_mean_over(mask: torch.Tensor, values: tuple[torch.Tensor, torch.Tensor]) -> None:
    whole, mean = values
    expected = torch.stack([row[real].mean(0) for row, real in zip(whole, mask.bool(), strict=True)])
    torch.testing.assert_close(mean, expected)
