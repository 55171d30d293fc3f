"""The tests' own S3 server, by obstore itself: what a store may rely on, and what really happens when things fail."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import pytest
from s3_server import serving

obstore = pytest.importorskip("obstore", reason="the extra 'remote' is not installed")

AlreadyExistsError, GenericError = obstore.exceptions.AlreadyExistsError, obstore.exceptions.GenericError

BRIEFLY = {"init_backoff": timedelta(milliseconds=1), "max_backoff": timedelta(milliseconds=5), "base": 2}


def store_at(url, **options):
    retries = {"max_retries": 2, "retry_timeout": timedelta(seconds=60), "backoff": BRIEFLY}
    return obstore.store.S3Store(
        "bucket",
        endpoint=url,
        access_key_id="x",
        secret_access_key="y",
        region="us-east-1",
        client_options={"allow_http": True, **options},
        retry_config=retries,
    )


@pytest.fixture
def served():
    with serving() as (bucket, url):
        yield bucket, store_at(url)


def create(store, key, data):
    return obstore.put(store, key, data, mode="create", use_multipart=False)


def test_an_object_is_created_once_and_its_first_bytes_stay(served):
    bucket, store = served
    parts = [b"head", memoryview(bytearray(b"body")), b""]
    assert create(store, "a/b c+d%é", parts)["e_tag"] == obstore.head(store, "a/b c+d%é")["e_tag"]
    with pytest.raises(AlreadyExistsError):
        create(store, "a/b c+d%é", b"other")
    assert bucket.objects == {"a/b c+d%é": b"headbody"}
    assert (bucket.count("PUT"), bucket.count("HEAD")) == (2, 1)
    obstore.put(store, "a/b c+d%é", b"other")
    assert bytes(obstore.get(store, "a/b c+d%é").bytes()) == b"other"
    assert bytes(obstore.get(store, "a/b c+d%é", options={"range": {"suffix": 2}}).bytes()) == b"er"
    assert bytes(obstore.get(store, "a/b c+d%é", options={"range": {"offset": 3}}).bytes()) == b"er"


def test_of_eight_creations_at_once_exactly_one_wins(served):
    bucket, store = served

    def attempt(job):
        key, writer = job
        try:
            create(store, f"{key}", [writer.to_bytes(1, "big"), bytes(5000)])
        except AlreadyExistsError:
            return None
        return job

    with ThreadPoolExecutor(8) as pool:
        won = list(filter(None, pool.map(attempt, [(key, writer) for key in range(20) for writer in range(8)])))
    assert sorted(key for key, _ in won) == list(range(20))
    assert all(bucket.objects[f"{key}"] == writer.to_bytes(1, "big") + bytes(5000) for key, writer in won)


def test_objects_are_listed_in_pages_and_deleted(served):
    bucket, store = served
    bucket.page = 3
    for number in range(10):
        create(store, f"a/{number}/x&y", b"1")
    found = obstore.list(store, "a").collect()
    assert [(one["path"], one["size"]) for one in found] == [(f"a/{number}/x&y", 1) for number in range(10)]
    assert found[3]["e_tag"] == obstore.head(store, "a/3/x&y")["e_tag"]
    assert obstore.list_with_delimiter(store, "a")["common_prefixes"] == [f"a/{number}" for number in range(10)]
    assert bucket.count("GET") == 8
    obstore.delete(store, [f"a/{number}/x&y" for number in range(9)])
    obstore.delete(store, "a/none")
    assert list(bucket.objects) == ["a/9/x&y"]


def test_uploads_in_parts_and_copies_are_refused(served):
    bucket, store = served
    create(store, "a", b"1")
    for write in (lambda: obstore.put(store, "b", bytes(6 << 20)), lambda: obstore.copy(store, "a", "b")):
        with pytest.raises(GenericError, match="501 Not Implemented"):
            write()
    assert list(bucket.objects) == ["a"]


def test_a_busy_server_is_asked_again_and_given_up_at_last(served):
    bucket, store = served
    bucket.busy["PUT"] = 2
    create(store, "a", b"1")
    assert (bucket.count("PUT"), bucket.objects) == (3, {"a": b"1"})
    bucket.busy["PUT"] = 3
    with pytest.raises(GenericError, match="503 Service Unavailable"):
        create(store, "b", b"1")
    assert "b" not in bucket.objects
    bucket.busy["GET"] = bucket.unavailable = 1
    assert bytes(obstore.get(store, "a").bytes()) == b"1"


@pytest.mark.parametrize("data", [b"ab", bytes(20 << 20)], ids=["a small object", "a large object"])
def test_an_upload_that_breaks_off_stores_nothing_and_may_be_sent_again(served, data):
    bucket, store = served
    seen = []
    bucket.broken_uploads, bucket.before = 1, lambda method, key: seen.append(list(bucket.objects))
    try:
        create(store, "a", data)
    except GenericError:  # obstore sends it again itself, unless it was in the middle of writing to the connection
        create(store, "a", data)
    assert (bucket.objects["a"] == data, seen) == (True, [[], []])
    bucket.broken_uploads = 3
    with pytest.raises(GenericError):
        create(store, "b", data)
    assert list(bucket.objects) == ["a"]


def test_a_lost_answer_looks_as_if_somebody_else_had_been_faster(served):
    bucket, store = served
    bucket.lost_answers = 1
    with pytest.raises(AlreadyExistsError, match="after 1 retries"):
        create(store, "a", b"mine")
    assert (bucket.objects, bucket.count("PUT")) == ({"a": b"mine"}, 2)
    bucket.lost_answers = 1
    obstore.put(store, "a", b"again")  # without a condition nothing is noticed
    assert bucket.objects == {"a": b"again"}


def test_a_conflict_looks_as_if_there_were_an_object_and_there_is_none(served):
    bucket, store = served
    bucket.conflicts = 1
    with pytest.raises(AlreadyExistsError, match="409 Conflict"):
        create(store, "a", b"1")
    assert (bucket.objects, bucket.count("PUT")) == ({}, 1)


def test_a_server_that_knows_no_conditions_overwrites_or_refuses(served):
    bucket, store = served
    create(store, "a", b"first")
    bucket.conditions = "ignored"
    create(store, "a", b"second")
    bucket.conditions = "refused"
    with pytest.raises(GenericError, match="501 Not Implemented"):
        create(store, "b", b"1")
    assert bucket.objects == {"a": b"second"}


def test_an_answer_that_is_too_late_is_an_error_although_the_object_is_stored():
    with serving() as (bucket, url):
        late = threading.Event()
        bucket.before = lambda method, key: late.wait(30) and None
        with pytest.raises(GenericError):
            create(store_at(url, timeout="300ms"), "a", b"1")
        late.set()
        end = time.monotonic() + 30
        while not bucket.objects and time.monotonic() < end:
            time.sleep(0.01)
        assert (bucket.objects, bucket.count("PUT")) == ({"a": b"1"}, 1)


def test_something_happens_just_before_a_request(served):
    bucket, store = served

    def before(method, key):
        if (method, key) == ("PUT", "a"):
            bucket.objects["a"] = b"theirs"
        elif (method, key) == ("HEAD", "a"):
            bucket.objects.pop("a", None)

    bucket.before = before
    with pytest.raises(AlreadyExistsError):
        create(store, "a", b"mine")
    assert bucket.objects == {"a": b"theirs"}
    with pytest.raises(FileNotFoundError):
        obstore.head(store, "a")


def test_a_writer_that_is_killed_in_the_middle_of_an_upload_leaves_no_object(served):
    bucket, store = served
    started, killed = threading.Event(), threading.Event()

    def before(method, key):
        if key == "a":
            started.set()
            killed.wait(30)

    bucket.before = before
    text = "import sys; from test_s3_server import *; create(store_at(sys.argv[1]), 'a', bytes(30 << 20))"
    command = [sys.executable, "-c", text, store.config["endpoint"]]
    with subprocess.Popen(command, cwd=Path(__file__).parent) as writer:
        assert started.wait(60)
        writer.kill()
    killed.set()
    create(store, "b", b"1")
    assert bucket.objects == {"b": b"1"}
