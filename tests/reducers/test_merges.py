"""Reduced windows of a row, merged, against the reduced row."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from activation_extractor.errors import ArgumentTypeError
from activation_extractor.reducers import first, full, last, max, mean, position
from activation_extractor.reducers._merges import merge_of

TOLERANCE = {torch.float16: 2e-3, torch.bfloat16: 2e-2, torch.float32: 1e-6, torch.float64: 1e-12}
DTYPES = [*TOLERANCE, torch.int64, torch.bool, torch.uint16, torch.uint64, torch.float8_e4m3fn, torch.complex64]


def random_row(dtype: torch.dtype, positions: int) -> torch.Tensor:
    values = 4 * torch.randn(positions, 3, 2, dtype=torch.float64)
    return (values > 0 if dtype == torch.bool else values.abs() if dtype.is_signed is False else values).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reducer", [mean, max, first, last], ids=lambda reducer: reducer.__name__)
@settings(max_examples=20, deadline=None)
@given(counts=st.lists(st.integers(1, 9), min_size=1, max_size=6))
def test_merged_windows_are_the_reduced_row(reducer, dtype, counts):
    if reducer is max and dtype.is_complex:
        return
    row = random_row(dtype, sum(counts))
    parts = [reducer(window[None], None)[0] for window in row.split(counts)]
    merged, whole = merge_of("", reducer)(parts, counts), reducer(row[None], None)[0]
    assert (merged.dtype, merged.shape) == (whole.dtype, whole.shape)
    if reducer is not mean:
        assert torch.equal(merged.view(torch.uint8), whole.view(torch.uint8))
    else:
        tolerance = TOLERANCE.get(merged.dtype, 1e-6 if dtype != torch.float8_e4m3fn else 0.15)
        wide = (lambda it: it.to(torch.complex128)) if dtype.is_complex else torch.Tensor.double
        torch.testing.assert_close(wide(merged), wide(whole), rtol=tolerance, atol=tolerance)


def test_merged_whole_windows_are_the_row():
    row = random_row(torch.float32, 9)
    assert torch.equal(merge_of("", full)(row.split([4, 2, 3]), [4, 2, 3]), row)


def test_a_mean_of_large_numbers_does_not_overflow_on_the_way():
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        parts = [torch.full((2,), torch.finfo(dtype).max, dtype=dtype)] * 2
        assert merge_of("", mean)(parts, [400, 300]).isfinite().all()


def test_a_nan_in_a_window_is_one_in_the_row_and_infinity_stays_infinity():
    parts = [torch.tensor([1.0, 1.0]), torch.tensor([math.nan, math.inf])]
    for reducer in (mean, max):
        merged = merge_of("", reducer)(parts, [3, 1])
        assert merged[0].isnan()
        assert merged[1] == math.inf


def test_a_position_and_a_reducer_of_ones_own_have_no_merge_unless_it_brings_one():
    def norm(activation, mask):
        return activation.norm(dim=(1, 2))

    assert merge_of("norm", norm) is None
    assert merge_of("position(1)", position(1)) is None
    norm.merge = lambda parts, counts: torch.stack(parts).norm(dim=0)
    row = random_row(torch.float32, 9)[..., 0]
    parts = [norm(window[None], None)[0] for window in row.split([4, 5])]
    torch.testing.assert_close(merge_of("norm", norm)(parts, [4, 5]), norm(row[None], None)[0])
    norm.merge = "mean"
    with pytest.raises(
        ArgumentTypeError, match=r"merge of reducer 'norm' must be a callable \(parts, counts\) -> tens"
    ):
        merge_of("norm", norm)


def test_a_reducer_may_be_an_object_that_cannot_be_hashed():
    class Norm:
        __hash__ = None

        def __call__(self, activation, mask):
            return activation.norm(dim=1)

        def merge(self, parts, counts):
            return torch.stack(parts).norm(dim=0)

    assert merge_of("norm", norm := Norm())([torch.tensor(3.0), torch.tensor(4.0)], [1, 1]) == 5.0
    assert callable(norm)
