"""Stores that are written to a bucket: as a disk would hold them, and nothing lost or overwritten when things fail."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from activation_extractor import NpzSink, SafetensorsSink, _creation, _storage, capture, extract, open_store
from activation_extractor._format._journal import read_records
from activation_extractor.errors import OtherRunError, StoreError
from activation_extractor.store import verify_store

pytest.importorskip("obstore", reason="the extra 'remote' is not installed")

URL = "s3://bucket/my/store"


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch):
    monkeypatch.setattr(_creation, "_PAUSES", (0.0, 0.0))


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU())


def batches(count: int = 6) -> list[dict[str, object]]:
    torch.manual_seed(1)
    return [{"input": torch.randn(4, 4), "id": [f"{number}-{row}" for row in range(4)]} for number in range(count)]


def extracted(out, given=None, **options):
    options = {"ids": "id", "rows_per_unit": 8, "progress": False, **options}
    return extract(model(), batches() if given is None else given, "*", out=out, **options)


def files(folder: Path) -> dict[str, bytes]:
    """The files of a local store but for its journal, as a bucket would have them."""
    paths = [path for path in folder.rglob("*") if path.is_file() and path.parent.name != "journal"]
    return {f"my/store/{path.relative_to(folder).as_posix()}": path.read_bytes() for path in paths}


def objects(bucket) -> dict[str, bytes]:
    return {key: data for key, data in bucket.objects.items() if "/journal/" not in key}


def test_a_run_leaves_the_bytes_that_it_leaves_on_a_disk(bucket, tmp_path):
    there, here = extracted(URL), extracted(tmp_path / "store")
    assert objects(bucket) == files(tmp_path / "store")
    assert there.is_complete
    assert there.ids == here.ids
    assert torch.equal(there["1"][:], here["1"][:])
    assert not verify_store(URL)


def test_a_run_that_was_interrupted_goes_on_and_ends_in_the_same_bytes(bucket, tmp_path):
    extracted(tmp_path / "store")
    given = batches()
    with pytest.raises(RuntimeError, match="the power goes"):
        extracted(URL, iter_until(given, 5))
    stored = {key for key in bucket.objects if "/shards/" in key}
    assert len(stored) == 2
    puts = bucket.count("PUT")
    assert extracted(URL).rows == 24
    assert bucket.count("PUT") == puts + 5  # two of the probe, the unit, its record, and the end
    assert objects(bucket) == files(tmp_path / "store")


def iter_until(given, stop):
    yield from given[:stop]
    raise RuntimeError("the power goes")


def test_a_further_unit_takes_few_requests_and_its_header_is_not_read_back(bucket):
    def requests(count):
        bucket.requests.clear()
        extracted(f"{URL}/{count}", batches(count), rows_per_unit=4)
        return [len(bucket.requests), bucket.count("GET")]

    few, many = requests(6), requests(16)
    assert many[1] == few[1]
    assert many[0] - few[0] <= 3 * 10


def test_a_run_goes_into_a_folder_that_a_console_has_made(bucket):
    for key in ("my/", "my/store/", "my/store/shards/"):
        bucket.objects[key] = b""
    extracted(URL)
    assert not verify_store(URL)


def test_rows_that_are_added_find_stored_ids_by_many_requests_at_a_time(bucket):
    extracted(URL, rows_per_unit=1)
    under_way, most = [], [0]

    def before(method, key):
        under_way.append(key)
        most[0] = max(most[0], len(under_way))
        time.sleep(0.02)  # others come meanwhile, if there are any
        under_way.remove(key)

    bucket.before = before
    assert extracted(URL, batches(7), rows_per_unit=1, append=True).rows == 28
    assert most[0] > 8


def test_a_complete_run_writes_nothing_again(bucket):
    extracted(URL)
    before = dict(bucket.objects)
    bucket.requests.clear()
    extracted(URL)
    assert bucket.objects == before
    assert bucket.count("PUT") == 0


def test_another_run_is_refused_and_the_store_stays(bucket):
    extracted(URL)
    before = dict(bucket.objects)
    with pytest.raises(OtherRunError):
        extract(model(), batches(), "0", out=URL, ids="id", rows_per_unit=8, progress=False)
    with pytest.raises(StoreError, match="must be a new or empty folder, got one that holds a store"):
        extracted(URL, resume=False)
    with pytest.raises(StoreError, match="must be a new or empty folder, got one that holds something"):
        extracted("s3://bucket/my")
    assert bucket.objects == before


def test_blocks_add_rows_and_find_ids_that_are_stored(bucket):
    net = model()

    def add(row_id):
        with capture(net, "0", sink=SafetensorsSink(URL, append=True)) as acts, acts.step(ids=[row_id]):
            net(torch.ones(1, 4))

    for row_id in ("a", "b", "c"):
        add(row_id)
    assert open_store(URL).ids == ["a", "b", "c"]
    with pytest.raises(StoreError, match="must hold each id once, got 'b', which it holds already"):
        add("b")
    assert open_store(URL).ids == ["a", "b", "c"]


def test_digests_of_many_ids_are_kept_in_the_bucket(bucket, monkeypatch):
    monkeypatch.setattr("activation_extractor.sinks._store_writer.FEW_UNITS", 2)
    net = model()
    for number in range(5):
        with capture(net, "0", sink=SafetensorsSink(URL, append=True)) as acts, acts.step(ids=[number]):
            net(torch.ones(1, 4))
    assert [key for key in bucket.objects if key.startswith("my/store/ids/")]
    with (
        pytest.raises(StoreError, match="must hold each id once, got 3, which"),
        capture(net, "0", sink=SafetensorsSink(URL, append=True)) as acts,
        acts.step(ids=[3]),
    ):
        net(torch.ones(1, 4))


def test_of_two_writers_that_do_not_share_a_store_one_is_refused(bucket):
    net, sinks = model(), [SafetensorsSink(URL, rows_per_unit=1) for _ in range(2)]
    for number, sink in enumerate(sinks):
        block = capture(net, "0", sink=sink)
        if number:
            with (
                pytest.raises(StoreError, match="must be this writer's own store, got one that another writer began"),
                block,
            ):
                net(torch.ones(1, 4))
        else:
            with block:
                net(torch.ones(1, 4))
    assert open_store(URL).rows == 1


def test_two_writers_of_one_run_leave_its_bytes(bucket, tmp_path):
    extracted(tmp_path / "store")
    errors, net, given = [], model(), batches()

    def run():
        try:
            extract(net, given, "*", out=URL, ids="id", rows_per_unit=8, progress=False)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert objects(bucket) == files(tmp_path / "store")
    assert not verify_store(URL)


def test_lost_answers_conflicts_and_busy_servers_change_nothing(bucket, tmp_path):
    extracted(tmp_path / "store")
    bucket.lost_answers, bucket.conflicts, bucket.busy["PUT"], bucket.broken_uploads = 5, 2, 2, 2
    extracted(URL)
    assert (bucket.lost_answers, bucket.conflicts, bucket.broken_uploads) == (0, 0, 0)
    assert objects(bucket) == files(tmp_path / "store")


def test_the_journal_has_shards_whose_answers_were_lost(bucket):
    bucket.before = lambda method, key: lose(bucket, method, key, "00000001.safetensors")
    extracted(URL)
    assert sorted(read_records(_storage.located(URL))) == ["00000000", "00000001", "00000002"]


def test_a_manifest_whose_answer_was_lost_is_the_writers_own(bucket):
    bucket.before = lambda method, key: lose(bucket, method, key, "manifest.json")
    net = model()
    with capture(net, "0", sink=SafetensorsSink(URL)):
        net(torch.ones(1, 4))
    assert open_store(URL).rows == 1


def lose(bucket, method, key, name):
    if method == "PUT" and key.endswith(name) and key not in bucket.objects:
        bucket.lost_answers = 1


@pytest.mark.parametrize(
    ("conditions", "match"),
    [
        ("ignored", "must refuse an object whose name is taken, got one that replaces it. Two writers would lose rows"),
        ("refused", "must be created only where there is nothing, got .*501.* Write the store to a disk"),
    ],
)
def test_a_server_that_cannot_create_conditionally_is_refused_before_anything_is_written(bucket, conditions, match):
    bucket.conditions = conditions
    with pytest.raises(StoreError, match=match):
        extracted(URL)
    assert not objects(bucket)


def test_creation_that_the_environment_turns_off_is_an_error(bucket, monkeypatch):
    monkeypatch.setenv("AWS_CONDITIONAL_PUT", "disabled")
    with pytest.raises(StoreError, match="must be created only where there is nothing, got .*not yet implemented"):
        extracted(URL)


def test_formats_of_numpy_are_refused_at_the_door(bucket):
    for write in (lambda: NpzSink(URL), lambda: extracted(URL, format="npy")):
        with pytest.raises(StoreError, match="must hold safetensors in a bucket, got shards of np.*Write safetensors"):
            write()
    assert not bucket.objects


def test_a_writer_that_is_killed_leaves_whole_units_and_the_run_goes_on(bucket, tmp_path):
    extracted(tmp_path / "store")
    script = f"""
import os, sys, signal
sys.path[:0] = {sys.path!r}
from sinks.test_buckets import batches, extracted, URL
def given():
    for number, batch in enumerate(batches()):
        if number == 5:
            os.kill(os.getpid(), signal.SIGKILL)
        yield batch
extracted(URL, given())
"""
    ended = subprocess.run([sys.executable, "-c", script], check=False, timeout=120, cwd=Path(__file__).parents[1])
    assert ended.returncode == -9
    assert extracted(URL).is_complete
    found, expected = objects(bucket), files(tmp_path / "store")
    for manifests in (found, expected):  # which say with how many threads they were computed
        assert manifests.pop("my/store/manifest.json")
    assert found == expected


def test_a_manifest_that_is_deleted_meanwhile_is_an_error_and_no_second_store_begins(bucket):
    extracted(URL)
    del bucket.objects["my/store/manifest.json"]
    before = dict(bucket.objects)
    with pytest.raises(StoreError, match="must be a new or empty folder, got one that holds something"):
        extracted(URL)
    assert bucket.objects == before


def test_a_shard_that_is_deleted_is_computed_again(bucket, tmp_path):
    extracted(tmp_path / "store")
    extracted(URL)
    del bucket.objects["my/store/shards/00000001.safetensors"]
    assert "missing" in str(verify_store(URL))
    extracted(URL)
    assert objects(bucket) == files(tmp_path / "store")


def test_a_journal_that_was_copied_to_a_disk_is_read_there(bucket, tmp_path):
    extracted(URL)
    for key, data in bucket.objects.items():
        path = tmp_path / key
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    store = open_store(tmp_path / "my" / "store")
    assert store.rows == 24
    assert len(read_records(tmp_path / "my" / "store")) == 3
    assert not verify_store(tmp_path / "my" / "store")
