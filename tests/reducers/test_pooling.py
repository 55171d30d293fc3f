"""`positions`, `span` and `weighted_mean`, against numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from activation_extractor import SafetensorsSink, capture, open_store
from activation_extractor.errors import ArgumentError, ArgumentTypeError, PoolingError, PositionError
from activation_extractor.reducers import position, positions, span, weighted_mean

X = torch.arange(24.0).reshape(2, 6, 2)
LEFT = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]], dtype=torch.bool)
RIGHT = LEFT.flip(1)


@st.composite
def rows(draw):
    """An activation whose padding is NaN, its mask or None, and the real positions of each row."""
    batch, seq, width = draw(st.integers(1, 4)), draw(st.integers(1, 6)), draw(st.integers(1, 3))
    x = np.random.default_rng(draw(st.integers(0, 99))).normal(size=(batch, seq, width)).astype(np.float32)
    if draw(st.booleans()):
        return x, None, [list(range(seq))] * batch
    real = [sorted(draw(st.sets(st.integers(0, seq - 1), min_size=1))) for _ in range(batch)]
    mask = np.zeros((batch, seq), dtype=bool)
    for row, places in enumerate(real):
        mask[row, places] = True
    x[~mask] = np.nan
    return x, torch.from_numpy(mask), real


@settings(deadline=None, max_examples=100)
@given(given=rows(), ks=st.lists(st.integers(-4, 3), min_size=1, max_size=4))
def test_positions_are_the_real_ones_from_either_end_or_an_error_names_a_row_that_is_too_short(given, ks):
    x, mask, real = given
    short = [row for row, places in enumerate(real) if any(not -len(places) <= k < len(places) for k in ks)]
    if short:
        with pytest.raises(PositionError, match=rf"Row {short[0]} has {len(real[short[0]])} real positions, too few"):
            positions(*ks)(torch.from_numpy(x), mask)
        return
    found = positions(*ks)(torch.from_numpy(x), mask)
    expected = np.stack([x[row, [places[k] for k in ks]] for row, places in enumerate(real)])
    np.testing.assert_array_equal(found.numpy(), expected)
    for index, k in enumerate(ks):
        assert torch.equal(found[:, index], position(k)(torch.from_numpy(x), mask))


@pytest.mark.parametrize("wrong", [(), (1.0,), (True,), ("0",), ([0, 1],)])
def test_positions_are_integers(wrong):
    with pytest.raises(ArgumentTypeError, match=r"what is given to positions\(k, ...\) must be one or more integers"):
        positions(*wrong)


@settings(deadline=None, max_examples=150)
@given(given=rows(), data=st.data(), reduce=st.sampled_from(["mean", "max", "first", "last", "LT"]))
def test_a_span_counts_real_positions_and_its_end_is_not_part_of_it(given, data, reduce):
    x, mask, real = given
    ends = [data.draw(st.lists(st.integers(-3, 5), min_size=len(real), max_size=len(real))) for _ in range(2)]
    kind = data.draw(st.sampled_from([list, torch.tensor, np.array, lambda few: torch.tensor(few, dtype=torch.int32)]))
    reducer = span(kind(ends[0]), kind(ends[1]), reduce)
    counts = [len(places) for places in real]
    start, end = ([one + count * (one < 0) for one, count in zip(few, counts, strict=True)] for few in ends)
    wrong = [row for row, count in enumerate(counts) if not 0 <= start[row] < end[row] <= count]
    if wrong:
        row = wrong[0]
        text = rf"got {start[row]} to {end[row]} of {counts[row]} in row {row}\. "
        with pytest.raises(PoolingError, match=text) as caught:
            reducer(torch.from_numpy(x), mask)
        assert caught.value.row == row
        return
    inside = [x[row, places[start[row] : end[row]]] for row, places in enumerate(real)]
    pool = {"mean": lambda one: one.mean(0), "max": lambda one: one.max(0), "first": lambda one: one[0]}
    expected = np.stack([pool.get(reduce, lambda one: one[-1])(one) for one in inside])
    np.testing.assert_allclose(reducer(torch.from_numpy(x), mask).numpy(), expected, rtol=1e-5, atol=1e-6)


def test_one_number_is_for_all_rows_negative_ones_count_from_the_end_and_none_is_no_limit():
    assert torch.equal(span(1, -1)(X, LEFT), torch.stack([X[0, 3:5].mean(0), X[1, 1:5].mean(0)]))
    assert torch.equal(span(None, 2)(X, RIGHT), torch.stack([X[0, :2].mean(0), X[1, :2].mean(0)]))
    assert torch.equal(span(-2, None, "max")(X, LEFT), X[:, -2:].amax(1))
    assert torch.equal(span(torch.tensor(1), torch.tensor(2))(X, None), X[:, 1])


@pytest.mark.parametrize(
    ("reducer", "name"),
    [
        (span(1, -1), "span(1, -1)"),
        (span(None, 3, "max"), "span(None, 3, max)"),
        (span([1, 2], [3, 4]), "span"),
        (span([1, 2], 4, "max"), "span(max)"),
        (span("start", "end"), "span(start, end)"),
        (positions(0, -1), "positions(0, -1)"),
        (weighted_mean(torch.ones(2, 6)), "weighted_mean"),
    ],
)
def test_reducers_are_called_after_what_they_take(reducer, name):
    assert reducer.__name__ == name


@pytest.mark.parametrize("wrong", [1.5, [1.0, 2.0], True, [[1], [1, 2]], torch.tensor([True]), {"a": 1}, [None, 1]])
def test_the_ends_of_a_span_hold_integers(wrong):
    with pytest.raises(ArgumentTypeError, match="start of span must hold integers, got "):
        span(wrong, 3)


def test_an_end_for_other_rows_and_an_unknown_pooling_are_errors():
    with pytest.raises(ArgumentError, match=r"end of span must hold a position for each of 2 rows, got \(3,\)"):
        span(0, [1, 2, 3])(X, None)
    with pytest.raises(ArgumentError, match="reduce of span must be 'mean', 'max', 'first' or 'last', got 'full'"):
        span(0, 1, "full")


# -- weights ----------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=150)
@given(given=rows(), data=st.data(), kind=st.sampled_from([np.float32, np.float64, np.float16, np.int64]))
def test_a_weighted_mean_is_numpy_s_average_of_the_real_positions_or_an_error_names_the_row(given, data, kind):
    x, mask, real = given
    some = st.integers(-1, 3) if data.draw(st.booleans()) else st.integers(1, 4)
    weights = np.array([[data.draw(some) for _ in one] for one in x]).astype(kind)
    reducer = weighted_mean(torch.from_numpy(weights))
    chosen = [weights[row, places] for row, places in enumerate(real)]
    wrong = [row for row, few in enumerate(chosen) if (few < 0).any() or few.sum() == 0]
    if wrong:
        with pytest.raises(PoolingError, match=rf"got the (sum|weight) (0|-1|-2|-3) in row {wrong[0]}\. ") as caught:
            reducer(torch.from_numpy(x), mask)
        assert caught.value.row == wrong[0]
        return
    expected = np.stack(
        [np.average(x[row, places], axis=0, weights=chosen[row].astype(float)) for row, places in enumerate(real)]
    )
    np.testing.assert_allclose(reducer(torch.from_numpy(x), mask).numpy(), expected, rtol=1e-5, atol=1e-6)


def test_equal_weights_give_the_mean_and_nans_in_padding_change_nothing():
    x, weights = X.clone(), torch.full((2, 6), 0.5)
    x[0, :2], weights[0, :2] = float("nan"), float("nan")
    assert torch.allclose(weighted_mean(weights)(x, LEFT), torch.stack([X[0, 2:].mean(0), X[1].mean(0)]))
    x[1, 3], weights[1, 3] = float("nan"), 0  # a position that weighs nothing
    assert not weighted_mean(weights)(x, LEFT).isnan().any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.int32, torch.float8_e4m3fn])
def test_a_weighted_mean_accumulates_in_float32_and_comes_in_the_dtype(dtype):
    x = torch.full((1, 4000, 1), 3.0).to(dtype)
    found = weighted_mean(torch.rand(1, 4000))(x, None)
    assert found.dtype == (torch.float32 if dtype == torch.int32 else dtype)
    assert found.float().item() == pytest.approx(3, rel=1e-5)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_no_finite_numbers_are_an_error(value):
    weights = torch.ones(2, 6)
    weights[1, 2] = value
    with pytest.raises(PoolingError, match="Weights must be finite, not negative and not all 0 .* in row 1"):
        weighted_mean(weights)(X, LEFT)


@pytest.mark.parametrize("shape", [(2, 5), (1, 6), (2, 6, 1), (6,)])
def test_weights_have_the_positions_of_the_batch(shape):
    with pytest.raises(ArgumentError, match=r"weights must have shape \(2, 6\), got .*Give a weight for each position"):
        weighted_mean(torch.ones(shape))(X, LEFT)


def test_nested_activations_are_pooled_too():
    parts = [torch.rand(3, 2), torch.rand(5, 2)]
    nested = torch.nested.nested_tensor(parts, layout=torch.jagged)
    assert torch.allclose(positions(0, -1)(nested, None), torch.stack([part[[0, -1]] for part in parts]))
    assert torch.allclose(
        span([1, 2], [3, 5])(nested, None), torch.stack([parts[0][1:3].mean(0), parts[1][2:5].mean(0)])
    )
    weights = torch.rand(2, 5)
    expected = torch.stack(
        [
            (part * weights[row, : len(part), None]).sum(0) / weights[row, : len(part)].sum()
            for row, part in enumerate(parts)
        ]
    )
    assert torch.allclose(weighted_mean(weights)(nested, None), expected)


# -- in a block -------------------------------------------------------------------------------------------------------


def test_in_a_block_padding_is_left_out_and_an_error_says_the_layer(stack, tokens):
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    reduce = [positions(0, -1), span([0, 1], [2, 4]), weighted_mean(torch.arange(10.0).reshape(2, 5))]
    with capture(stack, "h.1", reduce=["full", *reduce]) as acts:
        stack(tokens, attention_mask=mask)
    full = acts["h.1", "full"]
    assert torch.equal(acts["h.1", "positions(0, -1)"], torch.stack([full[0, [2, 4]], full[1, [0, 4]]]))
    assert torch.allclose(acts["h.1", "span"], torch.stack([full[0, 2:4].mean(0), full[1, 1:4].mean(0)]))
    with pytest.raises(PoolingError) as caught, capture(stack, "h.1", reduce=span(0, 4)):
        stack(tokens, attention_mask=mask)
    assert "layer 'h.1' with 'span(0, 4)'" in caught.value.__notes__[0]


def test_names_of_fields_are_refused_in_a_block():
    for reducer in (span("start", "end"), span(0, "end"), weighted_mean("idf")):
        with pytest.raises(ArgumentError, match="a reducer of a with-block must name no field of batches, got "):
            capture(nn.Linear(2, 2), "**", reduce=["mean", reducer])
    with pytest.raises(
        ArgumentError, match=r"got 'weighted_mean'. Use reducers.weighted_mean\(weights\), or in extract"
    ):
        capture(nn.Linear(2, 2), "**", reduce="weighted_mean")


def test_one_store_takes_the_spans_of_many_batches(stack, tokens, tmp_path):
    sink = SafetensorsSink(tmp_path / "out")
    for start in (0, 1):
        with capture(stack, "h.1", reduce=span([start, 2], [start + 1, 4]), sink=sink):
            stack(tokens)
    assert open_store(tmp_path / "out")["h.1"].shape == (4, 8)
