"""What a run will take, of layers that return tensors of several kinds."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from kinds import KINDS, Returns
from torch import nn

from activation_extractor.cli._estimate import estimate
from activation_extractor.errors import TensorKindError

pytestmark = pytest.mark.filterwarnings("ignore:.*")  # of torch: most of these kinds are called experimental


class Feed:
    """Rows of three positions."""

    positions = None

    def example(self) -> dict[str, Any]:
        return {"input": torch.ones(2, 3, 4)}


@pytest.mark.parametrize("reducer", ["full", "mean"])
@pytest.mark.parametrize("kind", sorted(KINDS.keys() - {"DTensor", "on `meta`", "a class with `__torch_dispatch__`"}))
def test_the_size_of_each_kind_is_that_of_the_numbers_that_are_stored(kind, reducer):
    found = estimate(nn.Sequential(Returns(kind)), Feed(), "0", 20, reduce=[reducer], format="safetensors")
    positions = 1 if reducer == "mean" else 2.5 if "nested" in kind else 3
    assert found.nbytes == 20 * positions * 4 * (8 if kind == "complex" else 4)


def test_a_kind_that_cannot_be_stored_is_refused_before_anything_is_written():
    with pytest.raises(TensorKindError, match="has no numbers"):
        estimate(nn.Sequential(Returns("on `meta`")), Feed(), "0", 20, reduce=["full"], format="npz")
