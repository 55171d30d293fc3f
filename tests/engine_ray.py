"""A cluster of Ray for tests, on this machine, whose processes and files are gone at the end."""

from __future__ import annotations

import logging
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def cluster(**environment: str) -> Iterator[Any]:
    """A cluster whose workers have further variables in their environment."""
    import ray

    folder = tempfile.mkdtemp(prefix="ray")  # a short path: sockets lie in it
    before = _children()
    path = [str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    environment = {"PYTHONPATH": os.pathsep.join(filter(None, path)), **environment}
    ray.init(
        num_cpus=4,  # two actors, and what reads and writes beside them
        include_dashboard=False,
        object_store_memory=100 * 2**20,
        logging_level="ERROR",
        log_to_driver=False,
        runtime_env={"env_vars": environment},
        _temp_dir=folder,
    )
    try:
        import ray.data

        logging.getLogger("ray.data").setLevel("WARNING")
        ray.data.DataContext.get_current().enable_progress_bars = False
        yield ray
    finally:
        ray.shutdown()
        wait_until(lambda: not _children() - before, "Ray's processes end")
        shutil.rmtree(folder, ignore_errors=True)


def wait_until(is_so: Callable[[], Any], what: str, seconds: float = 60) -> Any:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if found := is_so():
            return found
        time.sleep(0.05)
    raise AssertionError(f"after {seconds} seconds it is not so that {what}")


def kill(process: int) -> None:
    os.kill(process, signal.SIGKILL)


def _children() -> set[int]:
    """The processes below this one."""
    parents = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                state, parent = (folder / "stat").read_text().rpartition(")")[2].split()[:2]
            except OSError:  # it has ended meanwhile
                continue
            if state != "Z":
                parents[int(folder.name)] = int(parent)
    found, below = set(), {os.getpid()}
    while below:
        below = {process for process, parent in parents.items() if parent in below} - found
        found |= below
    return found
