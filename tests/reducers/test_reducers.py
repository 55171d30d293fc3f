"""Reducers, against plain loops over rows and positions."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from activation_extractor import reducers
from activation_extractor.errors import (
    ArgumentError,
    ArgumentTypeError,
    DuplicateLayerError,
    PositionError,
    TensorKindError,
)
from activation_extractor.reducers import first, full, last, max, mean, position
from activation_extractor.reducers._reducers import canonical_name, owns_result, resolve_reducers

FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
DTYPES = [*FLOATS, torch.int64, torch.bool]
REDUCERS = [mean, first, last, max, position(0), position(-1)]
TOLERANCE = {torch.float16: 1e-3, torch.bfloat16: 8e-3, torch.float32: 1e-6, torch.float64: 1e-12}


def by_loop(reducer: object, activation: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """What a reducer has to return, one row after the other, in float64 where it sums."""
    rows = []
    for row, real in zip(activation, mask.tolist(), strict=True):
        kept = [row[index] for index, is_real in enumerate(real) if is_real]
        if reducer is mean:
            rows.append(sum(one.double() for one in kept) / len(kept))
        elif reducer is max:
            greatest = kept[0]
            for one in kept[1:]:
                greatest = torch.maximum(greatest, one)
            rows.append(greatest)
        else:
            rows.append(kept[int(reducer.__name__[9:-1])] if reducer.__name__.startswith("position") else None)
            rows[-1] = {first: kept[0], last: kept[-1]}.get(reducer, rows[-1])
    return torch.stack(rows)


def check(result: torch.Tensor, expected: torch.Tensor, reducer: object, dtype: torch.dtype) -> None:
    if reducer is not mean:
        assert result.dtype == dtype
        assert torch.equal(result, expected)
        return
    assert result.dtype == (dtype if dtype.is_floating_point else torch.float32)
    tolerance = TOLERANCE[result.dtype]
    torch.testing.assert_close(result.double(), expected, rtol=tolerance, atol=tolerance)


def random_activation(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> torch.Tensor:
    values = 4 * torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return values > 0 if dtype == torch.bool else values.to(dtype)


def poison(dtype: torch.dtype) -> list[float]:
    if dtype.is_floating_point:
        return [math.nan, math.inf, -math.inf, torch.finfo(dtype).max]
    return [1, 0] if dtype == torch.bool else [2**60, -(2**60)]


@st.composite
def masks(draw) -> torch.Tensor:
    """``(batch, seq)`` with a real position in every row: padded right, left, both, with holes, or not at all."""
    batch, seq = draw(st.integers(1, 4)), draw(st.integers(1, 6))
    rows = []
    for _ in range(batch):
        begin = draw(st.integers(0, seq - 1))
        end = draw(st.integers(begin + 1, seq))
        real = [begin <= index < end for index in range(seq)]
        for index in range(begin + 1, end):
            real[index] = draw(st.booleans()) or draw(st.booleans())
        rows.append(real)
    return torch.tensor(rows)


CASES = {
    "reducer": st.sampled_from(REDUCERS),
    "dtype": st.sampled_from(DTYPES),
    "features": st.sampled_from([(), (3,), (2, 3)]),
    "seed": st.integers(0, 1000),
}


@settings(deadline=None, max_examples=60)
@given(mask=masks(), data=st.data(), **CASES)
def test_only_real_positions_count_whatever_stands_in_the_others(mask, data, reducer, dtype, features, seed):
    clean = random_activation((*mask.shape, *features), dtype, seed)
    padded = clean.clone()
    padded[~mask] = torch.tensor(data.draw(st.sampled_from(poison(dtype))), dtype=dtype)
    result = reducer(padded, mask)
    assert result.shape == (len(mask), *features)
    check(result, by_loop(reducer, clean, mask), reducer, dtype)
    assert torch.equal(result, reducer(clean, mask))


@settings(deadline=None, max_examples=60)
@given(batch=st.integers(1, 4), seq=st.integers(1, 6), **CASES)
def test_without_a_mask_every_position_is_real(batch, seq, reducer, dtype, features, seed):
    activation = random_activation((batch, seq, *features), dtype, seed)
    result = reducer(activation, None)
    check(result, by_loop(reducer, activation, torch.ones(batch, seq, dtype=torch.bool)), reducer, dtype)


@settings(deadline=None, max_examples=60)
@given(mask=masks(), k=st.integers(-7, 6))
def test_a_position_is_counted_among_the_real_ones_or_an_error(mask, k):
    activation = random_activation((*mask.shape, 2), torch.float32, 0)
    short = [row for row, real in enumerate(mask.sum(1).tolist()) if not -real <= k < real]
    if not short:
        assert torch.equal(position(k)(activation, mask), by_loop(position(k), activation, mask))
        return
    with pytest.raises(PositionError) as caught:
        position(k)(activation, mask)
    assert caught.value.row == short[0]


@pytest.mark.parametrize("reducer", REDUCERS)
@pytest.mark.parametrize("mask", [None, torch.tensor([[True]]), torch.tensor([[True, False, False]])])
def test_a_result_owns_its_memory(reducer, mask):
    activation = torch.ones(1, 1 if mask is None else mask.shape[1], 4)
    result = reducer(activation, mask)
    assert result.untyped_storage().data_ptr() != activation.untyped_storage().data_ptr()
    assert result.untyped_storage().nbytes() == 16
    assert owns_result(reducer)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
def test_rows_without_a_position_have_no_mean(dtype):
    with pytest.raises(TensorKindError, match="got rows without a position. Leave empty rows out of the batch"):
        mean(torch.zeros(2, 0, 3, dtype=dtype), None)
    assert mean(torch.zeros(0, 5, 3), None).shape == mean(torch.zeros(0, 0, 3), None).shape == (0, 3)


@pytest.mark.parametrize("mask", [None, torch.ones(1, 4, dtype=torch.bool)])
def test_a_mean_is_summed_in_float32_at_least(mask):
    for dtype, value in ((torch.float16, 60000), (torch.bfloat16, 3e38)):
        sums_over = torch.full((1, 4, 1), value, dtype=dtype) / (1 if dtype == torch.float16 else 4)
        assert torch.equal(mean(sums_over, mask), sums_over[:, 0])
    big = torch.full((1, 4, 1), 1e300, dtype=torch.float64)
    assert torch.equal(mean(big, mask), big[:, 0])


@pytest.mark.parametrize("mask", [None, torch.tensor([[True, True, False]])])
def test_a_mean_of_complex_numbers_is_complex(mask):
    activation = torch.tensor([[[1 + 1j], [3 - 1j], [2 + 0j]]])
    assert torch.equal(mean(activation, mask), torch.tensor([[2 + 0j]]))


@pytest.mark.parametrize("reducer", REDUCERS)
def test_no_gradient_reaches_a_padded_position(reducer):
    activation = torch.tensor([[[1.0], [2.0], [math.nan]]], requires_grad=True)
    reducer(activation, torch.tensor([[True, True, False]])).sum().backward()
    assert activation.grad[0, 2] == 0
    assert activation.grad.sum() == 1


@pytest.mark.parametrize("reducer", [mean, max, first])
@pytest.mark.parametrize("mask", [None, torch.tensor([[True, True]])])
def test_a_nan_at_a_real_position_shows(reducer, mask):
    assert reducer(torch.tensor([[[math.nan], [1.0]]]), mask).isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_greatest_may_be_the_least_that_there_is(dtype):
    least = False if dtype == torch.bool else -math.inf if dtype.is_floating_point else torch.iinfo(dtype).min
    activation = torch.tensor([[[least], [1]]], dtype=dtype)
    assert max(activation, torch.tensor([[True, False]])).item() == least


def test_full_is_the_activation_itself():
    activation = torch.ones(1, 2, 3)
    assert full(activation, None) is activation
    assert full(activation, torch.tensor([[True, False]])) is activation
    assert owns_result(full)


# -- positions --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("k", "row", "real"), [(2, 1, 2), (-3, 1, 2), (5, 0, 3)])
def test_a_row_that_is_too_short_is_named_and_the_advice_works(k, row, real):
    activation = torch.arange(6.0).reshape(2, 3, 1)
    mask = torch.tensor([[True, True, True], [False, True, True]])
    with pytest.raises(PositionError) as caught:
        position(k)(activation, mask)
    assert str(caught.value) == (
        f"Row {row} has {real} real positions, too few for position({k}). "
        "Leave short rows out, or use 'first' or 'last'."
    )
    assert first(activation, mask).flatten().tolist() == [0, 4]
    assert last(activation, mask).flatten().tolist() == [2, 5]


@pytest.mark.parametrize("k", ["1", 1.0, True, None])
def test_a_position_is_an_integer(k):
    with pytest.raises(ArgumentTypeError) as caught:
        position(k)
    assert str(caught.value) == f"k of position(k) must be an integer, got {k!r}."


def test_a_position_is_named_after_itself():
    assert list(resolve_reducers([position(1), position(-2)])) == ["position(1)", "position(-2)"]


# -- what reduce= means -----------------------------------------------------------------------------------------------


def median(activation, mask):
    return activation.median(1).values


class Scaled:
    """A reducer with a state."""

    def __call__(self, activation, mask):
        return activation.sum(1)


@pytest.mark.parametrize(
    ("reduce", "expected"),
    [
        ("mean", {"mean": mean}),
        ("FT", {"first": first}),
        ("LT", {"last": last}),
        (median, {"median": median}),
        (["mean", "LT", median], {"mean": mean, "last": last, "median": median}),
        ((name for name in ("max", "full")), {"max": max, "full": full}),
        ({"mine": "mean", "FT": "FT", "its": median}, {"mine": mean, "FT": first, "its": median}),
    ],
)
def test_reducers_have_names(reduce, expected):
    assert resolve_reducers(reduce) == expected
    assert list(resolve_reducers(list(expected.values()))) == [reducer.__name__ for reducer in expected.values()]


def test_a_callable_object_is_named_after_its_class():
    assert list(resolve_reducers(Scaled())) == ["Scaled"]


def test_only_what_is_built_in_is_known_to_own_its_result():
    assert not owns_result(median)
    assert not owns_result(Scaled())


def test_aliases_have_one_name():
    assert [canonical_name(name) for name in ("FT", "LT", "mean", 3)] == ["first", "last", "mean", 3]


@pytest.mark.parametrize(("reduce", "name"), [(["mean", mean], "mean"), (["first", "FT"], "first")])
def test_two_reducers_of_one_name_are_an_error_and_the_advice_works(reduce, name):
    with pytest.raises(DuplicateLayerError) as caught:
        resolve_reducers(reduce)
    assert str(caught.value) == (
        f"A recorded name must stand for one thing, got {name!r} for two reducers. "
        "Leave one of them out, or name them: reduce={'name': reducer}."
    )
    assert list(resolve_reducers({"one": reduce[0], "two": reduce[1]})) == ["one", "two"]


def test_an_unknown_reducer_is_an_error_and_its_names_work():
    with pytest.raises(ArgumentError) as caught:
        resolve_reducers("mode")
    names = ["full", "mean", "first", "last", "max"]
    assert str(caught.value) == (
        f"reduce must be one of {', '.join(names)}, FT, LT or a callable, got 'mode'. "
        "For one position use reducers.position(k)."
    )
    assert list(resolve_reducers(names)) == names
    assert reducers.position is position


@pytest.mark.parametrize("reduce", [[], pytest.param({})])
def test_no_reducer_at_all_is_an_error(reduce):
    with pytest.raises(ArgumentError) as caught:
        resolve_reducers(reduce)
    assert str(caught.value) == (
        f"reduce must name at least one reducer, got {reduce}. Built in: full, mean, first, last, max."
    )


@pytest.mark.parametrize("reduce", [3, [None], {"mine": 3}])
def test_what_is_no_reducer_is_an_error(reduce):
    with pytest.raises(ArgumentTypeError, match=r"^reduce must be a name, a callable .+ or several, got .+\.$"):
        resolve_reducers(reduce)


@pytest.mark.parametrize("name", ["", 3])
def test_a_new_name_is_a_string(name):
    with pytest.raises(ArgumentTypeError) as caught:
        resolve_reducers({name: "mean"})
    assert str(caught.value) == f"a name in reduce must be a string that is not empty, got {name!r}."
