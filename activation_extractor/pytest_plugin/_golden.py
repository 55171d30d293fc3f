"""Golden files: where a test's activations are kept beside it, and which of them no test needs any more.

Everything here is light: pytest loads it for everybody.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

from activation_extractor._display import short_path

FOLDER = "__activations__"
SUFFIX = ".safetensors"
_AND_NAME = "@"  # between a test and the name of one of its checks
_PLAIN = " []()=,+"  # beside letters, digits, and `_.-~`
_LONGEST = 110  # characters of a name, of which a file's name has two; file systems take 255
_ON_REPORT = "activation_files"


@dataclass
class Use:
    """What a test did with golden files, as text that can go from one process to another.

    Attributes:
        folder: where those of its test file are.
        owner: what the names of its own begin with.
        used: the files that it compared with or wrote.
        written: those that it wrote.
    """

    folder: str
    owner: str
    used: list[str] = field(default_factory=list)
    written: list[str] = field(default_factory=list)

    def file(self, name: str | None) -> Path:
        """The golden file of the test, or of one of its checks that has a name."""
        return Path(self.folder, f"{self.owner}{'' if name is None else _AND_NAME + _safe(name)}{SUFFIX}")

    def add_to(self, report: Any) -> None:
        """Let the test's report carry it."""
        setattr(report, _ON_REPORT, asdict(self))


def use_of(item: pytest.Item) -> Use:
    """Where a test's golden files are; their names begin with those of its classes and its own, made safe on disk."""
    names = [node.name for node in item.listchain() if isinstance(node, pytest.Class | pytest.Item)]
    return Use(str(item.path.parent / FOLDER / item.path.stem), _safe(".".join(names)))


def _safe(name: str) -> str:
    """A name that is one on disk too; where it is too long, its beginning and a digest of it all."""
    name = quote(name, safe=_PLAIN)
    if len(name) <= _LONGEST:
        return name
    digest = hashlib.sha256(name.encode()).hexdigest()[:16]
    return f"{re.sub('%.?$', '', name[: _LONGEST - 17])}-{digest}"


class GoldenFiles:
    """What all tests of a session did with golden files, and its summary; a plug-in of its own.

    With pytest-xdist tests run in workers: the tests' reports carry what they did, and the workers' output what was
    collected.
    """

    def __init__(self) -> None:
        self._written: set[str] = set()
        self._used: set[str] = set()
        self._passed: set[tuple[str, str]] = set()  # folders and owners
        self._collected: dict[str, list[str]] = {}  # owners by folder, of test files that were collected whole

    @pytest.hookimpl(tryfirst=True)
    def pytest_collection_modifyitems(self, session: pytest.Session, items: list[pytest.Item]) -> None:
        """Collect the tests of test files with golden files, before any are left out; none where tests are named."""
        if not any("::" in argument for argument in session.config.args):
            for use in map(use_of, items):
                if Path(use.folder).is_dir():
                    self._collected.setdefault(use.folder, []).append(use.owner)

    def pytest_runtest_logreport(self, report: Any) -> None:
        """Collect what a test did."""
        if (use := getattr(report, _ON_REPORT, None)) is not None:
            self._used.update(use["used"])
            self._written.update(use["written"])
            if report.passed:
                self._passed.add((use["folder"], use["owner"]))

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        """Send what a worker collected."""
        if hasattr(session.config, "workeroutput"):
            session.config.workeroutput[_ON_REPORT] = self._collected

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any) -> None:
        """Receive what a worker collected; a worker that crashed sends nothing."""
        self._collected.update(getattr(node, "workeroutput", {}).get(_ON_REPORT, {}))

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        """Report which files were written, and which no test needs."""
        tops = {Path(folder).parent for folder in (*self._collected, *(folder for folder, _ in self._passed))}
        unused = [path for top in tops for path in top.glob(f"*/*{SUFFIX}") if self._is_unused(path)]
        for title, paths in (("written", self._written), ("unused: remove them", unused)):
            if paths:
                terminalreporter.section(f"activation files {title}")
                for path in sorted(map(Path, paths)):
                    terminalreporter.line(short_path(path))

    def _is_unused(self, path: Path) -> bool:
        """Whether the file is of a test that passed without it, or of a test or test file that no longer exists."""
        folder, owner = path.parent, path.name.removesuffix(SUFFIX).split(_AND_NAME)[0]
        if str(path) in self._used or path.name.startswith("."):
            return False
        if (owners := self._collected.get(str(folder))) is not None:
            is_gone = owner not in owners
        else:
            is_gone = not (folder.parent.parent / f"{folder.name}.py").exists()
        return is_gone or (str(folder), owner) in self._passed
