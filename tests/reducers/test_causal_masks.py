"""Which positions are real, from a causal mask that was made for a cache of fixed size; none is guessed at."""

from __future__ import annotations

import pytest
import torch

from activation_extractor.reducers._causal_masks import real_in_causal

REAL = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1], [1, 0, 1, 1, 0, 1, 0]]).bool()


def causal(begin, end, keys=9, window=99):
    """The mask of queries from `begin` on, as transformers makes it: ``(3, 1, queries, keys)``."""
    query, key = torch.arange(begin, end)[:, None], torch.arange(keys)[None]
    real = torch.cat([REAL, torch.ones(3, keys - 7, dtype=torch.bool)], 1)
    return ((key <= query) & (key > query - window) & real[:, None])[:, None]


@pytest.mark.parametrize(("begin", "end"), [(0, 5), (0, 7), (3, 7), (5, 6), (0, 1)])
@pytest.mark.parametrize(
    "form",
    [
        lambda mask: mask,
        lambda mask: mask.long(),
        lambda mask: torch.where(mask, 0.0, torch.finfo(torch.float32).min),
        lambda mask: torch.where(mask, 0.0, -torch.inf).bfloat16(),
        lambda mask: {"full_attention": mask, "sliding_attention": mask[..., :2]},
    ],
)
def test_the_mask_that_it_was_made_from_is_found(begin, end, form):
    assert torch.equal(real_in_causal(form(causal(begin, end)), begin), REAL[:, begin:end])


def test_what_padding_sees_is_of_no_account():
    mask = causal(0, 5)
    mask[2, 0, 4] = torch.tensor([1, 1, 1, 1, 0, 1, 1, 1, 1])
    assert torch.equal(real_in_causal(mask, 0), REAL[:, :5])


def all_seen(mask):
    """What older releases made of rows in which nothing is seen."""
    return mask | ~mask.any(-1, keepdim=True)


def itself(mask):
    """Padding that sees itself."""
    return mask | torch.eye(5, 9, dtype=torch.bool)


@pytest.mark.parametrize(
    "mask",
    [
        all_seen(causal(0, 5)),
        itself(causal(0, 5)),
        causal(0, 5, window=2),
        causal(0, 5)[..., :4],
        causal(0, 5).expand(-1, 2, -1, -1),
        causal(0, 5)[:, 0],
        torch.ones(3, 1, 5, 9),
        {"sliding_attention": causal(0, 5)},
        causal(0, 5).to("meta"),
        None,
        object(),
    ],
)
def test_of_any_other_mask_nothing_is_said(mask):
    assert real_in_causal(mask, 0) is None
