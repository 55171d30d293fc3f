"""Files that appear whole at a free name: what a bucket leaves open is asked again."""

from __future__ import annotations

import time

import pytest

from activation_extractor import _creation, _storage
from activation_extractor.errors import ArgumentError, ArgumentTypeError, StoreError

pytest.importorskip("obstore", reason="the extra 'remote' is not installed")

OBJECT = _storage.located("s3://bucket/a/b")


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch):
    monkeypatch.setattr(_creation, "_PAUSES", (0.0, 0.0))


def test_buffers_of_all_kinds_become_one_object_and_one_request(bucket):
    assert _creation.create(OBJECT, [b"head", memoryview(b"er"), bytearray(b""), b"body"])
    assert bucket.objects == {"a/b": b"headerbody"}
    assert bucket.requests == ["PUT /bucket/a/b "]
    assert not _creation.create(OBJECT, [b"other"])
    assert bucket.objects == {"a/b": b"headerbody"}


def test_a_conflict_is_no_sign_of_an_object(bucket):
    bucket.conflicts = 2
    assert _creation.create(OBJECT, [b"1"])
    assert bucket.objects == {"a/b": b"1"}


def test_conflicts_without_an_end_are_an_error(bucket):
    bucket.conflicts = 100
    with pytest.raises(StoreError, match="'s3://bucket/a/b' must be writable, got an object that is there, and is not"):
        _creation.create(OBJECT, [b"1"])
    assert bucket.conflicts == 97


def test_a_put_that_is_answered_too_late_is_looked_for(bucket, monkeypatch):
    late = iter([1.0])
    monkeypatch.setenv("AWS_TIMEOUT", "300ms")
    bucket.before = lambda method, key: time.sleep(next(late, 0.0))
    _creation.create(OBJECT, [b"1"])  # whether it was free is not known
    assert bucket.objects == {"a/b": b"1"}


def test_what_a_server_forbids_is_not_asked_again(bucket):
    bucket.before = lambda method, key: bucket.busy.update(PUT=1)
    with pytest.raises(
        StoreError, match="must be writable, got .*503 Service Unavailable.* Check the URL, the network"
    ):
        _creation.create(OBJECT, [b"1"])
    assert bucket.count("PUT") == 11  # obstore's own


def test_a_name_with_the_number_of_an_error_in_it_is_no_such_error(bucket):
    bucket.denied = {"PUT"}
    with pytest.raises(StoreError, match=r"'s3://bucket/run 501' must be writable, got .*403.* Check the URL"):
        _creation.create(_storage.located("s3://bucket/run 501"), [b"1"])


def test_what_is_larger_than_one_request_is_refused_before_it_is_sent(bucket, monkeypatch):
    monkeypatch.setattr(_creation, "_MOST_BYTES", 3)
    with pytest.raises(StoreError, match="must have at most 3 bytes, got 4. Make units smaller"):
        _creation.create(OBJECT, [b"12", b"34"])
    assert not bucket.requests


def test_places_are_told_from_folders():
    assert isinstance(_creation.check_place("out", "s3://a/b"), _storage.RemotePath)
    assert not isinstance(_creation.check_place("out", "a/b"), _storage.RemotePath)
    with pytest.raises(ArgumentTypeError, match="out must be a folder's path, got 3"):
        _creation.check_place("out", 3)
    with pytest.raises(ArgumentError, match="must begin with one of s3://"):
        _creation.check_place("out", "https://a/b")
    with pytest.raises(ArgumentError, match="must name a bucket"):
        _creation.check_place("out", "s3://")


def test_what_is_removed_need_not_be_there(bucket, tmp_path):
    for path in (OBJECT, tmp_path / "file"):
        _creation.create(path, [b"1"])
        assert _creation.exists(path)
        _creation.remove(path)
        assert not _creation.exists(path)
        _creation.remove(path)


def test_the_environment_says_how_long_a_put_may_take(bucket, monkeypatch):
    bucket.latency = 0.3
    monkeypatch.setenv("AWS_TIMEOUT", "100ms")
    with pytest.raises(StoreError, match="must be writable, got .*HTTP error"):
        _creation.create(OBJECT, [b"1"])
    monkeypatch.delenv("AWS_TIMEOUT")
    _storage._opened.cache_clear()
    assert _creation.create(_storage.located("s3://bucket/other"), [b"1"])
    assert not _creation.create(OBJECT, [b"1"])  # what was too late is there
