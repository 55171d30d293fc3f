"""Units that wait for a slow disk: what they hold is counted, and an error anywhere ends the run."""

from __future__ import annotations

import gc
import mmap
import os
import subprocess
import sys
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from small_runs import run
from threads import ends, is_blocked, on_a_thread
from torch import nn

from activation_extractor import SafetensorsSink, capture, open_store
from activation_extractor._format import _checksum_threads, _safetensors, _shards
from activation_extractor.sinks import _host_memory, _store_writer

MODEL, ROW = nn.Sequential(nn.Linear(4, 4)), torch.ones(1, 4)


@pytest.fixture
def mapped(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The bytes that are mapped for units; the second number is the most that ever were."""
    now = [0, 0]

    class Counted(mmap.mmap):
        def __new__(cls, number: int, size: int):
            made = super().__new__(cls, number, size)
            now[0] += size
            now[1] = max(now)
            weakref.finalize(made, lambda: now.__setitem__(0, now[0] - size))
            return made

    monkeypatch.setattr(_host_memory.mmap, "mmap", Counted)
    return now


def record(folder, units: int, **options) -> None:
    with torch.inference_mode(), capture(MODEL, "0", sink=SafetensorsSink(folder, rows_per_unit=1, **options)):
        for _ in range(units):
            MODEL(ROW)


@pytest.mark.parametrize("queue_bytes", [1, 2**20, 2**23])
def test_tiny_units_before_a_slow_disk_hold_no_more_than_the_queue_may(tmp_path, monkeypatch, mapped, queue_bytes):
    write = _store_writer.write_shard
    monkeypatch.setattr(_store_writer, "write_shard", lambda *given: (time.sleep(0.001), write(*given))[1])
    record(tmp_path / "out", 300, queue_bytes=queue_bytes)
    assert mapped[1] <= max(queue_bytes, 3 * _host_memory.FIRST_BLOCK_BYTES)
    assert open_store(tmp_path / "out").rows == 300
    gc.collect()
    assert mapped[0] == 0


def test_thousands_of_tiny_units_wait_in_little_memory_and_the_next_one_waits_for_them(tmp_path, monkeypatch, mapped):
    gate, done, write = threading.Event(), [], _store_writer.write_shard
    monkeypatch.setattr(_store_writer, "write_shard", lambda *given: gate.wait(60) and write(*given))
    recording = on_a_thread(lambda: (record(tmp_path / "out", 2500), done.append(True)))
    while not is_blocked(recording) or mapped[0] < 100 * 2**20:
        assert recording.is_alive()
    assert mapped[0] <= _store_writer.QUEUE_BYTES
    gate.set()
    recording.join(60)
    assert done == [True]
    assert open_store(tmp_path / "out").rows == 2500


def failing(error: BaseException):
    def fail(*_, **__):
        raise error

    return fail


def refuse_threads(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(threading.Thread, "start", failing(RuntimeError("can't start new thread")))


FAULTS = {
    "the writer has no memory": (
        lambda patch: patch.setattr(_store_writer, "write_shard", failing(MemoryError())),
        MemoryError,
    ),
    "a file": (lambda patch: patch.setattr(_shards, "publish", failing(OSError(5, "Input/output error"))), OSError),
    "a mapping": (lambda patch: patch.setattr(_host_memory.mmap, "mmap", failing(OSError(12, "No memory"))), OSError),
    "the writer's thread": (refuse_threads, RuntimeError),
}


@pytest.mark.parametrize("how", ["block", "extract"])
@pytest.mark.parametrize("fault", FAULTS)
def test_an_error_ends_the_run_and_the_next_run_is_right(tmp_path, monkeypatch, fault, how):
    force, kind = FAULTS[fault]
    found = []

    def attempt() -> None:
        try:
            record(tmp_path / "out", 50) if how == "block" else run(tmp_path / "out")
        except kind as error:
            found.append(error)

    with monkeypatch.context() as patch:
        force(patch)
        ended = on_a_thread(attempt) if fault != "the writer's thread" else attempt()
        assert ended is None or ends(ended)
    assert len(found) == 1
    record(tmp_path / "other", 3) if how == "block" else run(tmp_path / "out")
    assert open_store(tmp_path / ("other" if how == "block" else "out")).verify() == []


@pytest.mark.parametrize("error", [MemoryError("no room"), OSError(28, "No space left on device")], ids=repr)
def test_a_checksum_that_cannot_be_taken_is_the_error_of_the_run(tmp_path, monkeypatch, error):
    monkeypatch.setattr(_checksum_threads, "_SMALL_BYTES", 0)
    with monkeypatch.context() as patch:
        patch.setattr(_safetensors, "crc32_of", failing(error))
        with pytest.raises((MemoryError, OSError), match="no room|No space"):
            record(tmp_path / "out", 5)


def test_checksums_of_many_shards_are_taken_by_few_threads(tmp_path, monkeypatch):
    monkeypatch.setattr(_checksum_threads, "_SMALL_BYTES", 0)
    record(tmp_path / "first", 1)
    threads, start = [], threading.Thread.start
    monkeypatch.setattr(threading.Thread, "start", lambda thread: (threads.append(thread.name), start(thread))[1])
    record(tmp_path / "out", 100)
    assert len(threads) <= 2
    assert open_store(tmp_path / "out").verify() == []


def test_checksums_are_taken_where_no_thread_can_be_had(tmp_path, monkeypatch):
    monkeypatch.setattr(_checksum_threads, "_SMALL_BYTES", 0)
    monkeypatch.setattr(ThreadPoolExecutor, "submit", failing(RuntimeError("cannot schedule new futures")))
    record(tmp_path / "out", 2)
    assert open_store(tmp_path / "out").verify() == []


FORKED = """
import os, sys, torch
from activation_extractor._format import _checksum_threads
from activation_extractor._format._safetensors import write_safetensors_shard
from pathlib import Path

_checksum_threads._SMALL_BYTES = 0
write_safetensors_shard(Path(sys.argv[1], "parent"), {"a": [torch.zeros(9)]}, {})
child = os.fork()
if not child:
    write_safetensors_shard(Path(sys.argv[1], "child"), {"a": [torch.zeros(9)]}, {})
    os._exit(0)
os.waitpid(child, 0)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
def test_a_forked_process_takes_checksums_on_threads_of_its_own(tmp_path):
    subprocess.run([sys.executable, "-W", "ignore", "-c", FORKED, str(tmp_path)], check=True, timeout=60)
    assert (tmp_path / "child").read_bytes() == (tmp_path / "parent").read_bytes()
