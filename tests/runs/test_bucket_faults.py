"""Runs into a bucket that fails in one request: they end in the bytes of a local run, if need be by a rerun."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from itertools import count

import pytest
from s3_bucket import Bucket
from small_runs import BATCHES, counted, files, interrupted, run, small_model

from activation_extractor import open_store
from activation_extractor.errors import StoreError

pytest.importorskip("obstore", reason="the extra 'remote' is not installed")

URL = "s3://bucket/my/run"


@pytest.fixture(scope="module")
def local(tmp_path_factory) -> dict[str, bytes]:
    """The files of a run into a folder, less its journal."""
    out = tmp_path_factory.mktemp("local") / "run"
    run(out)
    return {name: data for name, data in files(out).items() if not name.startswith("journal")}


def there(bucket: Bucket, name: str = "my/run") -> dict[str, bytes]:
    return {key[len(name) + 1 :]: data for key, data in list(bucket.objects.items()) if key.startswith(f"{name}/")}


def check_whole(bucket: Bucket, local: dict[str, bytes], name: str = "my/run") -> None:
    """The store is that of an undisturbed run, and no object took the place of another one."""
    bucket.before = bucket.after = lambda method, key: None
    found = {key: data for key, data in there(bucket, name).items() if not key.endswith(".tmp")}
    assert {key: found[key] for key in found if not key.startswith(("journal", "manifest"))} == {
        key: local[key] for key in local if key != "manifest.json"
    }
    assert json.loads(local["manifest.json"]).items() <= json.loads(found["manifest.json"]).items()
    store = open_store(f"s3://bucket/{name}")
    assert store.ids == [f"row {row}" for row in range(15)]
    assert {damage.kind for damage in store.verify()} <= {"unfinished"}
    assert bucket.replaced == []
    assert all(key.endswith(".tmp") for key in bucket.removed)


def at(bucket: Bucket, method: str, number: int, act: Callable[[str], None], when: str = "before") -> list[str]:
    """Act on the key of the number-th request of a method from now on; the list that is returned holds it then."""
    numbers, acted = count(), list[str]()

    def look(asked: str, key: str) -> None:
        if asked == method and next(numbers) == number:
            acted.append(key)
            act(key)

    setattr(bucket, when, look)
    return acted


def each(bucket: Bucket, method: str, act: Callable[[str], None], when: str = "before"):
    """The name of a store for each request of a method that a run into it makes; just that request is acted on."""
    for number in count():
        acted = at(bucket, method, number, act, when)
        yield f"run {len(bucket.requests)}"
        if not acted:
            assert number > 3 or method != "PUT"
            return


def test_a_run_into_a_bucket_leaves_what_one_into_a_folder_does(bucket, local):
    store = run(URL)
    check_whole(bucket, local)
    assert store.ids == open_store(URL).ids
    model, calls = counted(small_model())
    run(URL, model=model)
    assert len(calls) <= 1  # what shows that it is the same run
    check_whole(bucket, local)


ONCE = {
    "is busy": lambda bucket: bucket.busy.update(PUT=1),
    "breaks off": lambda bucket: setattr(bucket, "broken_uploads", 1),
    "is answered and nobody hears it": lambda bucket: setattr(bucket, "lost_answers", 1),
    "conflicts with another one": lambda bucket: setattr(bucket, "conflicts", 1),
}


@pytest.mark.parametrize("fault", ONCE)
def test_a_run_does_not_notice_that_one_of_its_puts(bucket, local, fault):
    for name in each(bucket, "PUT", lambda key: ONCE[fault](bucket)):
        run(f"s3://bucket/{name}")
        check_whole(bucket, local, name)


@pytest.mark.parametrize("method", ["GET", "HEAD", "POST"])
def test_a_run_does_not_notice_that_another_request_is_answered_late(bucket, local, method):
    for name in each(bucket, method, lambda key: bucket.busy.update({method: 1})):
        run(f"s3://bucket/{name}")
        check_whole(bucket, local, name)


def test_a_put_whose_answer_comes_too_late_is_no_loss(bucket, local, monkeypatch):
    monkeypatch.setenv("AWS_TIMEOUT", "100ms")
    for when in ("before", "after"):  # it is stored when the writer has given up waiting
        for name in each(bucket, "PUT", lambda key: time.sleep(0.2), when):
            run(f"s3://bucket/{name}")
            check_whole(bucket, local, name)


@pytest.mark.parametrize("number", [0, 3])
def test_a_server_that_stays_away_is_an_error_that_says_where_and_a_rerun_goes_on(bucket, local, number):
    acted = at(bucket, "PUT", number, lambda key: setattr(bucket, "unavailable", 1000))
    with pytest.raises(StoreError, match=r"^'s3://bucket/my/run.*503") as caught:
        run(URL)
    assert acted
    assert "\n" not in str(caught.value)
    bucket.unavailable, before = 0, there(bucket)
    model, calls = counted(small_model())
    run(URL, model=model)
    assert before.items() <= there(bucket).items()
    check_whole(bucket, local)
    units = sum(key.startswith("shards/0") for key in before)
    assert len(calls) <= 5 - 2 * units + 1


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_run_that_is_interrupted_in_a_put_goes_on(bucket, local, when):
    for name in each(bucket, "PUT", lambda key: os.kill(os.getpid(), signal.SIGINT), when):
        with suppress(KeyboardInterrupt):
            run(f"s3://bucket/{name}")
            time.sleep(0.01)
        bucket.before = bucket.after = lambda method, key: None
        run(f"s3://bucket/{name}")
        check_whole(bucket, local, name)


@pytest.mark.parametrize("part", ["shards/00000000", "shards/00000001", "end", "journal"])
def test_an_object_that_is_deleted_behind_a_run_is_an_error_or_there_again_after_a_rerun(bucket, local, part):
    def delete(key: str) -> None:
        for one in [one for one in bucket.objects if one.startswith(f"{key.partition('/')[0]}/{part}")]:
            del bucket.objects[one]

    for name in each(bucket, "PUT", delete):
        with suppress(StoreError):
            run(f"s3://bucket/{name}")
        run(f"s3://bucket/{name}")
        check_whole(bucket, local, name)


def test_a_manifest_that_is_deleted_behind_a_run_ends_all_runs_there_and_harms_no_shard(bucket, local):
    def delete(key: str) -> None:
        bucket.objects.pop(f"{key.partition('/')[0]}/manifest.json", None)

    for name in each(bucket, "PUT", delete):
        with suppress(StoreError):
            run(f"s3://bucket/{name}")
        bucket.before = bucket.after = lambda method, key: None
        if f"{name}/manifest.json" in bucket.objects:
            check_whole(bucket, local, name)
        else:
            with pytest.raises(StoreError, match="must be a new or empty folder, got one that holds something"):
                run(f"s3://bucket/{name}")
        found = there(bucket, name)
        assert all(found[key] == local[key] for key in found if key.startswith("shards/0"))
    assert bucket.replaced == []


@pytest.mark.parametrize("method", ["POST", "PUT", "GET", "HEAD"])
def test_what_a_writer_may_not_do_is_said_or_not_needed(bucket, local, method):
    bucket.denied = {method}
    if method == "POST":  # it removes nothing but its own probes
        run(URL)
        check_whole(bucket, local)
        bucket.page = 1
        run(URL)
        check_whole(bucket, local)
        return
    with pytest.raises(StoreError, match=r"^'s3://bucket/my/run.* 403 Forbidden") as caught:
        run(URL)
    assert "\n" not in str(caught.value)
    assert not any(key.endswith((".safetensors", ".json")) for key in bucket.objects)
    bucket.denied.clear()
    run(URL)
    check_whole(bucket, local)


@pytest.mark.parametrize("page", [1, 2])
def test_listings_of_many_pages_are_read_to_their_end(bucket, local, page):
    bucket.page = page
    with pytest.raises(KeyboardInterrupt):
        run(URL, interrupted(BATCHES, 4))
    model, calls = counted(small_model())
    run(URL, model=model)
    assert len(calls) < len(BATCHES)
    check_whole(bucket, local)
