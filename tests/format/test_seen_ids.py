"""Row ids: those that are known, and one that comes twice."""

from __future__ import annotations

import random
import subprocess
import sys
import tracemalloc
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from activation_extractor._format import _seen_ids
from activation_extractor._format._seen_ids import SeenIds, contains, digest_of, merged

BATCHES = st.lists(st.lists(st.integers(-20, 60), max_size=6), max_size=20)


@pytest.fixture(params=[1, 7, 2**16])
def recent(request, monkeypatch) -> int:
    """After how many ids they become a sorted array."""
    monkeypatch.setattr(_seen_ids, "_RECENT", request.param)
    return request.param


@pytest.mark.parametrize("kind", [int, str, lambda one: f"é{one}" * 9], ids=["int", "str", "long"])
@pytest.mark.parametrize("recent", [1, 5, 1000])
@given(BATCHES)
@settings(deadline=None, max_examples=25)
def test_the_first_id_that_comes_again_is_returned_and_its_batch_is_not_added(kind, recent, batches):
    known, listed = SeenIds(), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_seen_ids, "_RECENT", recent)
        for batch in batches:
            ids = [kind(one) for one in batch]
            expected = next((one for index, one in enumerate(ids) if one in listed + ids[:index]), None)
            assert known.add(ids) == expected
            listed += ids if expected is None else []
            assert len(known) == len(listed)
            asked = [kind(one) for one in range(-25, 65)]
            assert known.has(asked) == [one in listed for one in asked]
        assert known.sorted().tobytes() == b"".join(sorted(map(digest_of, listed)))


@pytest.mark.parametrize(
    "ids", [[], [""], ["", "\0", "\0\0"], ["a", "a\0"], [0, -1], [-(2**63), 2**63 - 1], ["\ud800"]]
)
def test_ids_that_only_look_alike_are_different(recent, ids):
    known = SeenIds()
    assert known.add(ids) is None
    assert known.add([]) is None
    assert [known.add([one]) for one in ids] == ids


def test_an_integer_is_the_same_id_as_its_digits():
    known = SeenIds()
    assert known.add(["0", "1"]) is None
    assert known.add([2, 1]) == 1


def test_ids_may_come_one_by_one():
    known = SeenIds()
    assert known.add(iter(["b", "a"])) is None
    assert known.add(iter(["c", "a"])) == "a"
    assert known.has(["a", "b", "c"]) == [True, True, False]


def test_digests_that_end_in_zeros_are_told_apart(monkeypatch, recent):
    digests = [bytes([1]) + bytes(15), bytes(16), bytes([1, 0, 1]) + bytes(13), b"\xff" * 16]
    monkeypatch.setattr(_seen_ids, "digest_of", digests.__getitem__)
    known = SeenIds()
    for number in range(3):
        assert known.has(range(4)) == [other < number for other in range(4)]
        assert known.add([number]) is None
        assert known.add([number]) == number


def test_a_digest_is_the_same_in_every_process():
    program = "from activation_extractor._format._seen_ids import digest_of; print(digest_of('row 1').hex())"
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert ended.stdout.strip() == digest_of("row 1").hex() == "8216aeab6f7e2ebd907d65090f081d9f"


def test_sorted_arrays_are_few_and_each_is_much_longer_than_the_next(monkeypatch):
    monkeypatch.setattr(_seen_ids, "_RECENT", 10)
    known = SeenIds()
    for number in range(0, 5000, 5):
        assert known.add(range(number, number + 5)) is None
        lengths = [*map(len, known._sorted)]
        assert all(longer > 4 * shorter for longer, shorter in pairwise(lengths))
    assert len(lengths) <= 4
    assert known.has(range(5001)) == [True] * 5000 + [False]


def test_many_ids_take_little_memory():
    tracemalloc.start()
    known = SeenIds()
    for number in range(0, 400_000, 4000):
        known.add([f"a rather long name of row {row}" for row in range(number, number + 4000)])
    size, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert size < 400_000 * 16 + 65_536 * 150


def test_what_is_in_an_array_is_found_whatever_the_order_of_the_questions():
    digests = [digest_of(number) for number in range(1000)]
    run = merged([np.sort(np.array(digests[::2], dtype="S16"))])
    asked = list(range(1000))
    random.Random(0).shuffle(asked)
    found = contains(run, np.array([digests[number] for number in asked], dtype="S16"))
    assert found.tolist() == [number % 2 == 0 for number in asked]
