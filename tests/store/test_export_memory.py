"""What an export takes in memory, of the whole process: torch's, numpy's, Arrow's and HDF5's together."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from activation_extractor import SafetensorsSink
from activation_extractor._format._stored_rows import Ragged
from activation_extractor.sinks import Step

MIB = 1 << 20
COLUMN = 128 * MIB
PROGRAM = r"""
import re, sys
from pathlib import Path
from activation_extractor import export, open_store
from activation_extractor.store import _parquet

def resident(name):
    return int(re.search(name + r":\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024

folder, to = Path(sys.argv[1]), sys.argv[2]
_parquet._GROUP_BYTES = 1 << 22
shards = {"shard_bytes": 1 << 25} if to in ("parquet", "datasets") else {}
export(open_store(folder / "small"), folder / f"{to} first", to, **shards)
Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
before = resident("VmRSS")
export(open_store(folder / "store"), folder / to, to, **shards)
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


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("memory")
    write(folder / "small", 4)
    write(folder / "store", COLUMN // 1024)
    return folder


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="only Linux says what the peak was")
@pytest.mark.parametrize(
    ("to", "needs"), [("parquet", "pyarrow"), ("datasets", "datasets"), ("h5ad", "h5py"), ("npz", "numpy")]
)
def test_no_export_holds_a_column_in_memory(folder, to, needs):
    pytest.importorskip(needs, reason=f"what {to} needs is not installed")
    program = PROGRAM
    if to == "h5ad":  # which has no place for the ragged column
        program = program.replace("**shards)", "keys=[('a', 'mean')])")
    done = subprocess.run([sys.executable, "-c", program, folder, to], capture_output=True, text=True, check=True)

    assert int(done.stdout) < COLUMN // 2
