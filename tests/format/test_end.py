"""The end of a data set: written once, the furthest one counts, and a damaged one is an error."""

from __future__ import annotations

import json

import pytest

from activation_extractor._format._end import End, is_own, read_end, write_end
from activation_extractor.errors import StoreError


def test_an_end_says_how_many_units_and_rows_there_are_and_is_never_changed(tmp_path):
    assert read_end(tmp_path) is None
    assert write_end(tmp_path, 12, 45000)
    (path,) = tmp_path.iterdir()
    content = {"format": "activation_extractor end", "version": 1, "units": 12, "rows": 45000}
    assert (path.name, json.loads(path.read_text())) == ("end.json", content)
    assert not write_end(tmp_path, 12, 45000)
    assert not write_end(tmp_path, 11, 44000)
    assert read_end(tmp_path) == End(12, 45000)
    assert json.loads(path.read_text()) == content


def test_a_store_that_grew_has_a_further_end_and_the_one_with_the_most_units_counts(tmp_path):
    for units in (2, 9, 10):
        assert write_end(tmp_path, units, units * 3)
    assert {path.name for path in tmp_path.iterdir()} == {"end.json", "end-9.json", "end-10.json"}
    assert read_end(tmp_path) == End(10, 30)
    assert not write_end(tmp_path, 9, 27)


def test_nothing_else_in_the_folder_is_an_end(tmp_path):
    names = ["end-.json", "end-01.json", "end-2.json.bak", "ends.json", "end-1234567890.json", ".end.json"]
    for name in names:
        (tmp_path / name).write_text("{}")
    assert read_end(tmp_path) is None
    assert not any(map(is_own, names))
    own = ["manifest.json", "shards", "journal", "end.json", "end-7.json"]
    assert all(map(is_own, own))


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "must be readable, got JSONDecodeError"),
        ('{"format": "activation_extractor end", "version": 1, "units": 2', "must be readable, got JSONDecodeError"),
        ("[" * 100_000, "must be readable"),
        ("\udcff", "must be readable"),
        ("[]", "must say where a data set ends, got something else"),
        ('{"format": "other"}', "must say where a data set ends, got something else"),
        ('{"format": "activation_extractor end", "version": 2}', "of version 1, got version 2. Update"),
        *[
            (json.dumps({"format": "activation_extractor end", "version": 1, "units": 2, "rows": 3, **change}), told)
            for name in ("units", "rows")
            for change, told in [
                ({name: value}, f"must hold a number of {name}, got") for value in (-1, True, 1.0, "2", None, [], 2**63)
            ]
        ],
    ],
)
@pytest.mark.parametrize("name", ["end.json", "end-2.json"])
def test_a_damaged_end_is_an_error_that_says_what_to_do(tmp_path, text, told, name):
    (tmp_path / name).write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(StoreError, match=told) as caught:
        read_end(tmp_path)
    assert caught.value.path == tmp_path / name
    with pytest.raises(StoreError):
        write_end(tmp_path, 1, 1)
    assert "Delete it; running extract again" in str(caught.value) or "Update" in str(caught.value)


def test_an_end_with_another_number_of_units_than_its_name_is_an_error(tmp_path):
    assert write_end(tmp_path, 2, 2)
    assert write_end(tmp_path, 3, 3)
    (tmp_path / "end-3.json").rename(tmp_path / "end-4.json")
    with pytest.raises(StoreError, match="must hold the number of units that its name says, got 3"):
        read_end(tmp_path)


def test_a_link_or_a_folder_in_the_place_of_an_end_is_not_followed(tmp_path):
    write_end(tmp_path / ".", 2, 2)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "end.json").rename(tmp_path / "elsewhere" / "end.json")
    (tmp_path / "end.json").symlink_to(tmp_path / "elsewhere" / "end.json")
    with pytest.raises(StoreError, match="must be readable, got a link"):
        read_end(tmp_path)
    (tmp_path / "end.json").unlink()
    (tmp_path / "end.json").mkdir()
    with pytest.raises(StoreError, match="must be readable, got something else than a file"):
        read_end(tmp_path)


def test_a_folder_that_is_not_there_has_no_end(tmp_path):
    assert read_end(tmp_path / "nowhere") is None
