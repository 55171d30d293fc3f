"""Disks that are full or read-only: an error in the user's thread, and what was complete stays."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from wide_runs import ROWS, SINKS, batches, files, record, run, shards, uneven, wide_model

from activation_extractor import capture, open_store
from activation_extractor.errors import StoreError

FULL = r"must be writable, got No space left on device\. (Check the folder, .* the room on the disk|.*make room)"


def drafts(out: Path) -> list[Path]:
    return list(out.rglob(".*.tmp"))


class Disk:
    """A file system of its own, in memory."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def mount(self, options: str) -> bool:
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(self.folder)]
        return shutil.which("mount") is not None and subprocess.run(command, capture_output=True).returncode == 0

    def unmount(self) -> None:
        subprocess.run(["umount", "-l", str(self.folder)], check=True)


@pytest.fixture
def disk(tmp_path):
    one = Disk(tmp_path / "disk")
    one.folder.mkdir()
    if not one.mount("size=2m"):
        pytest.skip("mounting a tmpfs is not allowed here")
    yield one
    one.unmount()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> dict[str, dict[str, bytes]]:
    """The shards of runs with enough room, by format."""
    outs = {kind: tmp_path_factory.mktemp(kind) for kind in SINKS}
    for kind, out in outs.items():
        run(out, kind)
    return {kind: shards(out) for kind, out in outs.items()}


@pytest.mark.parametrize("kind", SINKS)
def test_a_full_disk_is_a_clear_error_and_room_lets_the_run_go_on(disk, undisturbed, kind):
    out, asked = disk.folder / "out", []
    with pytest.raises(StoreError, match=FULL) as caught:
        run(out, kind, (asked.append(1) or one for one in batches()), queue_bytes=1)
    assert str(out) in str(caught.value.path)
    assert 20 < len(asked) < 64  # not only at the end
    assert drafts(out) == []
    assert shards(out).items() < undisturbed[kind].items()
    store = open_store(out)
    assert store.ids == list(range(store.rows))
    assert 16 * 10 < store.rows < 16 * 16
    assert store.verify() == []
    with pytest.raises(StoreError, match=FULL):
        run(out, kind)
    disk.mount("remount,size=16m")
    assert run(out, kind).rows == 512
    assert shards(out) == undisturbed[kind]
    assert open_store(out).verify() == []


@pytest.mark.parametrize("rows_per_unit", [16, 512])
@pytest.mark.parametrize("kind", SINKS)
def test_a_full_disk_ends_a_with_block_and_keeps_its_whole_units(disk, kind, rows_per_unit):
    out, done = disk.folder / "out", []
    with pytest.raises(StoreError, match=FULL):
        record(SINKS[kind](out, rows_per_unit=rows_per_unit, queue_bytes=1), done)
    assert (len(done) == 64) == (rows_per_unit == 512)  # at a next step, or at the end
    assert drafts(out) == []
    store = open_store(out)
    assert store.rows == 0 if rows_per_unit == 512 else 16 * 10 < store.rows < 16 * 16
    assert torch.equal(store["0"].torch(), torch.cat([wide_model()(one["input"]) for one in done])[: store.rows])
    assert store.ids == list(range(store.rows))
    assert store.verify() == []


def test_an_error_of_the_disk_does_not_hide_the_users_own(disk):
    model = wide_model()
    with pytest.raises(ZeroDivisionError) as caught:
        with capture(model, "0", sink=disk.folder / "out"):
            model(ROWS)
            raise ZeroDivisionError
    assert "The sink could not be closed either" in caught.value.__notes__[0]
    assert "No space left on device" in caught.value.__notes__[0]


LIMITED = """
import json, resource, sys
import torch
from activation_extractor.errors import StoreError
from pathlib import Path
from wide_runs import SINKS, run, uneven
torch.set_num_threads(1)
resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
for kind in SINKS:
    try:
        run(Path(sys.argv[1], kind), kind, uneven(), keep="note")
    except StoreError as error:
        print(json.dumps([kind, str(error)]))
"""


def test_a_file_that_may_not_grow_is_a_clear_error_and_a_higher_limit_lets_the_run_go_on(tmp_path):
    tests = Path(__file__).parents[1]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (tests.parent, tests)))}
    command = [sys.executable, "-c", LIMITED, str(tmp_path)]
    said = subprocess.run(command, capture_output=True, text=True, env=env, check=True)
    assert said.stderr == ""
    errors = dict(map(json.loads, said.stdout.splitlines()))
    assert errors.keys() == SINKS.keys()
    for kind, text in errors.items():
        assert f"shards/00000004.{kind}' must be writable, got File too large. Check the folder" in text
        assert drafts(tmp_path / kind) == []
        assert open_store(tmp_path / kind).ids == list(range(64))
        run(tmp_path / kind, kind, uneven(), keep="note")
        run(tmp_path / f"whole {kind}", kind, uneven(), keep="note")
        assert shards(tmp_path / kind) == shards(tmp_path / f"whole {kind}")


@pytest.fixture
def read_only(tmp_path):
    """A folder, and a function that makes it read-only, by the means that there are."""
    folder = tmp_path / "read_only"
    folder.mkdir()
    if os.geteuid() == 0:  # who may write where the permissions say no
        if not Disk(folder).mount("size=8m"):
            pytest.skip("mounting a tmpfs is not allowed here")
        yield folder, lambda: Disk(folder).mount("remount,ro")
        Disk(folder).unmount()
    else:
        yield folder, lambda: set_mode(folder, 0o555)
        set_mode(folder, 0o755)


def set_mode(folder: Path, mode: int) -> None:
    for path in [folder, *(one for one in folder.rglob("*") if one.is_dir())]:
        path.chmod(mode)


@pytest.mark.parametrize("where", ["", "new/deep"])
def test_a_read_only_folder_is_an_error_at_the_first_step(read_only, where):
    folder, make_read_only = read_only
    make_read_only()
    asked = []
    text = r"must be a folder that can be written to, got (Read-only file system|Permission denied)\. Choose another"
    with pytest.raises(StoreError, match=text):
        run(folder / where, data=(asked.append(1) or one for one in batches()))
    assert asked == [1]
    with pytest.raises(StoreError, match=text):
        record(folder / where, [])


def test_a_store_that_became_read_only_can_be_compared_and_read_but_not_gone_on_with(read_only):
    folder, make_read_only = read_only
    run(folder, data=batches()[:6])
    make_read_only()
    before, asked = files(folder), []
    assert run(folder, data=batches()[:6]).rows == 48  # complete: nothing to write
    with pytest.raises(StoreError, match="writ.*, got (Read-only file system|Permission denied)") as caught:
        run(folder, data=(asked.append(1) or one for one in batches()))
    assert len(asked) == 7  # at the first step that is new
    assert os.path.lexists(caught.value.path)  # it names something that is there
    assert files(folder) == before


@pytest.mark.parametrize("kept", [0, 40])
def test_a_disk_that_fills_up_in_the_journal_costs_no_shard(tmp_path, monkeypatch, undisturbed, kept):
    write = os.write

    def write_some(descriptor: int, line: bytes) -> int:
        if not line.startswith(b'{"unit": "00000003"'):
            return write(descriptor, line)
        if kept:
            return write(descriptor, line[:kept])
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(os, "write", write_some)
    text = "journal/.*must be writable, got No space left on device. The shard is complete; make room, and go on"
    with nullcontext() if kept else pytest.raises(StoreError, match=text):
        run(tmp_path)
    store = open_store(tmp_path)
    assert store.ids[:64] == list(range(64))
    assert store.verify() == []
    monkeypatch.undo()
    run(tmp_path)  # as the text advises
    assert shards(tmp_path) == undisturbed["safetensors"]
