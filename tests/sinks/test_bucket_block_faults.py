"""With-blocks that write into a bucket which fails in one request: no row is lost, none is there twice."""

from __future__ import annotations

import time
from itertools import count

import pytest
import torch

from activation_extractor import SafetensorsSink, capture, open_store
from activation_extractor.errors import StoreError
from activation_extractor.sinks import _store_writer

pytest.importorskip("obstore", reason="the extra 'remote' is not installed")

FAULTS = {
    "is busy": lambda bucket: bucket.busy.update(PUT=1),
    "breaks off": lambda bucket: setattr(bucket, "broken_uploads", 1),
    "is answered and nobody hears it": lambda bucket: setattr(bucket, "lost_answers", 1),
    "conflicts with another one": lambda bucket: setattr(bucket, "conflicts", 1),
}


@pytest.fixture(autouse=True)
def ids_in_files(monkeypatch):
    """Digests of ids are written for a few of them too."""
    monkeypatch.setattr(_store_writer, "FEW_IDS", 2)


def block(url: str, number: int, append: bool = True) -> None:
    layer = torch.nn.Identity()
    with capture(layer, "", sink=SafetensorsSink(url, append=append, rows_per_unit=4)) as acts:
        for step in range(3):
            with acts.step(ids=[f"{number} {step} {row}" for row in range(3)]):
                layer(torch.full((3, 2), float(10 * number + step)))


def ids(*numbers: int) -> list[str]:
    return [f"{number} {step} {row}" for number in numbers for step in range(3) for row in range(3)]


def check(bucket, url: str, *numbers: int) -> None:
    bucket.before = lambda method, key: None
    store = open_store(url)
    assert sorted(store.ids) == ids(*numbers)
    values = dict(zip(store.ids, store[store.pairs[0]][:][:, 0].tolist(), strict=True))
    assert values == {name: 10.0 * int(name[0]) + int(name[2]) for name in ids(*numbers)}
    assert {damage.kind for damage in store.verify()} <= {"unfinished"}
    assert bucket.replaced == []


def at(bucket, number: int, act) -> list[str]:
    """Act in the number-th PUT from now on; the list that is returned holds its key then."""
    numbers, acted = count(), list[str]()

    def look(method: str, key: str) -> None:
        if method == "PUT" and next(numbers) == number:
            acted.append(key)
            act()

    bucket.before = look
    return acted


@pytest.mark.parametrize("append", [True, False])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_block_does_not_notice_that_one_of_its_puts(bucket, fault, append):
    for number in count():
        url = f"s3://bucket/{number}"
        acted = at(bucket, number, lambda: FAULTS[fault](bucket))
        block(url, 1, append)
        check(bucket, url, 1)
        more = at(bucket, number, lambda: FAULTS[fault](bucket))
        block(url, 2)
        check(bucket, url, 1, 2)
        with pytest.raises(Exception, match="2 0 0"):
            block(url, 2)
        check(bucket, url, 1, 2)
        if not acted and not more:
            break
    assert number > 5


def test_a_put_of_a_block_whose_answer_comes_too_late_is_no_loss(bucket, monkeypatch):
    monkeypatch.setenv("AWS_TIMEOUT", "100ms")
    for number in count():
        url = f"s3://bucket/{number}"
        acted = at(bucket, number, lambda: time.sleep(0.2))
        block(url, 1)
        check(bucket, url, 1)
        if not acted:
            break


@pytest.mark.parametrize("number", [0, 2, 3])
def test_a_server_that_stays_away_is_an_error_and_what_is_stored_stays(bucket, number):
    at(bucket, number, lambda: setattr(bucket, "unavailable", 10**6))
    with pytest.raises(StoreError, match=r"^'s3://bucket/run/.* 503"):
        block("s3://bucket/run", 1)
    bucket.unavailable, bucket.before = 0, lambda method, key: None
    stored = open_store("s3://bucket/run").ids if "run/manifest.json" in bucket.objects else []
    assert stored == ids(1)[: len(stored)]
    block("s3://bucket/run", 2)
    assert open_store("s3://bucket/run").ids == stored + ids(2)


@pytest.mark.parametrize("number", [0, 1])
def test_a_unit_that_is_deleted_is_missed_as_in_a_folder(bucket, tmp_path, number):
    block("s3://bucket/run", 1)
    block(tmp_path, 1)
    key = sorted(key for key in bucket.objects if "/shards/" in key)[number]
    path = sorted(tmp_path.glob("shards/*"))[number]
    del bucket.objects[key]
    path.unlink()
    for place, unit in (("s3://bucket/run", key), (tmp_path, path)):
        name = str(unit).rpartition("/")[2].partition(".")[0]
        with pytest.raises(StoreError, match=f"must have all of its units, got 1 of 2 missing: '{name}'"):
            open_store(place)
        assert open_store(place, partial=True).rows == (3, 6)[number]
        block(place, 2)
        assert sorted(open_store(place, partial=True).ids)[-9:] == ids(2)
