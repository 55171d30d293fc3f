"""Ids of rows."""

from __future__ import annotations

import json

import pytest
from sources import read, source_of

from activation_extractor.cli.inputs import BadRows, _ids
from activation_extractor.errors import ArgumentError


def ids_of(ids, **options):
    source = source_of("text", ["x"] * len(ids), ids=ids, **options)
    return [row.id for row in source], source.notes


def test_ids_that_look_like_numbers_stay_as_they_stand(tmp_path):
    (tmp_path / "x.csv").write_text("id,text\n007,a\n7,b\n1e5,c\n100000.0,d\n")
    assert read(tmp_path / "x.csv", id_column="id").ids == ["007", "7", "1e5", "100000.0"]


def test_integers_stay_integers_unless_one_is_too_large():
    assert ids_of([3, -(2**63), 2**63 - 1]) == ([3, -(2**63), 2**63 - 1], ())
    assert ids_of([3, 2**63]) == (["3", str(2**63)], ("Ids are kept as text: some are larger than 64 bits.",))


def test_integers_among_text_become_text():
    assert ids_of([3, "a"]) == (["3", "a"], ("Ids are kept as text: some are text.",))


@pytest.mark.parametrize("bad", [None, 1.0, float("nan"), True, [1], b"a", "", "  "])
def test_what_is_no_id_is_named(bad):
    with pytest.raises(ArgumentError, match=r"the id of row 2 must (be text or an integer|hold text), got"):
        ids_of(["a", bad, "c"])


@pytest.mark.parametrize("ids", [["a", "b", "a", "b"], [1, 2, 1, 2], ["1", "2", 1, 2]])
def test_an_id_that_comes_twice_is_named_with_both_rows_and_may_be_skipped(tmp_path, ids):
    text = rf"the id of row 3 must be its own, got {ids[2]!r}\. An earlier row has it: row 1\."
    with pytest.raises(ArgumentError, match=text):
        ids_of(ids)
    source = source_of("text", ["w", "x", "y", "z"], ids=ids, bad_rows=BadRows(tmp_path / "bad"))
    assert ([row.value for row in source], source.rows, source.characters) == (["w", "x"], 2, 2)
    assert [json.loads(line)["place"] for line in (tmp_path / "bad").read_text().splitlines()] == ["row 3", "row 4"]


def test_a_bad_row_takes_its_id_from_no_other(tmp_path):
    source = source_of("text", ["", "x"], ids=["a", "a"], bad_rows=BadRows(tmp_path / "bad"))
    assert [row.value for row in source] == ["x"]


def test_ids_with_one_digest_are_still_told_apart(monkeypatch):
    monkeypatch.setattr(_ids, "hash", len, raising=False)
    assert ids_of(["a", "b", "cc"]) == (["a", "b", "cc"], ())
