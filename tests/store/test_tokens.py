"""Batches of single tokens: `Store.tokens`."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from token_stores import IDS, KEY, LENGTHS, MEAN, OTHER, numbers, token_store
from torch import nn

from activation_extractor import NpySink, NpzSink, SafetensorsSink, extract, open_store
from activation_extractor.errors import ActivationNotFoundError, ArgumentError, StoreError
from activation_extractor.sinks import Step
from activation_extractor.store import Batches

COUNT = sum(LENGTHS)
SMALL = {"buffer_bytes": 1200, "block_bytes": 24}  # blocks of three tokens, some fifteen tokens in the buffer


@pytest.fixture(scope="module", params=[SafetensorsSink, NpySink, NpzSink])
def store(request):
    with tempfile.TemporaryDirectory() as folder:
        yield token_store(Path(folder), sink=request.param)


@pytest.fixture(scope="module")
def plain_store():
    with tempfile.TemporaryDirectory() as folder:
        yield token_store(Path(folder))


def test_tokens_come_in_whole_batches_in_the_dtype_on_disk(store):
    tokens = store.tokens(KEY, batch_size=10, epochs=1, **SMALL)
    assert isinstance(tokens, Batches)
    batches = list(tokens)
    assert [(tuple(batch.shape), batch.dtype) for batch in batches] == [((10, 2), torch.float32)] * 4
    assert len({number for batch in batches for number in numbers(batch)}) == 40
    assert (tokens.batches_per_epoch, tokens.tokens_per_epoch) == (4, 40)


@pytest.mark.parametrize("shuffle", [True, False])
def test_each_token_comes_once_an_epoch(store, shuffle):
    tokens = store.tokens(KEY, batch_size=10, epochs=2, shuffle=shuffle, drop_last=False, **SMALL)
    batches = list(tokens)
    assert [len(batch) for batch in batches] == [10, 10, 10, 10, 3] * 2
    for epoch in (torch.cat(batches[:5]), torch.cat(batches[5:])):
        assert torch.equal(epoch[:, 0], -epoch[:, 1])
        assert sorted(numbers(epoch)) == list(range(COUNT))
        assert (numbers(epoch) == list(range(COUNT))) is not shuffle


def test_it_is_endless_by_default_and_each_epoch_has_another_order(plain_store):
    tokens = plain_store.tokens(KEY, batch_size=43)
    epochs = [numbers(next(tokens)) for _ in range(4)]
    assert [sorted(epoch) for epoch in epochs] == [list(range(COUNT))] * 4
    assert len(set(map(tuple, epochs))) == 4


def test_the_seed_says_the_order(plain_store):
    first, again, other = (
        torch.cat(list(plain_store.tokens(KEY, batch_size=9, seed=seed, epochs=1))) for seed in (1, 1, 2)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_several_keys_are_stacked_token_by_token(store):
    for batch in store.tokens(KEY, OTHER, batch_size=7, epochs=1, drop_last=False, **SMALL):
        assert batch.shape[1:] == (2, 2)
        assert torch.equal(batch[:, 1], batch[:, 0] + 0.5)


def test_what_belongs_to_tokens_and_rows_comes_beside(store):
    row_of = torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS))
    arguments = {"rows": True, "beside": [IDS, OTHER], "keep": ["label", "text"]}
    for shuffle in (True, False):
        tokens = store.tokens(KEY, batch_size=7, epochs=1, drop_last=False, shuffle=shuffle, **arguments, **SMALL)
        for batch in tokens:
            assert isinstance(batch, tuple)
            values, rows, ids, other, labels, texts = batch
            assert torch.equal(ids, 10 * values[:, 0].long())
            assert torch.equal(other, values + 0.5)
            assert torch.equal(rows, row_of[values[:, 0].long()])
            assert torch.equal(labels, 100 * rows)
            assert texts == [str(row) for row in rows.tolist()]
            assert [store.ids[row] for row in rows.tolist()] == [f"id{row}" for row in rows.tolist()]


@pytest.mark.parametrize("beside", [IDS, [IDS]])
def test_one_column_beside_needs_no_list(plain_store, beside):
    values, ids = next(plain_store.tokens(KEY, batch_size=7, beside=beside))
    assert torch.equal(ids, 10 * values[:, 0].long())


def test_a_dense_column_has_a_token_in_each_row_or_each_position_of_it(tmp_path):
    model = nn.Sequential(nn.Linear(2, 4), nn.ReLU())
    inputs = torch.randn(6, 5, 2)
    batches = [{"input": inputs, "ids": torch.arange(30).view(6, 5), "label": torch.arange(6)}]
    store = extract(
        model, batches, "0", out=tmp_path / "out", reduce=["full", "mean"], keep=["ids", "label"], progress=False
    )
    tokens = store.tokens(("0", "full"), batch_size=30, beside="ids", rows=True, keep="label")
    values, rows, ids, labels = next(tokens)
    with torch.no_grad():
        assert torch.allclose(values, model[0](inputs).reshape(30, 4)[ids])
    assert torch.equal(rows, ids // 5)
    assert torch.equal(labels, rows)
    (means,) = store.tokens(("0", "mean"), batch_size=6, epochs=1)
    assert torch.equal(means.sort(dim=0).values, store["0", "mean"][:].sort(dim=0).values)


def test_rows_without_an_axis_of_features_are_tokens_of_one_number(plain_store):
    assert sorted(next(plain_store.tokens(IDS, batch_size=43)).tolist()) == list(range(0, 430, 10))


@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float16, torch.bool, torch.int8, torch.complex64, torch.float8_e4m3fn]
)
def test_any_dtype_comes_as_it_is_stored(tmp_path, dtype):
    values = torch.randint(0, 2, (20, 3)).to(dtype)
    sink = SafetensorsSink(tmp_path / "out")
    sink.write(Step(0, 20, {("a", "mean"): values}))
    sink.close()
    batch, rows = next(open_store(tmp_path / "out").tokens("a", batch_size=20, rows=True, block_bytes=1))
    assert batch.dtype == dtype
    assert torch.equal(batch.view(torch.uint8), values[rows].view(torch.uint8))


@settings(deadline=None, max_examples=40)
@given(
    world=st.integers(1, 4),
    batch_size=st.integers(1, 12),
    buffer_bytes=st.integers(1, 3000),
    block_bytes=st.integers(1, 200),
    seed=st.integers(),
    shuffle=st.booleans(),
)
def test_ranks_have_disjoint_parts_that_are_complete(plain_store, world, **options):
    options |= {"epochs": 2, "world": world, "drop_last": False}
    parts = [plain_store.tokens(KEY, rank=rank, **options) for rank in range(world)]
    assert sorted(number for part in parts for batch in part for number in numbers(batch)) == sorted(
        [*range(COUNT)] * 2
    )


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"batch_size": 0}, ArgumentError, "batch_size must be a positive integer"),
        (
            {"batch_size": 44},
            ArgumentError,
            r"batch_size must be at most the number of tokens .* 43, got 44\. .*drop_last",
        ),
        ({"batch_size": 22, "rank": 1, "world": 2}, ArgumentError, "of each of 2 ranks, 21, got 22"),
        ({"buffer_bytes": "1"}, ArgumentError, "buffer_bytes must be a positive integer"),
        ({"block_bytes": -1}, ArgumentError, "block_bytes must be a positive integer"),
        ({"epochs": 0}, ArgumentError, "epochs must be a positive integer"),
        ({"seed": 0.5}, ArgumentError, "seed must be an integer"),
        ({"shuffle": 1}, ArgumentError, "shuffle must be True or False"),
        ({"rows": "row"}, ArgumentError, "rows must be True or False"),
        ({"rank": 2, "world": 2}, ArgumentError, "rank must be a number from 0 to 1"),
        ({"rank": 0}, ArgumentError, "world must be a positive integer"),
        ({"world": 2}, ArgumentError, "rank must be a number from 0 to 1"),
        ({"device": "quantum"}, ArgumentError, "device must be a device that torch knows, got 'quantum'"),
        ({"beside": "nothing"}, ActivationNotFoundError, "Nothing is recorded under 'nothing'"),
        ({"beside": "text"}, ArgumentError, r"beside must be columns of numbers, got 'text'\. .* keep='text'"),
        ({"beside": MEAN}, StoreError, "belong to the other columns token by token"),
        ({"keep": "lable"}, ActivationNotFoundError, "A kept column must be one of 'label', 'text'"),
    ],
)
def test_what_cannot_be_is_refused_at_once(plain_store, arguments, error, text):
    with pytest.raises(error, match=text):
        plain_store.tokens(KEY, **{"batch_size": 10, **arguments})


def test_keys_of_other_shapes_are_refused_with_a_way_out(plain_store):
    with pytest.raises(StoreError, match=r"belong to the other columns token by token"):
        plain_store.tokens(KEY, MEAN, batch_size=10)
    with pytest.raises(StoreError, match=r"like the first column, .* Ask for it with beside=\('ids', 'full'\)"):
        plain_store.tokens(KEY, IDS, batch_size=10)
    next(plain_store.tokens(KEY, beside=("ids", "full"), batch_size=10))  # as the text advises


def test_rows_of_as_many_tokens_together_and_other_lengths_are_refused(tmp_path):
    one, other = token_store(tmp_path / "one", (2, 1)), token_store(tmp_path / "other", (1, 2))
    # A store whose two columns have one number of positions, and rows of other lengths.
    from activation_extractor._format._stored_rows import Ragged

    sink = SafetensorsSink(tmp_path / "out")
    columns = {name: Ragged(torch.randn(3, 2), part[KEY].lengths()) for name, part in ((KEY, one), (OTHER, other))}
    sink.write(Step(0, 2, columns))
    sink.close()
    with pytest.raises(StoreError, match="token by token, got other rows or lengths"):
        open_store(tmp_path / "out").tokens(KEY, OTHER, batch_size=2)


def test_images_have_no_tokens(tmp_path):
    store = extract(nn.Conv2d(3, 4, 1), [torch.randn(2, 3, 5, 5)], "", out=tmp_path / "out", progress=False)
    with pytest.raises(
        StoreError, match=r"have rows of \(features,\) or \(seq, features\), got more axes\. Ask store\.batches"
    ):
        store.tokens(batch_size=2)
    assert next(store.batches(batch_size=2)).shape == (2, 4, 5, 5)  # as the text advises


def test_ranks_are_those_of_torchrun(plain_store, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "3")
    found = list(plain_store.tokens(KEY, batch_size=5, epochs=1))
    assert torch.equal(
        torch.cat(found), torch.cat(list(plain_store.tokens(KEY, batch_size=5, epochs=1, rank=1, world=3)))
    )


def test_it_shows_what_it_is(plain_store):
    tokens = plain_store.tokens(KEY, batch_size=10)
    next(tokens)
    assert repr(tokens) == "Batches(('a', 'full'): 43 in batches of 10, 1 handed out)"


def test_statistics_are_summed_up_on_the_way(plain_store):
    tokens = plain_store.tokens(KEY, OTHER, batch_size=10, drop_last=False, statistics=True)
    assert tokens.statistics is None
    seen = torch.cat([next(tokens) for _ in range(3)]).double()
    for count in (30, COUNT, COUNT):
        found = tokens.statistics
        assert found.tokens == count == len(seen)
        assert torch.allclose(found.mean, seen.mean(0))
        assert torch.allclose(found.std, seen.std(0, correction=0))
        assert torch.allclose(found.mean_norm, seen.norm(dim=-1).mean(0))
        more = torch.cat([next(tokens) for _ in range(2)]).double()
        seen = torch.cat([seen, more]) if count == 30 else seen
