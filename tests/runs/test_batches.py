"""What a batch may be: pairs of a loader, what is no batch, and what the model does not take."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from activation_extractor import extract
from activation_extractor.errors import ArgumentError, ArgumentTypeError, OtherRunError

X, LABELS = torch.randn(10, 4, generator=torch.Generator().manual_seed(0)), torch.arange(10)
PAIRS = DataLoader(TensorDataset(X, LABELS), batch_size=4)


@pytest.fixture
def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3))


def run(model: nn.Module, batches: Any, out: Path, **options: Any) -> Any:
    return extract(model, batches, "0", out=out, progress=False, **options)


def test_a_position_of_a_tuple_is_kept_and_left_out_of_the_call(model, tmp_path):
    for _ in range(2):
        store = run(model, PAIRS, tmp_path, keep=1)
    assert torch.allclose(store["0"].torch(), model(X))
    assert store.keep["1"][:].tolist() == LABELS.tolist()
    assert store.fingerprint["keep"] == [1]
    with pytest.raises(OtherRunError, match="keep"):
        run(model, [(x,) for x in X.split(4)], tmp_path)


@pytest.mark.parametrize("form", [tuple, list])
def test_ids_and_kept_columns_may_stand_anywhere_in_a_tuple(model, tmp_path, form):
    batches = [form(([*"abc"], X[:3], LABELS[:3], ["x", "y", "z"])), form(([*"de"], X[3:5], LABELS[3:5], ["u", "v"]))]
    store = run(model, batches, tmp_path, ids=0, keep=[3, 2])
    assert store.ids == [*"abcde"]
    assert store.keep["2"][:].tolist() == [0, 1, 2, 3, 4]
    assert store.keep["3"][:] == ["x", "y", "z", "u", "v"]
    assert torch.allclose(store["0"].torch(), model(X[:5]))
    assert run(model, batches, tmp_path, ids=0, keep=[2, 3]).rows == 5
    with pytest.raises(OtherRunError, match=r"ids \(3 in place of 0\)"):
        run(model, batches, tmp_path, ids=3, keep=[2, 0])


def test_a_key_that_is_an_integer_may_be_taken_out_of_a_mapping_too(model, tmp_path):
    assert run(model, [{"input": X, 0: list(range(10))}], tmp_path, ids=0).ids == list(range(10))


NO_BATCHES = {
    "tensor": (X, r"a Tensor of shape \(10, 4\), whose rows would be .*\. Cut it into batches: x\.split\(32\)"),
    "array": (X.numpy(), r"a ndarray of shape \(10, 4\), .* batches: torch\.from_numpy\(x\)\.split\(32\)"),
    "one_batch": ({"input": X}, r"'a dict'\. Put a single batch into a list: \[batch\]"),
    "text": ("data.csv", "'a str'"),
    "data_set": (TensorDataset(X), "'TensorDataset'. Wrap a data set in a DataLoader, or call what makes batches"),
    "number": (3, "'int'"),
}


@pytest.mark.parametrize(("batches", "text"), NO_BATCHES.values(), ids=NO_BATCHES)
def test_what_is_no_iterable_of_batches_is_an_error_at_the_door(model, tmp_path, batches, text):
    with pytest.raises(ArgumentTypeError, match=f"batches must be an iterable of batches, got .*{text}"):
        run(model, batches, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("batches", [X.split(4), [X], list(X.view(2, 5, 4)), (X[:5], X[5:]), iter(X.split(3))])
def test_the_advice_and_its_neighbours_give_all_rows(model, tmp_path, batches):
    assert torch.allclose(run(model, batches, tmp_path)["0"].torch(), model(X))


class Two(nn.Linear):
    def forward(self, x: torch.Tensor, scale: float = 1.0, *, shift: float = 0.0) -> torch.Tensor:
        return super().forward(x) * scale + shift


MISFITS = {
    "pairs": (nn.Linear(4, 3), PAIRS, r"Linear\.forward takes \('input'\), got 'a tuple of 2'\. Too many positional"),
    "label": (
        nn.Linear(4, 3),
        [{"input": X, "Label": 1}],
        r"got \['input', 'Label'\]\. Got an unexpected keyword argum",
    ),
    "other_name": (Two(4, 3), [{"X": X}], r"\('x', 'scale', 'shift'\), got \['X'\]\. Missing a required argument: 'x'"),
    "three": (Two(4, 3), [(X, 1.0, 2.0)], r"got 'a tuple of 3'\. .* keep=1 stores the label of pairs \(x, label\)"),
}


@pytest.mark.parametrize(("model", "batches", "text"), MISFITS.values(), ids=MISFITS)
def test_a_batch_that_the_model_does_not_take_is_an_error_that_says_what_it_takes(tmp_path, model, batches, text):
    with pytest.raises(ArgumentError, match=r"a batch must hold what .*" + text):
        extract(model, batches, "", out=tmp_path / "out", progress=False)
    assert list(tmp_path.iterdir()) == []


def test_a_type_error_inside_of_the_model_is_left_as_it_is(tmp_path):
    model = Two(4, 3)
    with pytest.raises(TypeError, match="converted to an index|multiply"):
        extract(model, [(X, [[None]])], "", out=tmp_path / "out", progress=False)


def test_arrays_in_a_tuple_may_be_kept(model, tmp_path):
    batches = [(X, np.arange(10)), (X + 1, np.arange(10, 20))]
    assert run(model, batches, tmp_path, keep=[1]).keep["1"].shape == (20,)
