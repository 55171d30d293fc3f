"""What `extract` records is stored as inference mode made it: the writer's thread is outside of that mode."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from activation_extractor import extract
from activation_extractor.runs._run import Run


class Conjugated(nn.Module):
    """What it is given, or its conjugate, which torch computes when somebody needs it."""

    def forward(self, x: Tensor) -> Tensor:
        return x.conj() if x.is_complex() else x.clone()


@pytest.mark.parametrize("order", [None, "place"])
@pytest.mark.parametrize("width", [3, 2**17])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64], ids=str)
@pytest.mark.parametrize("form", ["safetensors", "npy", "npz"])
def test_it_is_stored_whatever_its_size_dtype_and_order(
    tmp_path: Path, form: str, dtype: torch.dtype, width: int, order: str | None
) -> None:
    rows = torch.randn(4, width, dtype=torch.complex64 if dtype.is_complex else torch.float32).to(dtype)
    batches: list[Any] = [(rows[[1, 0]],), (rows[2:],)]
    if order is not None:
        batches = [{"input": rows[[1, 0]], "place": [1, 0]}, {"input": rows[2:], "place": [2, 3]}]
    model = nn.Sequential(Conjugated())
    store = extract(model, batches, "0", out=tmp_path / "out", order=order, format=form, progress=False)
    stored = store["0"].torch()
    assert not stored.is_inference()
    expected = (rows if order else rows[[1, 0, 2, 3]]).conj().resolve_conj()
    assert torch.equal(stored.to(dtype), expected)


def test_no_tensor_is_made_ordinary_on_its_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[Any] = []
    write = Run.write
    monkeypatch.setattr(Run, "write", lambda run, step: steps.append(step) or write(run, step))
    extract(nn.Sequential(nn.Linear(4, 8)), [torch.ones(3, 4)], "0", out=tmp_path / "out", progress=False)
    assert all(value.is_inference() for step in steps for value in step.values.values())
    assert len(steps) == 1
