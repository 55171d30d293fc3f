"""Models that several processes share: who takes part in a forward."""

from __future__ import annotations

import pytest
import torch
from spread_models import SPREAD, X, plain

from activation_extractor.runs._devices import is_collective, model_ranks


def test_a_plain_model_runs_alone():
    assert model_ranks(plain()) is None
    assert not is_collective(plain())


def who_runs(rank, kind):
    model = SPREAD[kind]()
    before = model_ranks(model)
    with torch.no_grad():
        model(X)
    return before, model_ranks(model), is_collective(model)  # FSDP leaves the outermost parameters whole


@pytest.mark.parametrize("kind", SPREAD)
def test_a_model_whose_forwards_wait_for_other_processes_says_so(ranks, kind):
    wanted = (None, None, False) if kind == "DDP" else ((0, 1), (0, 1), True)
    assert ranks(who_runs, kind) == [wanted, wanted]
