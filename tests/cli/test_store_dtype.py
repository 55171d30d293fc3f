"""``--store-dtype`` of ``activation-extractor extract``."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

import commands
import numpy as np
import pytest
import torch

from activation_extractor import open_store

run = partial(commands.run, "extract")
FACTORY = """
import torch
from torch import nn

def rows():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 4))
"""


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("halves.py").write_text(FACTORY)
    np.save("x.npy", np.arange(60, dtype=np.float32).reshape(20, 3))
    np.save("large.npy", np.float32([[1, 1, 1], [1, 1, 1e7]]))
    yield
    sys.modules.pop("halves", None)


OPTIONS = ("--model", "halves:rows", "--reduce", "full", "--layers", "*")


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_activations_are_stored_in_the_dtype_and_the_estimate_is_exact(dtype):
    told = run(*OPTIONS, "--input", "x.npy", "--out", "out", "--store-dtype", dtype).stderr
    run(*OPTIONS, "--input", "x.npy", "--out", "plain")
    found, plain = open_store("out"), open_store("plain")
    for key in plain:
        assert torch.equal(found[key].torch(), plain[key].torch().to(getattr(torch, dtype)))
    assert f"about {20 * 7 * getattr(torch, dtype).itemsize} B." in told


def test_a_value_that_does_not_fit_and_a_format_without_the_dtype_are_mistakes():
    text = run(*OPTIONS, "--input", "large.npy", "--out", "out", "--store-dtype", "float16", code=2).stderr
    assert "must fit float16, whose largest number is 65504" in text
    text = run(
        *OPTIONS, "--input", "x.npy", "--out", "new", "--store-dtype", "bfloat16", "--format", "npz", code=2
    ).stderr
    assert "dtype must be one that npz has, got 'bfloat16'" in text
