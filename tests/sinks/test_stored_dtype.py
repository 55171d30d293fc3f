"""`dtype=` of what is stored: rounded as torch rounds, and an error where a finite value becomes infinite."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from stores import LEFT, shards
from torch import nn

from activation_extractor import NpySink, NpzSink, SafetensorsSink, capture, extract, open_store
from activation_extractor.errors import ArgumentError, ArgumentTypeError, OtherRunError, StoredDtypeError
from activation_extractor.sinks import Ragged, Step
from activation_extractor.sinks._stored_dtype import OverflowCheck

DTYPES = [torch.float16, torch.bfloat16, torch.float32]


def step_of(values, ids=None, keep=None):
    return Step(0, len(values), {("h.0", "mean"): values}, ids, keep or {})


def stored(folder, values, dtype, sink=SafetensorsSink, **more):
    made = sink(folder, dtype=dtype)
    made.write(step_of(values, **more))
    made.close()
    return open_store(folder)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("computed", [*DTYPES, torch.float64])
def test_floating_point_numbers_are_stored_as_torch_rounds_them(tmp_path, dtype, computed):
    values = torch.randn(5, 3).to(computed)
    store = stored(tmp_path / "out", values, dtype)
    assert store["h.0"].dtype == dtype
    assert torch.equal(store["h.0"].torch(), values.to(dtype))
    column = json.loads((tmp_path / "out" / "manifest.json").read_text())["columns"][0]
    assert column["dtype"] == str(dtype).removeprefix("torch.")
    assert column.get("converted_from") == (None if dtype == computed else str(computed).removeprefix("torch."))


@pytest.mark.parametrize("sink", [NpySink, NpzSink])
@pytest.mark.parametrize("computed", [torch.float32, torch.bfloat16])
def test_numpy_formats_hold_float16_as_numpy_itself_reads_it(tmp_path, sink, computed):
    values = torch.randn(5, 3).to(computed)
    store = stored(tmp_path / "out", values, torch.float16, sink)
    assert store["h.0"].dtype == torch.float16
    np.testing.assert_array_equal(store["h.0"].numpy(), values.float().numpy().astype(np.float16))


@pytest.mark.parametrize("sink", [NpySink, NpzSink])
def test_numpy_formats_refuse_bfloat16_at_the_door(tmp_path, sink):
    with pytest.raises(
        ArgumentError, match=r"dtype must be one that np[yz] has, got 'bfloat16'. Store safetensors, or"
    ):
        sink(tmp_path / "out", dtype=torch.bfloat16)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("wrong", "error"), [("float16", ArgumentTypeError), (np.float16, ArgumentTypeError), (torch.int8, ArgumentError)]
)
def test_what_is_no_dtype_of_activations_is_refused_at_the_door(tmp_path, wrong, error):
    with pytest.raises(error, match=r"dtype must be one of torch.float16, torch.bfloat16, torch.float32, or None"):
        SafetensorsSink(tmp_path / "out", dtype=wrong)
    with pytest.raises(error, match="dtype must be one of torch.float16"):
        extract(nn.Linear(3, 3), [torch.rand(2, 3)], "**", out=tmp_path / "out", dtype=wrong)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", [torch.int64, torch.uint8, torch.bool, torch.complex64])
def test_integers_bools_and_complex_numbers_stay_as_they_are(tmp_path, kind):
    values = torch.arange(6).reshape(3, 2).to(kind)
    assert torch.equal(stored(tmp_path / "out", values, torch.float16)["h.0"].torch(), values)


def test_kept_columns_and_ids_stay_as_they_are(tmp_path):
    store = stored(
        tmp_path / "out", torch.rand(2, 3), torch.float16, ids=["a", "b"], keep={"y": torch.tensor([7e4, 1])}
    )
    assert store.keep["y"].torch().tolist() == [7e4, 1]
    assert store.keep["y"].dtype == torch.float32
    assert store.ids == ["a", "b"]


def test_a_float8_is_widened(tmp_path):
    values = torch.randn(4, 2).to(torch.float8_e4m3fn)
    assert torch.equal(stored(tmp_path / "out", values, torch.float16)["h.0"].torch(), values.to(torch.float16))


# -- overflow ---------------------------------------------------------------------------------------------------------


def test_a_value_that_overflows_is_an_error_with_layer_reducer_row_id_and_value(tmp_path):
    values = torch.tensor([[1.0, 2.0], [3.0, -70000.0], [float("inf"), 1e6]])
    with pytest.raises(StoredDtypeError) as caught:
        stored(tmp_path / "out", values, torch.float16, ids=["P1", "P2", "P3"])
    assert str(caught.value) == (
        "What is stored of layer 'h.0' with 'mean' must fit float16, whose largest number is 65504, got -70000 in row "
        "1, id 'P2'. Store it in a dtype of a wider range, or leave dtype= out."
    )
    assert not list((tmp_path / "out" / "shards").iterdir())


def test_infinities_and_nans_that_were_computed_are_stored(tmp_path):
    values = torch.tensor([[float("inf"), -float("inf")], [float("nan"), 65504.0]])
    assert torch.equal(stored(tmp_path / "out", values, torch.float16)["h.0"].torch()[0], values[0].half())
    assert open_store(tmp_path / "out")["h.0"].torch()[1].isnan().tolist() == [True, False]


def test_what_rounds_down_to_the_largest_number_fits_and_the_next_one_does_not(tmp_path):
    assert stored(tmp_path / "a", torch.tensor([[65519.0]]), torch.float16)["h.0"].torch().item() == 65504
    with pytest.raises(StoredDtypeError, match="got 65520 in row 0"):
        stored(tmp_path / "b", torch.tensor([[65520.0]]), torch.float16)
    with pytest.raises(StoredDtypeError, match=r"must fit bfloat16, .* got 3.4028e\+38 in row 0"):
        stored(tmp_path / "c", torch.tensor([[3.4028e38]]), torch.bfloat16)
    with pytest.raises(StoredDtypeError, match=r"must fit float32, .* got -1e\+300 in row 1"):
        stored(tmp_path / "d", torch.tensor([[1.0], [-1e300]], dtype=torch.float64), torch.float32)


def test_a_ragged_row_is_named_by_its_own_number(tmp_path):
    values = torch.ones(7, 2)
    values[4, 1] = 1e5
    sink = SafetensorsSink(tmp_path / "out", dtype=torch.float16)
    with pytest.raises(StoredDtypeError, match="'full' must fit float16, .* got 100000 in row 2, id 12"):
        sink.write(Step(0, 3, {("h.0", "full"): Ragged(values, torch.tensor([4, 0, 3]))}, [10, 11, 12]))


@settings(deadline=None, max_examples=60)
@given(
    values=arrays.arrays(np.float32, st.tuples(st.integers(1, 4), st.integers(1, 3)), elements=st.floats(width=32)),
    dtype=st.sampled_from(DTYPES),
)
def test_any_values_are_as_numpy_rounds_them_or_an_error_names_the_first_row(values, dtype):
    rounded = torch.from_numpy(values).to(dtype)
    with np.errstate(over="ignore"):
        expected = values.astype(np.float16) if dtype == torch.float16 else rounded.float().numpy()
    is_lost = np.isinf(expected) & np.isfinite(values)
    with tempfile.TemporaryDirectory() as folder:
        if is_lost.any():
            with pytest.raises(StoredDtypeError, match=rf"in row {is_lost.any(1).argmax()}\."):
                stored(Path(folder) / "out", torch.from_numpy(values), dtype)
        else:
            found = stored(Path(folder) / "out", torch.from_numpy(values), dtype)["h.0"].torch().float().numpy()
            np.testing.assert_array_equal(found, expected.astype(np.float32))


@settings(deadline=None, max_examples=60)
@given(
    values=arrays.arrays(
        np.float32, arrays.array_shapes(min_dims=1, max_dims=3, max_side=3), elements=st.floats(-1e5, 1e5, width=32)
    )
)
def test_a_verdict_needs_no_look_at_the_values(values):
    computed = torch.from_numpy(values)
    check = OverflowCheck(("h.0", "mean"), computed, computed.half(), None, step_of(computed))
    is_lost = np.isinf(computed.half().numpy()) & np.isfinite(values)
    if not is_lost.any():
        return check.settle(check.verdict)
    row = is_lost.reshape(len(values), -1).any(1).argmax()
    with pytest.raises(StoredDtypeError) as caught:
        check.settle(check.verdict)
    largest = np.abs(np.where(is_lost, values, 0)[row]).max()
    assert caught.value.row == f"row {row}"
    assert f"{largest:.6g} in" in str(caught.value)
    return None


# -- with-blocks and data sets ----------------------------------------------------------------------------------------


@pytest.fixture
def plain_stack():
    return nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 6))


def test_a_with_block_stores_padding_left_out_and_rounded(plain_stack, tmp_path):
    sink = SafetensorsSink(tmp_path / "out", dtype=torch.bfloat16)
    x = torch.randn(2, 5, 8)
    with capture(plain_stack, "0", reduce=["mean", "full"], mask=LEFT) as plain:
        plain_stack(x)
    with capture(plain_stack, "0", reduce=["mean", "full"], mask=LEFT, sink=sink):
        plain_stack(x)
    store = open_store(tmp_path / "out")
    assert torch.equal(store["0", "mean"].torch(), plain["0", "mean"].bfloat16())
    assert torch.equal(store["0", "full"][0], plain["0", "full"][0, 2:].bfloat16())


def test_what_is_added_must_be_of_the_same_dtype(plain_stack, tmp_path):
    def add(dtype):
        with capture(plain_stack, "0", sink=SafetensorsSink(tmp_path / "out", append=True, dtype=dtype)):
            plain_stack(torch.randn(2, 5, 8))

    add(torch.float16)
    add(torch.float16)
    for other in (None, torch.bfloat16):
        with pytest.raises(OtherRunError, match=r"it differs in dtype \((none|'bfloat16') in place of 'float16'\)"):
            add(other)
    assert open_store(tmp_path / "out").rows == 4
    assert open_store(tmp_path / "out")["0"].dtype == torch.float16


def test_extract_resumes_in_its_own_dtype_and_no_other(plain_stack, tmp_path):
    batches = torch.randn(6, 5, 8).split(2)
    options = {"reduce": "mean", "out": tmp_path / "out", "rows_per_unit": 2, "progress": False}
    extract(plain_stack, batches, "*", **options, dtype=torch.float16)
    files = shards(tmp_path / "out")
    before = files[1].read_bytes()
    files[1].unlink()
    store = extract(plain_stack, batches, "*", **options, dtype=torch.float16)
    assert files[1].read_bytes() == before
    assert {store[layer].dtype for layer in store} == {torch.float16}
    assert not store.verify()
    for other in (None, torch.bfloat16):
        with pytest.raises(OtherRunError, match="differs in dtype"):
            extract(plain_stack, batches, "*", **options, dtype=other)


def test_extract_names_the_row_that_overflows_and_keeps_what_was_finished(plain_stack, tmp_path):
    batches = [{"input": torch.randn(2, 5, 8), "id": [f"r{2 * i}", f"r{2 * i + 1}"]} for i in range(3)]
    batches[2]["input"][1] *= 1e7
    with pytest.raises(StoredDtypeError, match=r"layer '0' with 'mean' must fit float16, .* in row 1, id 'r5'"):
        extract(
            plain_stack,
            batches,
            "0",
            reduce="mean",
            out=tmp_path / "out",
            ids="id",
            rows_per_unit=2,
            dtype=torch.float16,
        )
    assert open_store(tmp_path / "out").ids == ["r0", "r1", "r2", "r3"]
