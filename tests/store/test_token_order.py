"""The order of tokens: each once an epoch, over any ranks and workers; the same order for the same seed, for ever."""

from __future__ import annotations

import zlib
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from activation_extractor.store._token_order import Order, Permutation, turns

small = st.integers(1, 40)


def handed_out(order: Order, epoch: int = 0, first: int = 0) -> list[int]:
    """The tokens of an epoch, in the order in which they are handed out."""
    tokens = []
    for window in order.windows(epoch, first, epoch + 1):
        read = [token for run in window.runs(0, len(window)) for token in range(run[0], sum(run))]
        assert len(read) == len(window) <= order.most_buffered
        tokens += [read[place] for place in window.served.tolist()]
    return tokens


@given(st.integers(1, 3000), st.integers(0, 2**70))
def test_a_permutation_has_each_index_once(size, key):
    assert sorted(Permutation(size, key).first(size).tolist()) == list(range(size))


def test_a_permutation_of_four_comes_in_each_of_its_orders_about_equally_often():
    orders = Counter(tuple(Permutation(4, key).first(4).tolist()) for key in range(4800))
    assert len(orders) == 24
    assert min(orders.values()) > 150
    assert max(orders.values()) < 250


def test_a_long_permutation_looks_random():
    order = Permutation(100_000, 1).first(100_000)
    assert abs(np.corrcoef(order, np.arange(100_000))[0, 1]) < 0.02
    assert abs(np.corrcoef(order[1:], order[:-1])[0, 1]) < 0.02


def test_orders_are_the_same_in_every_release():
    # A checkpoint that is older than the library must go on with the same batches: never change these numbers.
    assert Permutation(10, 0).first(10).tolist() == [9, 6, 5, 3, 7, 2, 4, 1, 8, 0]
    order = Order(1000, 16, 7, 100, seed=5, stream=1, streams=3)
    assert handed_out(order, 2)[:8] == [785, 812, 592, 507, 264, 783, 363, 364]
    assert zlib.crc32(np.array(handed_out(order, 0), "<i8").tobytes()) == 3813078095


@settings(deadline=None)
@given(st.integers(1, 300), small, small, small, st.integers(1, 7), st.integers(), st.integers(0, 3))
def test_all_streams_together_have_each_token_once(tokens, batch, block, buffered, streams, seed, epoch):
    orders = [Order(tokens, batch, block, buffered, seed, stream, streams, False) for stream in range(streams)]
    got = [token for order in orders if order.count for token in handed_out(order, epoch)]
    assert sorted(got) == list(range(tokens))
    assert max(order.count for order in orders) - min(order.count for order in orders) <= 1
    assert [order.count for order in orders] == sorted((order.count for order in orders), reverse=True)


@settings(deadline=None)
@given(st.integers(1, 300), small, small, small, st.integers(1, 7), st.integers(0, 3))
def test_with_whole_batches_alone_all_streams_have_equally_many(tokens, batch, block, buffered, streams, epoch):
    orders = [Order(tokens, batch, block, buffered, 1, stream, streams, True) for stream in range(streams)]
    assert {order.batches for order in orders} == {tokens // streams // batch}
    got = [token for order in orders if order.count for token in handed_out(order, epoch)]
    assert len(set(got)) == len(got) == tokens // streams // batch * batch * streams


@settings(deadline=None)
@given(st.integers(1, 300), small, small, st.data())
def test_what_is_needed_after_some_were_handed_out_holds_all_that_is_left(tokens, block, buffered, data):
    order = Order(tokens, 1, block, buffered, 3)
    for window in order.windows(0, 0, 1):
        gone = data.draw(st.integers(0, len(window) - 1))
        needed = {place for span in window.needed(gone) for place in range(*span)}
        assert needed >= set(window.served[gone:].tolist())
        runs = [range(end - count, end) for end, count in zip(window.ends, window.counts, strict=True)]
        unneeded = [run for run in runs if not set(run) & set(window.served[gone:].tolist())]
        assert not needed & {place for run in unneeded for place in run}


def test_epochs_and_seeds_have_orders_of_their_own():
    order = Order(500, 10, 5, 100)
    orders = [handed_out(order, 0), handed_out(order, 1), handed_out(Order(500, 10, 5, 100, seed=1), 0)]
    for one in orders:
        assert sum(a == b for other in orders if other is not one for a, b in zip(one, other, strict=True)) < 25


def in_turn(counts, passes):
    for _ in range(passes):
        left = list(counts)
        while any(left):
            for worker in range(len(left)):
                if left[worker]:
                    left[worker] -= 1
                    yield worker


@given(st.integers(1, 5), st.integers(1, 4), st.integers(0, 4), st.data())
def test_the_workers_of_a_loader_go_on_where_those_before_them_stood(workers, least, more, data):
    counts = [least + (worker < min(more, workers - 1)) for worker in range(workers)]
    sequence = list(in_turn(counts, 2))
    handed_out = data.draw(st.integers(0, len(sequence) - 1))
    found = turns(handed_out, workers, counts)
    assert sorted(worker for worker, _, _ in found) == list(range(workers))
    for worker, had, begun in found:
        assert had == sequence[:handed_out].count(worker)
        assert begun == max(1, -(-handed_out // sum(counts)))
    if handed_out % sum(counts):
        assert found[0][0] == sequence[handed_out]


@given(st.integers(0, 100), st.integers(1, 5))
def test_the_workers_of_an_endless_loader_go_on_in_turn(handed_out, workers):
    found = turns(handed_out, workers, None)
    assert [worker for worker, _, _ in found] == [(handed_out + place) % workers for place in range(workers)]
    assert sum(had for _, had, _ in found) == handed_out


@pytest.mark.parametrize("counts", [[0], [0, 0]])
def test_workers_without_a_batch_have_none(counts):
    assert turns(0, len(counts), counts) == [(worker, 0, 1) for worker in range(len(counts))]
