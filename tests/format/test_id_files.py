"""Files of digests: what they say of ids, how few they are, and what of them is not believed."""

from __future__ import annotations

import numpy as np
import pytest
from safetensors.numpy import load_file

from activation_extractor._format import _id_files
from activation_extractor._format._id_files import IdFile, IdFiles
from activation_extractor._format._seen_ids import SeenIds
from activation_extractor.errors import StoreError


def digests(ids):
    seen = SeenIds()
    assert seen.add(ids) is None
    return seen.sorted()


def written(folder, *groups, units=None) -> IdFiles:
    files = IdFiles(folder, ())
    for number, ids in enumerate(groups):
        files.add(f"f{number}", [f"u{number}"] if units is None else units, digests(ids))
    return files


def names(folder) -> list[str]:
    return sorted(path.name for path in (folder / "ids").iterdir())


@pytest.mark.parametrize("count", [1, 2, 255, 256, 257, 5000])
@pytest.mark.parametrize("at_once", [1, 100_000])
def test_each_id_is_found_and_no_other(tmp_path, monkeypatch, count, at_once):
    monkeypatch.setattr(_id_files, "_BLOCK", 16)
    written(tmp_path, range(count))
    (path,) = (tmp_path / "ids").iterdir()
    file = IdFile(path)
    asked = np.array([digests([number])[0].ljust(16, b"\0") for number in range(-200, count)][::-1], dtype="S16")
    parts = [file.has(asked[at : at + at_once]) for at in range(0, len(asked), at_once)]
    assert np.concatenate(parts).tolist() == ([True] * count + [False] * 200)
    assert file.units == {"u0"}


def test_few_questions_read_little_and_many_read_the_whole_once(tmp_path, monkeypatch):
    written(tmp_path, range(20_000))
    files, read = IdFiles(tmp_path, ["u0"]), []
    read_at = _id_files.read_at
    monkeypatch.setattr(_id_files, "read_at", lambda *given: read.append(given[2]) or read_at(*given))
    assert files.has([5, "x", 19_999]) == [True, False, True]
    assert sum(read) <= 3 * 256 * 16
    for number in range(200):
        assert files.has([number, -1 - number]) == [True, False]
    assert read.count(20_000 * 16) == 1
    assert sum(read) < 3 * 20_000 * 16


def test_a_file_is_as_its_format_says_and_read_by_others(tmp_path):
    written(tmp_path, ["b", "a", "é"], units=["u0", "u1"])
    stored = load_file(tmp_path / "ids" / "f0.safetensors")
    assert stored["digests"].tobytes() == digests(["a", "b", "é"]).tobytes()
    assert stored["fences"].tobytes() == stored["digests"][:1].tobytes()
    assert stored["units"].tobytes() == b"u0\nu1"


def test_files_stay_few_however_often_ids_are_added(tmp_path):
    files = IdFiles(tmp_path, ())
    for number in range(100):
        files.add(f"f{number}", [f"u{number}"], digests(range(number * 10, number * 10 + 10)))
        assert len(names(tmp_path)) <= 6
    again = IdFiles(tmp_path, [f"u{number}" for number in range(101)])
    assert again.left == ["u100"]
    assert again.has(range(1001)) == [True] * 1000 + [False]


def test_a_file_that_names_a_unit_without_a_shard_is_not_used(tmp_path):
    written(tmp_path, ["a"], units=["u0", "u1"])
    assert IdFiles(tmp_path, ["u0", "u1"]).has(["a"]) == [True]
    files = IdFiles(tmp_path, ["u0", "u2"])
    assert files.left == ["u0", "u2"]
    assert files.has(["a"]) == [False]


@pytest.mark.parametrize("damage", ["cut", "header", "text", "link", "folder"])
def test_a_damaged_file_is_not_used(tmp_path, damage):
    written(tmp_path, range(300))
    path = tmp_path / "ids" / "f0.safetensors"
    content = path.read_bytes()
    if damage == "cut":
        path.write_bytes(content[:-9])
    elif damage == "header":
        path.write_bytes(content.replace(b'"300,16"', b'"300,16"').replace(b"[300,16]", b"[16,300]"))
    elif damage == "text":
        path.write_bytes(b"no header")
    else:
        path.unlink()
        (tmp_path / "other").write_bytes(content)
        path.symlink_to(tmp_path / "other") if damage == "link" else path.mkdir()
    files = IdFiles(tmp_path, ["u0"])
    assert files.left == ["u0"]
    assert files.has([1]) == [False]


def test_a_file_that_another_writer_replaces_is_read_on(tmp_path):
    written(tmp_path, range(1000))
    files = IdFiles(tmp_path, ["u0"])
    IdFiles(tmp_path, ["u0"]).add("f1", ["u1"], digests(range(1000, 2000)))
    assert names(tmp_path) == ["f1.safetensors"]
    assert files.has([7, 1500]) == [True, False]
    IdFiles(tmp_path, ["u0", "u1"]).add("f2", ["u2"], digests(range(2000, 3000)))
    files.add("f3", ["u3"], digests(range(3000, 4000)))
    last = IdFiles(tmp_path, ["u0", "u1", "u2", "u3"])
    assert last.left == []
    assert last.has(range(4001)) == [True] * 4000 + [False]


def test_a_disk_that_refuses_is_an_error_of_the_store(tmp_path):
    (tmp_path / "ids").touch()
    with pytest.raises(StoreError, match="must be"):
        written(tmp_path, [1])
