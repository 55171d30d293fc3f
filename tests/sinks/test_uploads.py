"""Units on their way to a bucket, several at a time, in bounded memory."""

from __future__ import annotations

import threading
import time

import pytest
import torch
from threads import PATIENCE_SECONDS, ends, is_blocked, on_a_thread, waiting_for
from torch import nn

from activation_extractor import _creation, extract, open_store
from activation_extractor.errors import StoreError
from activation_extractor.sinks import _uploads
from activation_extractor.sinks._uploads import Uploads

URL = "s3://bucket/store"


@pytest.fixture
def gate():
    gate = threading.Event()
    yield gate
    gate.set()


def test_calls_run_beside_each_other_as_long_as_there_is_room(gate):
    uploads, done = Uploads(10), []
    for number in range(2):
        uploads.put(lambda number=number: done.append((gate.wait(PATIENCE_SECONDS), number)), 5)
    third = on_a_thread(lambda: uploads.put(lambda: done.append((True, 2)), 1))
    assert is_blocked(third)
    gate.set()
    assert ends(third)
    uploads.finish()
    assert sorted(done) == [(True, 0), (True, 1), (True, 2)]
    assert not uploads._under_way


def test_no_more_than_a_few_run_at_a_time(gate, monkeypatch):
    monkeypatch.setattr(_uploads, "_MOST", 2)
    uploads = Uploads(10)
    for _ in range(2):
        uploads.put(waiting_for(gate), 0)
    third = on_a_thread(lambda: uploads.put(lambda: None, 0))
    assert is_blocked(third)
    gate.set()
    assert ends(third)
    uploads.finish()


def test_one_that_is_larger_than_all_room_goes_alone(gate):
    uploads = Uploads(1)
    uploads.put(waiting_for(gate), 5)
    second = on_a_thread(lambda: uploads.put(lambda: None, 5))
    assert is_blocked(second)
    gate.set()
    assert ends(second)
    uploads.finish()


def fail():
    raise StoreError("here", "be writable", "an error", "Go on.")


def test_an_error_is_raised_once_and_later_calls_begin_anew():
    uploads, done = Uploads(10), []
    uploads.put(fail, 1)
    with pytest.raises(StoreError, match="an error"):
        uploads.finish()
    uploads.put(lambda: done.append(1), 1)
    uploads.finish()
    assert done == [1]


def test_an_error_is_raised_by_the_next_call_and_the_others_end(gate):
    uploads, done = Uploads(10), []
    uploads.put(lambda: done.append(gate.wait(PATIENCE_SECONDS)), 5)
    uploads.put(fail, 5)
    with pytest.raises(StoreError, match="an error"):
        uploads.put(lambda: done.append(False), 5)
    gate.set()
    uploads.finish()
    assert done == [True]


def test_without_threads_calls_are_made_where_they_are_put(monkeypatch):
    def refuse(*args, **kwargs):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    uploads, done = Uploads(10), []
    uploads.put(lambda: done.append(threading.current_thread()), 1)
    uploads.finish()
    assert done == [threading.current_thread()]


@pytest.fixture
def most_at_once(bucket):
    """How many shards were put at the same time, each of which takes a while."""
    now, most, lock = set(), [0], threading.Lock()

    def before(method, key):
        if method == "PUT" and key.endswith(".safetensors"):
            with lock:
                now.add(key)
                most[0] = max(most[0], len(now))
            time.sleep(0.1)
            with lock:
                now.discard(key)

    bucket.before = before
    return most


def extracted(out, **options):
    torch.manual_seed(0)
    batches = [{"input": torch.randn(4, 4)} for _ in range(12)]
    return extract(nn.Sequential(nn.Linear(4, 8)), batches, "0", out=out, rows_per_unit=4, progress=False, **options)


@pytest.mark.parametrize(("queue_bytes", "expected"), [(1 << 20, range(3, 9)), (1, range(1, 2))])
def test_units_of_a_run_are_under_way_together_within_its_memory(bucket, most_at_once, tmp_path, queue_bytes, expected):
    pytest.importorskip("obstore", reason="the extra 'remote' is not installed")
    extracted(URL, queue_bytes=queue_bytes)
    extracted(tmp_path / "store")
    assert most_at_once[0] in expected
    for path in tmp_path.glob("store/shards/*"):
        assert bucket.objects[f"store/shards/{path.name}"] == path.read_bytes()
    assert open_store(URL).is_complete


def test_a_unit_that_is_refused_while_others_are_under_way_is_computed_by_the_next_run(bucket, monkeypatch):
    pytest.importorskip("obstore", reason="the extra 'remote' is not installed")

    def refuse(path, buffers):
        if path.name == "00000005.safetensors":
            raise OSError(13, "Permission denied")
        return put(path, buffers)

    put = _creation._try_put
    with monkeypatch.context() as patch:
        patch.setattr(_creation, "_try_put", refuse)
        with pytest.raises(StoreError, match=r"00000005\.safetensors' must be writable, got Permission denied"):
            extracted(URL)
    assert "store/end.json" not in bucket.objects
    assert extracted(URL).is_complete
