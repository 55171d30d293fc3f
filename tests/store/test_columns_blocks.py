"""`Column.blocks`: a column in pieces of bounded size, however it is cut into shards."""

from __future__ import annotations

import math
import tempfile
from itertools import chain, pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from activation_extractor import SafetensorsSink, open_store
from activation_extractor._format._stored_rows import Ragged
from activation_extractor.errors import ArgumentTypeError
from activation_extractor.sinks import Step

LENGTHS = st.lists(st.integers(0, 4), min_size=1, max_size=9)
TENSOR_BYTES = 512  # what a row of a ragged column counts beside its numbers


def columns(folder, lengths: list[int], rows_per_shard: int = 2):
    """A store of ``(rows, 3)`` float32, the same as ragged rows of these lengths, and text, in several shards."""
    sink = SafetensorsSink(Path(folder) / "out", rows_per_unit=rows_per_shard)
    dense = torch.arange(len(lengths) * 3.0).view(-1, 3)
    ragged = torch.split(torch.arange(sum(lengths) * 2.0).view(-1, 2), lengths)
    for start in range(0, len(lengths), rows_per_shard):
        part = slice(start, start + rows_per_shard)
        values = {
            ("dense", "a"): dense[part],
            ("ragged", "a"): Ragged(torch.cat(ragged[part]), torch.tensor(lengths[part])),
        }
        texts = ["x" * length for length in lengths[part]]
        sink.write(Step(start, len(lengths[part]), values, None, {"text": texts}))
    sink.close()
    return open_store(Path(folder) / "out"), dense, ragged


@settings(deadline=None, max_examples=30)
@given(LENGTHS, st.integers(1, 4), st.integers(0, 60))
def test_blocks_of_rows_are_as_large_as_they_may_be(lengths, rows_per_shard, nbytes):
    with tempfile.TemporaryDirectory() as folder:
        store, dense, _ = columns(folder, lengths, rows_per_shard)
        blocks = list(store["dense"].blocks(nbytes))
    most = max(1, nbytes // (3 * 4))
    assert [len(block) for block in blocks] == [len(part) for part in torch.split(dense, most)]
    assert torch.equal(torch.cat(blocks), dense)
    assert {(block.dtype, block.device.type) for block in blocks} == {(torch.float32, "cpu")}


@settings(deadline=None, max_examples=30)
@given(LENGTHS, st.integers(1, 4), st.integers(0, 4 * TENSOR_BYTES))
def test_blocks_of_ragged_rows_are_lists_that_end_where_the_next_row_has_no_room(lengths, rows_per_shard, nbytes):
    with tempfile.TemporaryDirectory() as folder:
        store, _, ragged = columns(folder, lengths, rows_per_shard)
        blocks = list(store["ragged"].blocks(nbytes))
    assert all(torch.equal(row, wanted) for row, wanted in zip(chain(*blocks), ragged, strict=True))
    sizes = [[row.nbytes + TENSOR_BYTES for row in block] for block in blocks]
    assert all(len(block) == 1 or sum(block) <= nbytes for block in sizes)
    assert all(sum(block) + following[0] > nbytes for block, following in pairwise(sizes))


@settings(deadline=None, max_examples=30)
@given(LENGTHS, st.integers(1, 4), st.integers(0, 60))
def test_flat_blocks_cut_long_rows(lengths, rows_per_shard, nbytes):
    with tempfile.TemporaryDirectory() as folder:
        store, dense, ragged = columns(folder, lengths, rows_per_shard)
        blocks = list(store["ragged"].blocks(nbytes, flat=True))
        assert torch.equal(torch.cat(list(store["dense"].blocks(nbytes, flat=True))), dense)
    assert torch.equal(torch.cat([torch.empty(0, 2), *blocks]), torch.cat(ragged))
    assert max((block.nbytes for block in blocks), default=0) <= max(nbytes, 2 * 4)
    assert all(map(len, blocks))


@pytest.mark.parametrize(
    "indices", [[4, 0, 0, -1], slice(None, None, -2), torch.tensor([1, 3]), [True] * 2 + [False] * 3]
)
def test_blocks_of_chosen_rows_have_them_in_their_order(tmp_path, indices):
    store, dense, ragged = columns(tmp_path, [2, 0, 3, 1, 2])
    wanted = torch.arange(5).numpy()[indices.numpy() if isinstance(indices, torch.Tensor) else indices]
    for nbytes in (1, 1 << 20):
        assert torch.equal(torch.cat(list(store["dense"].blocks(nbytes, indices=indices))), dense[wanted.copy()])
        found = chain.from_iterable(store["ragged"].blocks(nbytes, indices=indices))
        assert all(torch.equal(row, ragged[number]) for row, number in zip(found, wanted, strict=True))
        flat = list(store["ragged"].blocks(nbytes, indices=indices, flat=True))
        assert torch.equal(torch.cat(flat), torch.cat([ragged[number] for number in wanted]))


@pytest.mark.parametrize("indices", [3, [[1]], "ab", [0.5]], ids=str)
def test_indices_that_are_no_rows_are_refused_before_anything_is_read(tmp_path, reads, indices):
    column = columns(tmp_path, [1, 2])[0]["dense"]
    with pytest.raises(ArgumentTypeError, match="an index into a column must be"):
        column.blocks(indices=indices)
    with pytest.raises(IndexError, match="must be below 2, got 2"):
        column.blocks(indices=[0, 2])
    assert not reads


def test_blocks_are_read_one_by_one_into_new_memory(tmp_path, reads):
    column = columns(tmp_path, [1] * 6)[0]["dense"]
    blocks = column.blocks(2 * 12)
    assert not reads
    next(blocks).zero_()
    assert reads == [24]
    assert column[1].tolist() == [3, 4, 5]


def test_text_comes_in_lists_of_strings(tmp_path):
    text = columns(tmp_path, [2, 0, 3, 1, 2])[0].keep["text"]
    assert list(text.blocks(0)) == [["xx"], [""], ["xxx"], ["x"], ["xx"]]
    assert list(text.blocks(2 * TENSOR_BYTES + 4)) == [["xx", ""], ["xxx", "x"], ["xx"]]
    assert list(text.blocks()) == [["xx", "", "xxx", "x", "xx"]]
    assert list(text.blocks(indices=[3, 0])) == [["x", "xx"]]


def test_a_column_short_of_rows_has_blocks_of_those_it_has(tmp_path):
    sink = SafetensorsSink(tmp_path / "out")
    sink.write(Step(0, 2, {("a", "mean"): torch.ones(2, 1), ("b", "mean"): torch.ones(2, 1)}))
    sink.write(Step(1, 3, {("a", "mean"): torch.zeros(3, 1)}))
    sink.close()
    column = open_store(tmp_path / "out")["b"]
    assert [block.tolist() for block in column.blocks(4)] == [[[1.0]], [[1.0]]]


def test_a_column_without_rows_has_no_blocks(tmp_path):
    store, _, _ = columns(tmp_path, [1])
    assert list(store["dense"].blocks(indices=[])) == list(store["ragged"].blocks(indices=[])) == []


def test_rows_without_numbers_are_counted_too(tmp_path):
    store, _, _ = columns(tmp_path, [0] * 5, rows_per_shard=5)
    assert [len(block) for block in store["ragged"].blocks(2 * TENSOR_BYTES)] == [2, 2, 1]
    assert math.prod(store["ragged"].flat().shape) == 0
    assert list(store["ragged"].blocks(flat=True)) == []
