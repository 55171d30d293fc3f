"""Going on with batches of tokens where others stood: ``state_dict`` and ``load_state_dict``."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from token_stores import KEY, LENGTHS, MEAN, OTHER, numbers, token_store

from activation_extractor import SafetensorsSink, open_store
from activation_extractor.errors import ArgumentError
from activation_extractor.sinks import Step


@pytest.fixture(scope="module")
def plain_store():
    with tempfile.TemporaryDirectory() as folder:
        yield token_store(Path(folder))


@settings(deadline=None, max_examples=60)
@given(
    handed_out=st.integers(0, 30),
    batch_size=st.integers(1, 12),
    buffer_bytes=st.integers(1, 3000),
    block_bytes=st.integers(1, 200),
    shuffle=st.booleans(),
    drop_last=st.booleans(),
)
def test_it_goes_on_bit_equal_from_any_batch(plain_store, handed_out, **options):
    tokens, again = (plain_store.tokens(KEY, rows=True, seed=3, **options) for _ in range(2))
    for _ in range(handed_out):
        next(tokens)
    again.load_state_dict(tokens.state_dict())
    for _ in range(12):
        assert all(map(torch.equal, next(tokens), next(again)))
    assert tokens.state_dict() == again.state_dict()


def test_a_loop_that_is_left_goes_on_and_the_next_one_has_the_next_epoch(plain_store):
    whole = [numbers(batch) for batch in plain_store.tokens(KEY, batch_size=10, epochs=2)]
    tokens = plain_store.tokens(KEY, batch_size=10, epochs=1)
    found = []
    for batch in tokens:
        found.append(numbers(batch))
        if len(found) == 2:
            break
    found += [numbers(batch) for batch in tokens]
    with pytest.raises(StopIteration):
        next(tokens)
    assert found == whole[:4]
    again = plain_store.tokens(KEY, batch_size=10, epochs=1)
    again.load_state_dict(tokens.state_dict())
    for iterator in (tokens, again):
        assert [numbers(batch) for batch in iterator] == whole[4:]


def test_a_state_can_go_back(plain_store):
    tokens = plain_store.tokens(KEY, batch_size=10)
    state = tokens.state_dict()
    first = [next(tokens) for _ in range(6)]
    tokens.load_state_dict(state)
    assert all(torch.equal(next(tokens), batch) for batch in first)


@pytest.mark.parametrize(
    ("other", "text"),
    [
        ({"seed": 1}, r"state must have seed=1, got 0\. Load it into what the same arguments give"),
        ({"batch_size": 9}, "have batch_size=9, got 10"),
        ({"shuffle": False}, "have shuffle=False, got True"),
        ({"block_bytes": 100}, "have block=12, got 8192"),
        ({"rank": 0, "world": 2}, "have world=2, got 1"),
        ({"drop_last": False}, "have drop_last=False, got True"),
    ],
)
def test_a_state_of_another_order_is_refused(plain_store, other, text):
    state = plain_store.tokens(KEY, batch_size=10).state_dict()
    with pytest.raises(ArgumentError, match=text):
        plain_store.tokens(KEY, **{"batch_size": 10, **other}).load_state_dict(state)


def test_a_state_of_other_data_is_refused(plain_store, tmp_path):
    state = plain_store.tokens(KEY, batch_size=10).state_dict()
    with pytest.raises(ArgumentError, match=r"have keys=\[.*'b'"):
        plain_store.tokens(OTHER, batch_size=10).load_state_dict(state)
    with pytest.raises(ArgumentError, match="have tokens=46, got 43"):
        token_store(tmp_path, (*LENGTHS, 3)).tokens(KEY, batch_size=10).load_state_dict(state)
    values = {"one": torch.zeros(6, 2), "other": torch.ones(6, 2)}
    for name, value in values.items():
        sink = SafetensorsSink(tmp_path / name)
        sink.write(Step(0, 6, {("a", "mean"): value}))
        sink.close()
    one, other = (open_store(tmp_path / name).batches(batch_size=2) for name in values)
    with pytest.raises(ArgumentError, match="have data="):
        other.load_state_dict(one.state_dict())
    for name, value in (("batches", -3), ("batches", "3"), ("workers", None)):
        with pytest.raises(ArgumentError, match=f"{name} must be how many there were"):
            plain_store.tokens(KEY, batch_size=10).load_state_dict({**state, name: value})
    for nothing in ({}, None, {"batches": 3}, {name: part for name, part in state.items() if name != "batches"}):
        with pytest.raises(ArgumentError, match=r"state must be what state_dict\(\) returned"):
            plain_store.tokens(KEY, batch_size=10).load_state_dict(nothing)


def test_statistics_go_on_with_a_state(plain_store):
    tokens, again = (plain_store.tokens(MEAN, batch_size=3, statistics=True) for _ in range(2))
    next(tokens), next(tokens)
    again.load_state_dict(tokens.state_dict())
    next(tokens), next(again)
    assert again.statistics.tokens == tokens.statistics.tokens == 9
    assert torch.equal(again.statistics.mean, tokens.statistics.mean)
    with pytest.raises(ArgumentError, match="statistics must be True"):
        plain_store.tokens(MEAN, batch_size=3).statistics  # noqa: B018
    with pytest.raises(ArgumentError, match="have statistics"):
        again.load_state_dict(plain_store.tokens(MEAN, batch_size=3).state_dict())
