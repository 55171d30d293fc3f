"""Start-up: what importing the package adds to importing torch, and how long help takes."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial

from benchmarks.measure import Case, Group, require
from benchmarks.sizes import Size
from benchmarks.systems import ready

_FRESH_PROCESSES = 9


def imported(size: Size) -> Iterator[Case]:
    """The package and `capture`, beside torch alone, each in a fresh process."""
    yield Case(
        "start_up.capture",
        "a process that imports capture, beside one that imports torch",
        partial(ready, _python("-c", "from activation_extractor import capture")),
        partial(ready, _python("-c", "import torch")),
        calls=1,
        loops=1,
        target=1.05,
        most_rounds=_FRESH_PROCESSES,
    )


def helped(size: Size) -> Iterator[Case]:
    """The command line's help, beside a Python that does nothing."""
    require("typer")
    for name, command in (("help", ()), ("extract_help", ("extract",))):
        yield Case(
            f"start_up.{name}",
            f"{' '.join(['activation-extractor', *command])} --help, beside python -c pass",
            partial(ready, _python("-m", "activation_extractor", *command, "--help")),
            partial(ready, _python("-c", "pass")),
            calls=1,
            loops=1,
            target=10.0,
            most_rounds=_FRESH_PROCESSES,
        )


START_UP: list[Group] = [("start_up", imported), ("start_up", helped)]


def _python(*arguments: str) -> Callable[[], object]:
    # Bytecode is kept, as it is where pip has installed a package; otherwise each process would compile this one's.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    command = [sys.executable, *arguments]
    return partial(subprocess.run, command, check=True, stdout=subprocess.DEVNULL, env=environment)
