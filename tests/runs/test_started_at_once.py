"""Eight processes that begin in one folder at the same instant end well, all of them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

WAYS = ["extract", "extract without ids", "extract that appends", "block", "block of small units"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
@pytest.mark.parametrize("late", ["0", "0.1"])
@pytest.mark.parametrize("way", WAYS)
def test_processes_that_begin_at_the_same_instant_share_a_store(tmp_path, way, late):
    program = Path(__file__).parent.parent / "at_once.py"
    command = [sys.executable, "-W", "ignore", str(program), str(tmp_path), "2", way, "pause", late]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert ended.returncode == 0, ended.stderr
