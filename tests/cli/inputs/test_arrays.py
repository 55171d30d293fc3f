"""Arrays in files."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sources import read

from activation_extractor.cli.inputs import open_source
from activation_extractor.errors import ArgumentError


@pytest.mark.parametrize("dtype", ["<f4", ">f4", ">i8", "<f2", "|u1", "|b1", ">c16", "<u8"])
def test_rows_are_what_torch_takes_in_whatever_byte_order(tmp_path, dtype):
    array = np.arange(6).reshape(3, 2).astype(dtype)
    np.save(tmp_path / "x.npy", array)
    rows = read(tmp_path / "x.npy").values
    assert [torch.from_numpy(np.array(row)).tolist() for row in rows] == array.tolist()


def test_rows_are_counted_without_reading_them(tmp_path, monkeypatch):
    np.save(tmp_path / "x.npy", np.zeros((1000, 2)))
    source = open_source(str(tmp_path / "x.npy"))
    assert (source.rows, len(source.longest), source.characters, source.kind) == (1000, 2, None, "array")


@pytest.mark.parametrize(
    "array",
    [np.array(["a", "b"]), np.array([("a", 1)], dtype="U1,i4"), np.zeros(2, "M8[s]"), np.zeros(2, np.longdouble)],
)
def test_what_torch_has_not_is_one_sentence(tmp_path, array):
    np.save(tmp_path / "x.npy", array)
    with pytest.raises(ArgumentError, match=r"input must be a \.npy file of numbers that torch has, got .* Convert"):
        read(tmp_path / "x.npy")


def test_an_array_without_rows_is_an_error(tmp_path):
    np.save(tmp_path / "x.npy", np.zeros((0, 3)))
    with pytest.raises(ArgumentError, match="input must hold at least one row"):
        read(tmp_path / "x.npy")
