"""`SeenIds` against a plain set."""

from __future__ import annotations

import sys
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from activation_extractor._format import _seen_ids
from activation_extractor._format._seen_ids import SeenIds

BATCHES = st.lists(st.lists(st.integers(-20, 60), max_size=6), max_size=20)


@pytest.fixture
def small(monkeypatch) -> None:
    monkeypatch.setattr(_seen_ids, "_RECENT", 4)


def first_repeated(seen: set, ids: list):
    return next((one for index, one in enumerate(ids) if one in seen or one in ids[:index]), None)


@pytest.mark.parametrize("kind", [int, str, lambda one: f"é{one}" * 9], ids=["int", "str", "long"])
@pytest.mark.parametrize("recent", [1, 3, 8, 1 << 16])
@given(BATCHES)
@settings(deadline=None, max_examples=25)
def test_it_behaves_like_a_set_whatever_is_merged(recent, kind, batches):
    seen, model = SeenIds(), set()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_seen_ids, "_RECENT", recent)
        for batch in batches:
            ids = [kind(one) for one in batch]
            expected = first_repeated(model, ids)
            assert seen.add(ids) == expected
            if expected is None:
                model.update(ids)
        for one in [kind(one) for one in range(-20, 61)]:
            assert (seen.add([one]) == one) == (one in model)


@pytest.mark.usefixtures("small")
def test_a_refused_batch_notes_nothing():
    seen = SeenIds()
    seen.add(list(range(6)))  # these are settled
    seen.add([10])
    assert [seen.add([20, 21, known]) for known in (0, 5, 10, 20)] == [0, 5, 10, 20]
    assert seen.add([20, 21]) is None


def test_what_is_returned_is_the_first_id_that_comes_again_as_it_was_given():
    seen = SeenIds()
    assert seen.add(["b", "a", "b", "a"]) == "b"
    assert seen.add(["a", "b"]) is None
    assert seen.add(["c", "b", "a"]) == "b"
    assert seen.add((7, -7)) is None
    assert seen.add((8, -7)) == -7


@pytest.mark.parametrize("ids", [[], [""], ["", "\0", "\0\0"], ["a", "a\0"], [0, -0 - 1], [-(2**63), 2**63 - 1]])
def test_ids_that_only_look_alike_are_different(ids):
    seen = SeenIds()
    assert seen.add(ids) is None
    assert seen.add([]) is None
    assert [seen.add([one]) for one in ids] == ids


@pytest.mark.usefixtures("small")
def test_digests_that_end_in_zeros_are_told_apart(monkeypatch):
    endings = iter([b"a" + b"\0" * 15, b"a\0b" + b"\0" * 13, b"\0" * 16, b"\0" * 15 + b"a", b"b" * 16])

    class Digest:
        def __init__(self, *args, **kwargs) -> None: ...

        def digest(self) -> bytes:
            return next(endings)

    monkeypatch.setattr(_seen_ids, "blake2b", Digest)
    seen = SeenIds()
    assert seen.add([1, 2, 3, 4]) is None
    assert seen.add([5]) is None


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("batch", [1, 4, 50])
def test_settled_ids_take_sixteen_bytes_each_in_few_arrays(batch):
    seen = SeenIds()
    for start in range(0, 1000, batch):
        seen.add([f"a rather long id, number {one}" for one in range(start, start + batch)])
    sizes = [len(array) for array in seen._sorted]
    assert sum(sizes) + len(seen._recent) == 1000
    assert sum(array.nbytes for array in seen._sorted) == 16 * sum(sizes)
    assert all(one >= 2 * next_one for one, next_one in pairwise(sizes))
    assert len(seen._recent) < 4


def test_recent_ids_are_few():
    seen = SeenIds()
    for start in range(0, 200_000, 1000):
        seen.add(range(start, start + 1000))
    assert len(seen._recent) < 1 << 16
    assert sys.getsizeof(seen._recent) < 8 << 20
