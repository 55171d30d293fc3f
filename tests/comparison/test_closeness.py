"""How close values are, against what numpy and torch say in float64."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from activation_extractor.comparison._closeness import Closeness
from activation_extractor.comparison._tolerances import Tolerance, default_rtol

NAN, INF = math.nan, math.inf
FLOAT8 = [torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz]
REAL = [torch.float64, torch.float32, torch.float16, torch.bfloat16, *FLOAT8]
INTEGERS = [getattr(torch, f"{kind}{bits}") for kind in ("int", "uint") for bits in (8, 16, 32, 64)]
ordinary = st.floats(-1e6, 1e6)
special = st.sampled_from([0.0, -0.0, NAN, INF, -INF, 1.0])
TWO = hnp.arrays(np.float64, st.tuples(st.just(2), st.integers(0, 40)), elements=ordinary | special)
EIGHTHS = hnp.arrays(np.int64, st.tuples(st.just(2), st.integers(1, 20)), elements=st.integers(-64, 64))


def closeness(reference, values, rtol=0.0, atol=None, dtype=None) -> Closeness:
    found = Closeness(Tolerance(rtol, atol))
    found.add(torch.as_tensor(reference, dtype=dtype), torch.as_tensor(values, dtype=dtype))
    return found


def doubles(reference, values, rtol=0.0, atol=None) -> Closeness:
    return closeness(reference, values, rtol, atol, torch.float64)


@settings(deadline=None)
@given(TWO, st.sampled_from([0.0, 1e-9, 1e-3, 0.5]))
def test_the_numbers_are_those_of_numpy(both, rtol):
    found = doubles(*both, rtol)
    finite = np.isfinite(both).all(axis=0)
    one, other = both[:, finite]
    far, scale = np.abs(other - one), math.sqrt(np.mean(one**2)) if len(one) else 0.0
    assert found.max_abs == far.max(initial=0.0)
    with np.errstate(over="ignore"):
        relative = far[one != 0] / np.abs(one[one != 0])
    assert found.max_rel == pytest.approx(relative.max(initial=0.0))
    assert (found.rtol, found.atol) == (rtol, pytest.approx(rtol * scale))
    lengths = np.linalg.norm(one) * np.linalg.norm(other)
    if lengths > 1e-100:
        assert found.cosine == pytest.approx(one @ other / lengths, abs=1e-12)
    nans = np.isnan(both)
    assert found.nan_count == (nans[0] ^ nans[1]).sum()
    is_apart = np.isinf(both).any(axis=0) & (both[0] != both[1]) & ~nans.any(axis=0)
    assert found.inf_count == is_apart.sum()


@settings(deadline=None)
@given(TWO, st.lists(st.integers(0, 40), max_size=9))
def test_pieces_of_any_size_add_up_to_the_whole(both, cuts):
    whole = doubles(*both, 1e-3)
    pieces = Closeness(Tolerance(1e-3))
    for part in np.split(both, sorted(min(cut, both.shape[1]) for cut in cuts), axis=1):
        pieces.add(*torch.from_numpy(part.copy()))
    counted = ["max_abs", "max_rel", "nan_count", "inf_count", "rtol"]
    assert [getattr(pieces, one) for one in counted] == [getattr(whole, one) for one in counted]
    assert pieces.atol == pytest.approx(whole.atol, rel=1e-12)
    assert pieces.cosine == pytest.approx(whole.cosine, abs=1e-9, nan_ok=True)
    assert pieces.is_close == whole.is_close


@settings(deadline=None)
@given(TWO, st.sampled_from([0.0, 1e-6, 0.1, 1.0]), st.sampled_from([0.0, 1e-9, 0.25, 100.0]))
def test_given_tolerances_mean_what_they_mean_to_torch(both, rtol, atol):
    one, other = torch.from_numpy(both)
    bound, far = atol + rtol * one.abs(), (other - one).abs()
    finite = one.isfinite() & other.isfinite()
    assume(not torch.isclose(far, bound, rtol=1e-12, atol=1e-12)[finite & (far > 0)].any())  # rounding decides there
    found = doubles(*both, rtol, atol)
    assert (found.is_close and found.nan_count + found.inf_count == 0) == _is_close_to_torch(one, other, rtol, atol)


def _is_close_to_torch(one, other, rtol, atol) -> bool:
    try:
        torch.testing.assert_close(other, one, rtol=rtol, atol=atol, equal_nan=True)
    except AssertionError:
        return False
    return True


@settings(deadline=None)
@given(EIGHTHS, st.sampled_from([0.0, 0.25, 0.5, 1.0]), st.sampled_from([0.0, 0.125, 1.0, 4.0]))
def test_a_value_exactly_at_the_tolerance_is_within_it(eighths, rtol, atol):
    one, other = ([Fraction(int(value), 8) for value in side] for side in eighths)
    found = doubles(*(eighths / 8), rtol, atol)
    pairs = zip(one, other, strict=True)
    assert found.is_close == all(abs(b - a) <= Fraction(atol) + Fraction(rtol) * abs(a) for a, b in pairs)


def test_the_smallest_step_beyond_the_tolerance_is_a_difference():
    assert doubles([0.0], [0.5], atol=0.5).is_close
    assert not doubles([0.0], [math.nextafter(0.5, 1)], atol=0.5).is_close
    assert not doubles([1.0], [math.nextafter(1, 2)]).is_close


def test_the_reference_is_the_left_side():
    assert doubles([2.0], [1.0], rtol=0.5, atol=0.0).is_close
    assert not doubles([1.0], [2.0], rtol=0.5, atol=0.0).is_close


def test_the_default_atol_is_the_scale_of_the_reference_over_all_pieces():
    found = Closeness(Tolerance(0.1))
    found.add(torch.zeros(3), torch.zeros(3))
    found.add(torch.full((1,), 4.0), torch.full((1,), 4.0))
    assert found.atol == pytest.approx(0.1 * 2)
    found.add(torch.zeros(4), torch.tensor([0, 0, 0, 0.14]))
    assert found.is_close
    found.add(torch.zeros(1), torch.full((1,), 0.15))
    assert not found.is_close


@pytest.mark.parametrize(
    ("one", "other", "nans", "infinities"),
    [
        (NAN, NAN, 0, 0),
        (INF, INF, 0, 0),
        (-INF, -INF, 0, 0),
        (NAN, 1.0, 1, 0),
        (1.0, NAN, 1, 0),
        (NAN, INF, 1, 0),
        (-INF, NAN, 1, 0),
        (INF, -INF, 0, 1),
        (INF, 1.0, 0, 1),
        (0.0, -INF, 0, 1),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_nan_and_infinity_are_counted_and_left_out_of_the_numbers(one, other, nans, infinities, dtype):
    found = closeness([2.0, one, 0.0], [3.0, other, 0.0], 0.5, dtype=dtype)
    assert (found.nan_count, found.inf_count) == (nans, infinities)
    assert (found.max_abs, found.max_rel, found.cosine) == (1.0, 0.5, 1.0)
    assert found.atol == pytest.approx(0.5 * math.sqrt(2))
    assert found.is_close


def test_what_is_not_finite_hides_no_difference_beside_it():
    found = doubles([NAN, INF, 1.0, NAN], [NAN, INF, 2.0, NAN], 1e-3)
    assert (found.nan_count, found.inf_count, found.is_close) == (0, 0, False)


def test_only_nans_leave_nothing_to_measure():
    found = doubles([NAN, NAN], [NAN, INF], 1e-3)
    assert (found.max_abs, found.max_rel, found.atol, found.is_close) == (0.0, 0.0, 0.0, True)
    assert math.isnan(found.cosine)


@pytest.mark.parametrize(
    ("one", "other", "dtype"),
    [
        (2**53, 2**53 + 1, torch.int64),
        (-(2**62), 1 - 2**62, torch.int64),
        (2**63 - 2, 2**63 - 1, torch.int64),
        (-(2**63), 2**63 - 1, torch.int64),
        (2**64 - 2, 2**64 - 1, torch.uint64),
        (0, 2**64 - 1, torch.uint64),
        (2**32 - 1, 0, torch.uint32),
        (127, -128, torch.int8),
        (0, 255, torch.uint8),
        (False, True, torch.bool),
    ],
)
def test_integers_are_told_apart_however_large(one, other, dtype):
    for left, right in [(one, other), (other, one)]:
        found = closeness([left], [right], dtype=dtype)
        assert not found.is_close
        assert found.max_abs == pytest.approx(abs(int(one) - int(other)))
        assert closeness([left], [left], dtype=dtype).is_close


@pytest.mark.parametrize(("one", "dtype"), [(-(2**63), torch.int64), (2**63, torch.uint64)])
def test_integers_that_are_half_the_range_apart_differ(one, dtype):
    assert not closeness([one], [0], dtype=dtype).is_close


def test_the_distance_of_large_integers_is_exact():
    found = closeness([2**60], [2**60 + 3], atol=2)
    assert (found.max_abs, found.is_close) == (3.0, False)


@pytest.mark.parametrize("dtype", [*REAL, *INTEGERS, torch.complex64, torch.complex128])
def test_every_dtype_is_compared_in_float64(dtype):
    one, other = torch.tensor([1, 2, 4, 0]).to(dtype), torch.tensor([1, 2, 8, 0]).to(dtype)
    found = closeness(one, other)
    assert (found.max_abs, found.max_rel, found.is_close) == (4.0, 1.0, False)
    assert found.cosine == pytest.approx(37 / math.sqrt(21 * 69))
    assert closeness(one, one.clone()).is_close


@pytest.mark.parametrize("dtype", REAL)
def test_another_dtype_of_the_same_numbers_is_close(dtype):
    one = torch.tensor([0, 0.5, -1, 2])
    found = closeness(one, one.to(dtype))
    assert (found.max_abs, found.is_close) == (0.0, True)


def test_a_complex_number_is_its_two_parts():
    found = closeness(torch.tensor([3 + 4j, 1j]), torch.tensor([3 + 5j, 2j]))
    assert (found.max_abs, found.max_rel) == (1.0, 1.0)
    assert found.cosine == pytest.approx((9 + 20 + 2) / math.sqrt(26 * 38))


def test_zeros_have_no_angle_and_no_relative_difference():
    found = doubles([0.0, 0.0], [0.0, 2.0], 1e-3)
    assert (found.max_abs, found.max_rel, found.atol, found.is_close) == (2.0, 0.0, 0.0, False)
    assert math.isnan(found.cosine)
    assert doubles([0.0], [-0.0]).is_close


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64, torch.bool, torch.complex64])
def test_nothing_is_close_to_nothing(dtype):
    for found in (Closeness(Tolerance(0.0)), closeness([], [], dtype=dtype)):
        assert (found.max_abs, found.max_rel, found.nan_count, found.inf_count) == (0.0, 0.0, 0, 0)
        assert (found.atol, found.is_close) == (0.0, True)
        assert math.isnan(found.cosine)


def test_values_whose_squares_overflow_are_compared_all_the_same():
    for other in (-1e200, 1e199, 0.0):
        found = doubles([1e200, 1.0], [other, 1.0], 1e-3)
        assert (found.max_abs, found.is_close) == (1e200 - other, False)
        assert (found.atol, found.nan_count, found.inf_count) == (0.0, 0, 0)
    assert doubles([1e200, 1.0], [1.0001e200, 1.0], 1e-3).is_close
    assert not doubles([1e200, 1.0], [1e200, 2.0], 1e-3).is_close
    assert doubles([1e308], [-1e308], 0.5).max_abs == INF
    assert not doubles([1e308], [-1e308], 0.5).is_close


def test_a_cosine_is_never_beyond_one():
    values = torch.full((2,), 3 / 7, dtype=torch.float64)  # rounding makes it more than 1
    assert closeness(values, values * 3).cosine == 1.0
    assert closeness(values, values * -3).cosine == -1.0
    assert closeness(values, values * 3).cosine == pytest.approx(1.0)


def test_sides_of_different_size_are_an_error():
    with pytest.raises((ValueError, RuntimeError)):
        closeness(torch.ones(3), torch.ones(4))


def test_the_coarser_dtype_sets_the_default():
    steps = [torch.int64, torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn]
    found = [default_rtol(dtype) for dtype in steps]
    assert found == [0.0, 1e-9, 1e-4, 2**-5, 2**-2, 2**-1]
    for index, finer in enumerate(steps):
        for coarser in steps[index:]:
            assert default_rtol(finer, coarser) == default_rtol(coarser, finer) == default_rtol(coarser)


def test_dtypes_without_rounding_have_no_tolerance_and_complex_ones_that_of_their_parts():
    assert {default_rtol(dtype) for dtype in (*INTEGERS, torch.bool)} == {0.0}
    assert default_rtol(torch.complex128) == default_rtol(torch.float64)
    assert default_rtol(torch.complex64) == default_rtol(torch.float32)
    assert {default_rtol(dtype) for dtype in FLOAT8} == {0.5}


def test_the_default_passes_what_rounding_to_a_dtype_does_and_no_more():
    values = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    for dtype in (torch.float16, torch.bfloat16, torch.float8_e4m3fn):
        rounded = values.to(dtype).float()
        assert closeness(values, rounded, default_rtol(torch.float32, dtype)).is_close
        assert not closeness(values, rounded, default_rtol(torch.float32)).is_close


@pytest.mark.parametrize(("one", "other", "rtol", "atol"), [(10.0, 13.0, 0.3, 0.0), (1.0, 1.3, 0.1, 0.2)])
def test_at_the_tolerance_rounding_decides_as_it_does_for_numpy(one, other, rtol, atol):
    assert np.isclose(other, one, rtol=rtol, atol=atol)
    assert doubles([one], [other], rtol, atol).is_close
