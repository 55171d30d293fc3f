"""Journals: a cache of what shards hold, believed only where it is well formed."""

from __future__ import annotations

import json
import os
import stat

import pytest

from activation_extractor import _storage
from activation_extractor._format._journal import Journal, JournalRecord, read_records
from activation_extractor.errors import StoreError


def append(folder, writer: str, record: dict) -> None:
    Journal(folder, writer).add(JournalRecord.from_json(record))


def read(folder) -> dict[str, dict]:
    return {unit: record.to_json() for unit, record in read_records(folder).items()}


def record(unit: str = "00000000", **others) -> dict:
    return {"unit": unit, "rows": 3, "bytes": 100, "seal": "0a1b2c3d", **others}


def lines(*records: object) -> bytes:
    return b"".join(json.dumps(one).encode() + b"\n" for one in records)


@pytest.fixture
def journal(tmp_path):
    (tmp_path / "journal").mkdir()
    return tmp_path / "journal" / "w.jsonl"


def test_a_record_is_a_line_of_json(tmp_path):
    told = [record("00000000"), record("00000001", counts={"h.0:mean": 2, "é\n:mean": 3})]
    told.append(record("00000002", data="3 0 1 0 3 - 0a1b2c3d"))
    for one in told:
        append(tmp_path, "w", one)
    (path,) = (tmp_path / "journal").iterdir()
    assert path.name == "w.jsonl"
    assert path.read_bytes().endswith(b"}\n")
    assert [json.loads(line) for line in path.read_bytes().splitlines()] == told
    assert read(tmp_path) == {one["unit"]: one for one in told}


def test_each_writer_has_a_file_of_its_own_and_all_are_read(tmp_path):
    for writer in "ba":
        for number in range(3):
            append(tmp_path, writer, record(f"{writer}-{number}"))
    assert sorted(path.name for path in (tmp_path / "journal").iterdir()) == ["a.jsonl", "b.jsonl"]
    assert sorted(read(tmp_path)) == ["a-0", "a-1", "a-2", "b-0", "b-1", "b-2"]


def test_a_later_line_of_the_same_unit_wins(tmp_path):
    for rows in (1, 2, 5):
        append(tmp_path, "w", record(rows=rows))
    assert read(tmp_path) == {"00000000": record(rows=5)}


def test_each_line_is_on_the_disk_when_it_is_said_to_be(tmp_path, monkeypatch):
    synced, fsync = [], os.fsync

    def noted(descriptor: int) -> None:
        status = os.fstat(descriptor)
        synced.append("folder" if stat.S_ISDIR(status.st_mode) else status.st_size)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", noted)
    append(tmp_path, "w", record())
    size = len(lines(record()))
    assert synced == [size, "folder"]
    append(tmp_path, "w", record())
    assert synced == [size, "folder", 2 * size]


@pytest.mark.parametrize("torn", [1, 20, -2])
def test_a_torn_last_line_is_passed_over(journal, torn):
    journal.write_bytes(lines(record("0"), record("1")) + lines(record("2"))[:torn])
    assert sorted(read(journal.parent.parent)) == ["0", "1"]


def test_a_whole_last_line_without_its_end_is_read(journal):
    journal.write_bytes(lines(record("0"), record("1"))[:-1])
    assert sorted(read(journal.parent.parent)) == ["0", "1"]


@pytest.mark.parametrize(
    "garbage",
    [
        b"\xff\xfe\0",
        b"",
        b"  ",
        b"{",
        b"[" * 100_000,
        b"9" * 5000,
        b"null",
        b"3",
        b'"text"',
        b"[]",
        b"{}",
        b"not json",
        b'{"unit": "1"},',
        b"nan",
    ],
    ids=lambda line: repr(line[:8]),
)
def test_a_line_that_is_no_record_is_passed_over(journal, garbage):
    journal.write_bytes(lines(record("0")) + garbage + b"\n" + lines(record("2")))
    assert sorted(read(journal.parent.parent)) == ["0", "2"]


@pytest.mark.parametrize(
    "wrong",
    [
        {"unit": 1},
        {"unit": None},
        {"unit": ["0"]},
        {"seal": 5},
        {"seal": None},
        {"rows": -1},
        {"rows": "3"},
        {"rows": 3.0},
        {"rows": True},
        {"rows": None},
        {"bytes": -1},
        {"bytes": 1.5},
        {"bytes": None},
        {"counts": None},
        {"counts": [1]},
        {"counts": {"h.0:mean": -1}},
        {"counts": {"h.0:mean": "3"}},
        {"counts": {"h.0:mean": True}},
        {"data": [1]},
        {"data": {"items": 3}},
        {"data": 3},
    ],
    ids=str,
)
def test_a_record_with_a_member_of_another_type_is_passed_over(journal, wrong):
    journal.write_bytes(lines({**record("1"), **wrong}, record("2")))
    assert list(read(journal.parent.parent)) == ["2"]


@pytest.mark.parametrize("missing", ["unit", "rows", "bytes", "seal"])
def test_a_record_without_a_member_is_passed_over(journal, missing):
    incomplete = {key: value for key, value in record("1").items() if key != missing}
    journal.write_bytes(lines(incomplete, record("2")))
    assert list(read(journal.parent.parent)) == ["2"]


def test_garbage_in_one_journal_does_not_spoil_another(journal):
    journal.write_bytes(b"[[[\n" + lines(record("0")))
    (journal.parent / "x.jsonl").write_bytes(lines(record("1")))
    (journal.parent / "y.txt").write_bytes(lines(record("2")))
    assert sorted(read(journal.parent.parent)) == ["0", "1"]


def test_no_journal_and_an_empty_one_say_nothing(tmp_path, journal):
    assert read(tmp_path / "missing") == {}
    assert read(tmp_path) == {}
    journal.touch()
    assert read(tmp_path) == {}


def test_a_file_in_place_of_the_journals_says_nothing(tmp_path):
    (tmp_path / "journal").write_bytes(lines(record()))
    assert read(tmp_path) == {}
    with pytest.raises(StoreError, match="must be writable, got File exists"):
        append(tmp_path, "w", record())


def test_a_link_a_folder_and_a_pipe_are_not_read(tmp_path, journal):
    (tmp_path / "elsewhere").write_bytes(lines(record("1")))
    journal.symlink_to(tmp_path / "elsewhere")
    (journal.parent / "x.jsonl").mkdir()
    os.mkfifo(journal.parent / "y.jsonl")
    append(tmp_path, "z", record("0"))
    assert list(read(tmp_path)) == ["0"]


def test_a_link_is_not_written_through(tmp_path, journal):
    (tmp_path / "elsewhere").touch()
    journal.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(StoreError, match=r"w.jsonl' must be writable, got Too many.*\. The shard is complete; make"):
        append(tmp_path, "w", record())
    assert (tmp_path / "elsewhere").read_bytes() == b""


def test_many_records_are_read_as_they_were_written(journal):
    told = [record(f"{number:08d}", rows=number) for number in range(2000)]
    journal.write_bytes(lines(*told))
    assert list(read(journal.parent.parent).values()) == told


def test_in_a_bucket_many_records_are_read_by_few_requests(bucket):
    pytest.importorskip("obstore", reason="the extra 'remote' is not installed")
    store = _storage.located("s3://bucket/store")
    journal = Journal(store, "20260101T000000000000-00000000")
    for number in range(1000):
        journal.add(JournalRecord(f"{number:08d}", 8, 100, "0"))
    journal.close()
    bucket.requests.clear()
    assert len(read_records(store)) == 1000
    assert bucket.count("GET") <= 8  # the listing among them
    assert len(bucket.objects) <= 16
    assert sum(map(len, bucket.objects.values())) < 6 * 1000 * 70
