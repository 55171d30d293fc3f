"""What the numbers of a column are like: compared with numpy, over any blocks, in bounded memory."""

from __future__ import annotations

import math
import os
import tempfile
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from activation_extractor import NpySink, NpzSink, SafetensorsSink, capture, open_store
from activation_extractor._format._stored_rows import Ragged
from activation_extractor.errors import ArgumentTypeError, StoreError
from activation_extractor.sinks import Step
from activation_extractor.store import _statistics as module
from activation_extractor.store import statistics

FLOATS = st.one_of(
    st.floats(-1e6, 1e6, width=32), st.sampled_from([0.0, -0.0, 2.0**-99, math.nan, math.inf, -math.inf, 1e6])
)
MATRICES = hnp.array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=12).flatmap(
    lambda shape: hnp.arrays(np.float32, shape, elements=FLOATS)
)


def column(folder, values, *, make_sink=SafetensorsSink, rows_per_shard=1_000_000):
    """A column of these rows, some of them in each shard."""
    sink = make_sink(Path(folder) / "out", rows_per_unit=rows_per_shard)
    for index, part in enumerate(torch.split(values, rows_per_shard)):
        sink.write(Step(index, len(part), {("a", "full"): part}))
    sink.close()
    return open_store(Path(folder) / "out")["a"]


def ragged_column(folder, values, lengths):
    sink = SafetensorsSink(Path(folder) / "out")
    sink.write(Step(0, len(lengths), {("a", "full"): Ragged(values, torch.tensor(lengths))}))
    sink.close()
    return open_store(Path(folder) / "out")["a"]


def expected(values: np.ndarray) -> tuple[float, float, int]:
    """Mean norm, variance and dead features of ``(rows, features)``, feature by feature."""
    wide = values.astype(np.float64)
    whole = wide[np.isfinite(wide).all(axis=1)]
    norms = np.linalg.norm(whole, axis=1)
    features = [one[np.isfinite(one)] for one in wide.T]
    variances = [one.var() for one in features if len(one)]
    dead = sum(len(set(one.tolist())) == 1 for one in features)
    return norms.mean() if len(norms) else math.nan, np.mean(variances) if variances else math.nan, dead


@settings(max_examples=60, deadline=None)
@given(MATRICES, st.integers(1, 60), st.integers(1, 12))
def test_any_blocks_and_shards_give_what_numpy_gives(values, block_values, rows_per_shard):
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_BLOCK_VALUES", block_values)
        found = statistics(column(folder, torch.from_numpy(values), rows_per_shard=rows_per_shard))
    norm, variance, dead = expected(values)
    assert (found.rows, found.features) == values.shape
    assert found.mean_norm == pytest.approx(norm, rel=1e-12, nan_ok=True)
    scale = np.square(values[np.isfinite(values)].astype(np.float64)).max(initial=0.0)
    assert found.variance == pytest.approx(variance, rel=1e-9, abs=1e-12 * scale, nan_ok=True)
    assert found.dead_features == dead
    assert found.nan_count == np.isnan(values).sum()
    assert found.inf_count == np.isinf(values).sum()


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=8).filter(sum), st.integers(1, 20))
def test_the_positions_of_a_ragged_column_are_its_rows(lengths, block_values):
    values = torch.randn(sum(lengths), 3, generator=torch.Generator().manual_seed(sum(lengths)))
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_BLOCK_VALUES", block_values)
        found = statistics(ragged_column(folder, values, lengths))
    norm, variance, dead = expected(values.numpy())
    assert (found.rows, found.dead_features) == (sum(lengths), dead)
    assert (found.mean_norm, found.variance) == (pytest.approx(norm), pytest.approx(variance))


@pytest.mark.parametrize("make_sink", [SafetensorsSink, NpySink, NpzSink])
@pytest.mark.parametrize(
    "dtype",
    [
        *(torch.bfloat16, torch.float16, torch.float64, torch.float8_e4m3fn, torch.float8_e5m2),
        *(torch.int8, torch.uint8, torch.int64, torch.uint16, torch.uint64, torch.bool),
    ],
)
def test_every_real_dtype_is_summed_up_in_float64(tmp_path, make_sink, dtype):
    values = torch.tensor([[0, 1, 1], [1, 1, 0], [1, 1, 2]]).to(dtype)
    found = statistics(column(tmp_path, values, make_sink=make_sink, rows_per_shard=2))
    norm, variance, dead = expected(values.double().numpy())
    assert (found.mean_norm, found.variance, found.dead_features) == (
        pytest.approx(norm),
        pytest.approx(variance),
        dead,
    )
    assert (found.nan_count, found.inf_count) == (0, 0)


def test_a_great_mean_costs_the_variance_no_digits(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_BLOCK_VALUES", 64)
    values = 1e9 + torch.rand(1000, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = statistics(column(tmp_path, values))
    assert found.variance == pytest.approx(values.numpy().var(axis=0).mean(), rel=1e-6)


def test_integers_that_float64_does_not_tell_apart_are_no_dead_feature(tmp_path):
    found = statistics(column(tmp_path, torch.tensor([[2**62, 5], [2**62 + 1, 5]])))
    assert found.dead_features == 1


def test_what_is_not_finite_makes_a_feature_neither_dead_nor_alive(tmp_path):
    nan, inf = math.nan, math.inf
    values = torch.tensor([[1.0, nan, 2.0], [1.0, inf, nan], [inf, nan, 3.0]])
    found = statistics(column(tmp_path, values))
    assert found.dead_features == 1  # the first; the second has no finite value at all
    assert math.isnan(found.mean_norm)  # no row is whole
    assert found.variance == pytest.approx((0 + 0.25) / 2)
    assert (found.nan_count, found.inf_count) == (3, 2)


def test_numbers_whose_squares_are_too_large_are_infinite_without_a_warning(tmp_path):
    found = statistics(column(tmp_path, torch.tensor([[1e300, 1.7e308], [-1e300, 1.7e308]], dtype=torch.float64)))
    assert found.mean_norm == math.inf
    assert not math.isfinite(found.variance)


def test_rows_of_several_axes_and_of_none_have_a_feature_for_each_number(tmp_path):
    found = statistics(column(tmp_path / "a", torch.ones(4, 2, 3)))
    assert (found.rows, found.features, found.dead_features) == (4, 6, 6)
    assert found.mean_norm == pytest.approx(6**0.5)
    single = statistics(column(tmp_path / "b", torch.tensor([3.0, -4.0])))
    assert (single.features, single.mean_norm, single.variance) == (1, 3.5, 12.25)


def test_rows_without_numbers_have_no_variance(tmp_path):
    found = statistics(column(tmp_path, torch.ones(4, 0)))
    assert (found.rows, found.features, found.mean_norm, found.dead_features) == (4, 0, 0.0, 0)
    assert math.isnan(found.variance)


def test_a_column_is_read_in_blocks_of_bounded_size(tmp_path, reads):
    values = torch.ones(1 << 13, 1 << 10)  # 32 MiB
    large = column(tmp_path, values, rows_per_shard=1 << 12)
    reads.clear()
    tracemalloc.start()
    found = statistics(large)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert found.mean_norm == 32.0
    assert sum(reads) >= values.nbytes
    assert max(reads) <= 1 << 20
    assert peak < 8 << 20


def test_a_ragged_column_of_one_long_row_is_read_in_blocks_too(tmp_path, reads):
    long = ragged_column(tmp_path, torch.ones(1 << 13, 1 << 8), [1 << 13])  # 8 MiB
    tracemalloc.start()
    reads.clear()
    found = statistics(long)
    assert max(reads) <= 1 << 20
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert (found.rows, found.mean_norm) == (1 << 13, 16.0)
    assert peak < 8 << 20


def test_a_column_that_is_short_of_rows_counts_those_it_has(tmp_path):
    sink = SafetensorsSink(tmp_path / "out")
    sink.write(Step(0, 2, {("a", "mean"): torch.ones(2, 1), ("b", "mean"): torch.ones(2, 1)}))
    sink.write(Step(1, 3, {("a", "mean"): torch.zeros(3, 1)}))
    sink.close()
    store = open_store(tmp_path / "out")
    assert [statistics(store[name]).rows for name in "ab"] == [5, 2]


def test_a_notebook_shows_statistics_as_a_table_with_headings(tmp_path):
    html = statistics(column(tmp_path, torch.tensor([[3000.0, 4000.0], [math.nan, 4000.0]])))._repr_html_()
    headings = ["rows", "features", "mean norm", "variance", "dead features", "NaN", "infinite"]
    assert f"<tr><th>{'</th><th>'.join(headings)}</th></tr>" in html
    assert f"<tr><td>{'</td><td>'.join(['2', '2', '5,000', '0', '2', '1', '0'])}</td></tr>" in html


def test_complex_numbers_and_what_is_no_column_are_refused(tmp_path):
    with pytest.raises(ArgumentTypeError, match=r"^column must hold real numbers, got .*complex64"):
        statistics(column(tmp_path, torch.ones(2, 2, dtype=torch.complex64)))
    with pytest.raises(ArgumentTypeError, match=r"^column must be a column of numbers, as store\[layer, reducer\] is"):
        statistics(["text"])  # type: ignore[arg-type]


def test_a_damaged_shard_is_an_error_that_says_so(tmp_path):
    one = column(tmp_path, torch.ones(100, 4))
    (shard,) = (tmp_path / "out" / "shards").iterdir()
    os.truncate(shard, shard.stat().st_size - 8)
    with pytest.raises(StoreError, match="must be a readable shard"):
        statistics(one)


def test_a_capture_of_a_dead_unit_shows_it(tmp_path):
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU())
    with torch.no_grad():
        model[0].bias[2] = -1e6
    with capture(model, "1", sink=tmp_path / "out"), torch.no_grad():
        model(torch.randn(50, 3, generator=torch.Generator().manual_seed(1)))
    assert statistics(open_store(tmp_path / "out")["1"]).dead_features == 1
