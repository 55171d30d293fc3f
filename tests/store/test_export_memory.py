"""What exports and imports take in memory, of the whole process: torch's, numpy's, Arrow's and HDF5's together."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from activation_extractor import SafetensorsSink
from activation_extractor._format._stored_rows import Ragged
from activation_extractor.sinks import Step

needs_linux = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="only Linux says what the peak was")
MIB = 1 << 20
COLUMN = 128 * MIB
START = r"""
import re, sys
from functools import partial
from pathlib import Path

from activation_extractor import SafetensorsSink, export, import_store, open_store
from activation_extractor.store import _import, _parquet

def resident(name):
    return int(re.search(name + r":\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024

folder, to = Path(sys.argv[1]), sys.argv[2]
_parquet._GROUP_BYTES = 1 << 22
_import.SafetensorsSink = partial(SafetensorsSink, unit_bytes=1 << 22, queue_bytes=1 << 22)
"""
EXPORT = r"""
shards = {"shard_bytes": 1 << 25} if to in ("parquet", "datasets") else {}
keys = [("a", "mean")] if to == "h5ad" else None  # which has no place for the ragged column
run = lambda name: export(open_store(folder / name), folder / f"{name} as {to}", to, keys=keys, **shards)
"""
IMPORT = r"""
run = lambda name: import_store(folder / f"{name} requests", folder / f"{name} imported")
"""
MEASURE = r"""
run("small")  # which imports what is needed
Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
before = resident("VmRSS")
run("large")
print(resident("VmHWM") - before)
"""


def write(folder, rows):
    """A column of 1 KiB a row; a ragged one of as much; text."""
    sink = SafetensorsSink(folder)
    for index, start in enumerate(range(0, rows, 1024)):
        count = min(1024, rows - start)
        ragged = Ragged(torch.rand(4 * count, 64), torch.full((count,), 4))
        values = {("a", "mean"): torch.rand(count, 256), ("b", "full"): ragged}
        sink.write(Step(index, count, values, None, {"text": ["x" * 20] * count}))
    sink.close()


def write_requests(folder, rows):
    """Two layers of 1 MiB in each file."""
    folder.mkdir()
    for row in range(rows):
        save_file(
            {"hidden_states": torch.rand(256, 2, 1024), "token_ids": torch.arange(256)}, folder / f"{row}.safetensors"
        )


def growth(program, folder, to=""):
    """By how much the memory of a process grew that runs the program."""
    done = subprocess.run([sys.executable, "-c", START + program + MEASURE, folder, to], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("memory")
    write(folder / "small", 4)
    write(folder / "large", COLUMN // 1024)
    return folder


@needs_linux
@pytest.mark.parametrize(
    ("to", "needs"), [("parquet", "pyarrow"), ("datasets", "datasets"), ("h5ad", "h5py"), ("npz", "numpy")]
)
def test_no_export_holds_a_column_in_memory(folder, to, needs):
    pytest.importorskip(needs, reason=f"what {to} needs is not installed")
    assert growth(EXPORT, folder, to) < COLUMN // 2


@needs_linux
def test_no_import_holds_a_column_in_memory(tmp_path):
    write_requests(tmp_path / "small requests", 1)
    write_requests(tmp_path / "large requests", COLUMN // MIB)
    assert growth(IMPORT, tmp_path) < COLUMN // 2
