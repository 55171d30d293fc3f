"""Row ids: those that are known, and one that comes twice."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from activation_extractor._format._stored_rows import add_ids

BATCHES = st.lists(st.lists(st.integers(-20, 60), max_size=6), max_size=20)


@pytest.mark.parametrize("kind", [int, str, lambda one: f"é{one}" * 9], ids=["int", "str", "long"])
@given(BATCHES)
@settings(deadline=None, max_examples=25)
def test_the_first_id_that_comes_again_is_returned_and_its_batch_is_not_added(kind, batches):
    known, listed = set(), []
    for batch in batches:
        ids = [kind(one) for one in batch]
        expected = next((one for index, one in enumerate(ids) if one in listed + ids[:index]), None)
        assert add_ids(known, ids) == expected
        listed += ids if expected is None else []
        assert sorted(known) == sorted(map(str, listed))


@pytest.mark.parametrize("ids", [[], [""], ["", "\0", "\0\0"], ["a", "a\0"], [0, -1], [-(2**63), 2**63 - 1]])
def test_ids_that_only_look_alike_are_different(ids):
    known = set()
    assert add_ids(known, ids) is None
    assert add_ids(known, []) is None
    assert [add_ids(known, [one]) for one in ids] == ids


def test_an_integer_is_the_same_id_as_its_digits():
    known = set()
    assert add_ids(known, ["0", "1"]) is None
    assert add_ids(known, [2, 1]) == 1


def test_ids_may_come_one_by_one():
    known = set()
    assert add_ids(known, iter(["b", "a"])) is None
    assert add_ids(known, iter(["c", "a"])) == "a"
    assert known == {"a", "b"}
