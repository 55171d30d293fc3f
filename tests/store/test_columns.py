"""Columns of a store, indexed as numpy would."""

from __future__ import annotations

import pickle
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from activation_extractor import ActivationError, Column, NpySink, NpzSink, SafetensorsSink, open_store
from activation_extractor._format._stored_rows import Ragged
from activation_extractor.errors import ArgumentTypeError, StoreError
from activation_extractor.sinks import Step

ROWS = 11
VALUES = np.arange(ROWS * 3, dtype=np.float32).reshape(ROWS, 3)
LENGTHS = [3, 1, 0, 4, 2, 2, 5, 1, 1, 3, 2]
STEPS = [2, 3, 1, 4, 1]
SINKS = [SafetensorsSink, NpySink, NpzSink]


@pytest.fixture(scope="module", params=SINKS)
def columns(request):
    """A dense and a ragged column, in several shards of uneven size."""
    with tempfile.TemporaryDirectory() as folder:
        sink = request.param(Path(folder) / "out", rows_per_unit=3)
        tokens = np.split(np.arange(sum(LENGTHS) * 2, dtype=np.float32).reshape(-1, 2), np.cumsum(LENGTHS)[:-1])
        start = 0
        for index, rows in enumerate(STEPS):
            part = slice(start, start + rows)
            ragged = Ragged(torch.from_numpy(np.concatenate(tokens[part])), torch.tensor(LENGTHS[part]))
            values = {("dense", "a"): torch.from_numpy(VALUES[part].copy()), ("ragged", "a"): ragged}
            sink.write(Step(index, rows, values, None, {}))
            start += rows
        sink.close()
        store = open_store(Path(folder) / "out")
        assert len(list((Path(folder) / "out/shards").iterdir())) == 3
        yield store["dense"], store["ragged"], tokens


index_lists = st.lists(st.integers(-ROWS, ROWS - 1), max_size=6)
indices = st.one_of(
    st.integers(-ROWS, ROWS - 1),
    st.integers(-ROWS, ROWS - 1).map(np.int64),
    st.slices(ROWS),
    st.builds(
        slice,
        st.none() | st.integers(-20, 20),
        st.none() | st.integers(-20, 20),
        st.sampled_from([None, 1, 2, 4, -1, -2, -3]),
    ),
    index_lists,
    index_lists.map(lambda one: np.array(one, dtype=np.int64)),
    index_lists.map(lambda one: torch.tensor(one, dtype=torch.int64)),
    st.lists(st.integers(0, ROWS - 1), max_size=6).map(lambda one: np.array(one, dtype=np.uint8)),
    st.lists(st.booleans(), min_size=ROWS, max_size=ROWS),
    st.lists(st.booleans(), min_size=ROWS, max_size=ROWS).map(np.array),
)


@settings(deadline=None, max_examples=40)
@given(index=indices)
@example(index=slice(1, 3))
@example(index=slice(4, 9))
@example(index=slice(9, 2))
@example(index=slice(9, None, -2))
@example(index=[5, 5, 4, 4, 5])
def test_any_index_gives_what_numpy_gives(columns, index):
    dense, _, _ = columns
    expected = VALUES[_as_numpy_takes(index)]
    result = dense[index]
    assert isinstance(result, torch.Tensor)
    assert result.dtype == torch.float32
    assert tuple(result.shape) == expected.shape
    assert np.array_equal(result.numpy(), expected)


@settings(deadline=None, max_examples=40)
@given(index=indices)
@example(index=slice(1, 3))
@example(index=slice(4, 9))
@example(index=slice(9, 2))
@example(index=slice(9, None, -2))
@example(index=[5, 5, 4, 4, 5])
def test_any_index_gives_the_rows_of_a_ragged_column(columns, index):
    _, ragged, tokens = columns
    wanted = np.arange(ROWS)[_as_numpy_takes(index)]
    result = ragged[index]
    if np.ndim(wanted) == 0:
        assert np.array_equal(result.numpy(), tokens[wanted])
        return
    assert len(result) == len(wanted)
    assert all(np.array_equal(row.numpy(), tokens[one]) for row, one in zip(result, wanted, strict=True))


def _as_numpy_takes(index):
    if isinstance(index, torch.Tensor):
        return index.numpy()
    is_mask = isinstance(index, list) and bool(index) and isinstance(index[0], bool)
    return np.array(index, dtype=bool if is_mask else int) if isinstance(index, list) else index


def test_a_column_becomes_an_array(columns):
    dense, _, _ = columns
    assert np.array_equal(np.asarray(dense), VALUES)
    assert np.array_equal(dense.numpy(), VALUES)
    assert np.asarray(dense, dtype=np.float64).dtype == np.float64
    assert np.array_equal(dense.torch().numpy(), VALUES)


def test_a_column_tells_its_shape_and_its_rows(columns):
    dense, ragged, _ = columns
    assert (dense.shape, dense.row_shape, dense.is_ragged, len(dense)) == ((ROWS, 3), (3,), False, ROWS)
    assert (ragged.shape, ragged.row_shape, ragged.is_ragged, len(ragged)) == ((ROWS, None, 2), (2,), True, ROWS)
    assert repr(dense) == "Column(('dense', 'a'), (11, 3), float32)"
    assert dense.rows.tolist() == ragged.rows.tolist() == list(range(ROWS))
    assert isinstance(dense, Column)


def test_a_column_can_be_walked_through(columns):
    dense, ragged, tokens = columns
    assert np.array_equal(np.stack([row.numpy() for row in dense]), VALUES)
    assert [len(row) for row in ragged] == LENGTHS == [len(one) for one in tokens]


def test_what_is_read_is_new_memory(columns):
    dense, _, _ = columns
    dense[0:2].zero_()
    dense.numpy()[:] = 0
    assert np.array_equal(dense.numpy(), VALUES)


def test_a_ragged_column_has_lengths_and_a_flat_view(columns):
    _, ragged, tokens = columns
    assert ragged.lengths().tolist() == LENGTHS
    assert np.array_equal(ragged.flat().numpy(), np.concatenate(tokens))


def test_rows_of_different_lengths_are_no_tensor_but_can_be_had_one_by_one_or_flat(columns):
    _, ragged, tokens = columns
    for ask in (ragged.torch, ragged.numpy, lambda: np.asarray(ragged)):
        with pytest.raises(
            StoreError, match="must have rows of one length to become one tensor, got different lengths"
        ):
            ask()
    assert np.array_equal(ragged[3].numpy(), tokens[3])  # as the text advises
    assert ragged.flat().shape == (sum(LENGTHS), 2)


@pytest.mark.parametrize("make_sink", SINKS)
def test_ragged_rows_of_one_length_become_a_tensor(tmp_path, make_sink):
    sink = make_sink(tmp_path / "out")
    sink.write(Step(0, 2, {("a", "full"): Ragged(torch.arange(12.0).reshape(6, 2), torch.tensor([3, 3]))}, None, {}))
    sink.close()
    assert torch.equal(open_store(tmp_path / "out")["a"].torch(), torch.arange(12.0).reshape(2, 3, 2))


@pytest.mark.parametrize("index", [ROWS, -ROWS - 1, [0, ROWS], np.array([-ROWS - 1])])
def test_a_row_that_is_not_there_is_an_index_error(columns, index):
    for column in columns[:2]:
        with pytest.raises(IndexError, match=r"A row index must be below 11, got -?1[12]\. len\(column\) is the"):
            column[index]


@pytest.mark.parametrize("index", ["a", 1.0, None, [1.5], [[0, 1]], [True, False], np.ones((ROWS, 1), dtype=bool), ...])
def test_an_index_of_another_kind_is_an_error(columns, index):
    with pytest.raises(
        ArgumentTypeError, match="an index into a column must be an integer, a slice, integers, or a bool"
    ):
        columns[0][index]


@pytest.mark.parametrize("index", [(0, 1), True], ids=str)
def test_an_index_that_numpy_reads_otherwise_is_refused_or_read_alike(columns, index):
    try:
        result = columns[0][index]
    except ArgumentTypeError:
        return
    assert np.array_equal(result.numpy(), VALUES[index])


def test_lengths_of_a_column_that_is_not_ragged_are_a_clear_error(columns):
    for ask in (columns[0].lengths, columns[0].flat):
        with pytest.raises(ActivationError, match=r"must be ragged to have positions, got .* Read it with column\["):
            ask()


@pytest.mark.parametrize("make_sink", SINKS)
@pytest.mark.parametrize("shape", [(4,), (4, 0), (4, 2, 3)])
def test_rows_may_have_any_shape(tmp_path, shape, make_sink):
    values = torch.randn(shape)
    sink = make_sink(tmp_path / "out")
    sink.write(Step(0, 4, {("a", "mean"): values}, None, {}))
    sink.close()
    column = open_store(tmp_path / "out")["a"]
    assert column.shape == shape
    assert torch.equal(column[1:3], values[1:3])
    assert torch.equal(column[-1], values[-1])
    assert torch.equal(column[[]], values[:0])
    assert [one.tolist() for one in column] == values.tolist()
    assert torch.equal(column.mapped()[0], values)


@pytest.mark.parametrize("make_sink", SINKS)
def test_a_column_that_is_in_some_shards_only_tells_its_rows_and_has_no_others(tmp_path, make_sink):
    sink = make_sink(tmp_path / "out", rows_per_unit=4)
    for index, has_rare in enumerate([False, True, False, False, True, True, False, True]):
        values = {("always", "a"): torch.full((2, 1), float(index))}
        sink.write(Step(index, 2, {**values, **({("rare", "a"): values["always", "a"] + 10} if has_rare else {})}))
    sink.close()
    rare = open_store(tmp_path / "out")["rare"]
    assert rare.rows.tolist() == [2, 3, 8, 9, 10, 11, 14, 15]
    assert rare[:].flatten().tolist() == [11, 11, 14, 14, 15, 15, 17, 17]
    assert rare[[-1, 0]].flatten().tolist() == [17, 11]
    assert [part.flatten().tolist() for part in rare.mapped()] == [[11, 11], [14, 14, 15, 15], [17, 17]]
    assert pickle.loads(pickle.dumps(rare)).rows.tolist() == rare.rows.tolist()


@pytest.mark.parametrize("make_sink", SINKS)
def test_a_column_without_rows_left_is_empty(tmp_path, make_sink):
    sink = make_sink(tmp_path / "out")
    ragged = Ragged(torch.ones(3, 2), torch.tensor([1, 2]))
    sink.write(Step(0, 2, {("dense", "a"): torch.ones(2, 3), ("ragged", "a"): ragged}, None, {}))
    sink.close()
    shutil.rmtree(tmp_path / "out/shards")
    shutil.rmtree(tmp_path / "out/journal")
    dense, ragged = (open_store(tmp_path / "out")[name] for name in ("dense", "ragged"))
    assert (dense.shape, ragged.shape) == ((0, 3), (0, None, 2))
    assert dense.numpy().shape == dense[:].shape == (0, 3)
    assert (list(dense), ragged[:], dense.mapped(), dense.rows.tolist()) == ([], [], [], [])
    assert ragged.flat().shape == (0, 2)
    assert ragged.lengths().tolist() == []
    assert ragged.torch().dtype == torch.float32
    with pytest.raises(IndexError):
        dense[0]
