"""Golden files: where a test's activations are kept beside it, and which of them no test needs any more.

Everything here is light: pytest loads it for everybody.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
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


def owner_of(item: pytest.Item) -> str:
    """What the golden files of a test begin with: the names of its classes and its own, safe on disk."""
    return _safe(".".join(one.name for one in item.listchain() if isinstance(one, pytest.Class | pytest.Item)))


def folder_of(item: pytest.Item) -> Path:
    """Where the golden files of a test's file are."""
    return item.path.parent / FOLDER / item.path.stem


def _safe(name: str) -> str:
    """A name that is one on disk too; where it is too long, its beginning and a digest of it all."""
    name = quote(name, safe=_PLAIN)
    if len(name) <= _LONGEST:
        return name
    digest = hashlib.sha256(name.encode()).hexdigest()[:16]
    return f"{re.sub('%.?$', '', name[: _LONGEST - 17])}-{digest}"


@dataclass
class Use:
    """What a test did with golden files.

    Attributes:
        folder: where those of its test file are.
        owner: what its own begin with.
        used: the files that it compared with or wrote.
        written: those that it wrote.
    """

    folder: Path
    owner: str
    used: list[Path] = field(default_factory=list)
    written: list[Path] = field(default_factory=list)

    def file(self, name: str | None) -> Path:
        """The golden file of the test, or of one of its checks that has a name."""
        return self.folder / f"{self.owner}{'' if name is None else _AND_NAME + _safe(name)}{SUFFIX}"


class GoldenFiles:
    """What all tests of a session did with golden files, told when it has ended; a plug-in of its own.

    With pytest-xdist tests run in workers: what they did comes with the tests' reports, and what there is in whole test
    files with the workers' output.
    """

    def __init__(self) -> None:
        self._written: set[Path] = set()
        self._used: set[Path] = set()
        self._passed: set[tuple[Path, str]] = set()
        self._collected: dict[str, list[str]] = {}  # owners by folder, of test files that were collected whole
        self._with_files: dict[Path, bool] = {}

    def has_files(self, item: pytest.Item) -> bool:
        """Whether there are golden files for a test's file."""
        if item.path not in self._with_files:
            self._with_files[item.path] = folder_of(item).is_dir()
        return self._with_files[item.path]

    @pytest.hookimpl(tryfirst=True)
    def pytest_collection_modifyitems(self, session: pytest.Session, items: list[pytest.Item]) -> None:
        """Note the tests of test files with golden files, before any are left out; not where single tests are named."""
        if not any("::" in argument for argument in session.config.args):
            for item in filter(self.has_files, items):
                self._collected.setdefault(str(folder_of(item)), []).append(owner_of(item))

    def pytest_runtest_logreport(self, report: Any) -> None:
        """Take in what a test did."""
        use = getattr(report, _ON_REPORT, None)
        if use is not None:
            self._used.update(map(Path, use["used"]))
            self._written.update(map(Path, use["written"]))
            if report.passed:
                self._passed.add((Path(use["folder"]), use["owner"]))

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        """Hand on what a worker collected."""
        if hasattr(session.config, "workeroutput"):
            session.config.workeroutput[_ON_REPORT] = self._collected

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any) -> None:
        """Take in what a worker collected; one that crashed tells nothing."""
        self._collected.update(getattr(node, "workeroutput", {}).get(_ON_REPORT, {}))

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        """Say which files were written, and which no test needs."""
        for title, paths in (("written", sorted(self._written)), ("unused: remove them", self._unused())):
            if paths:
                terminalreporter.section(f"activation files {title}")
                for path in paths:
                    terminalreporter.line(short_path(path))

    def _unused(self) -> list[Path]:
        """The files of tests that passed without them, and of tests and test files that are not there any more."""
        folders = {folder for folder, _ in self._passed} | set(map(Path, self._collected))
        found = [path for folder in folders for path in _files(folder) if self._is_unused(path)]
        for above in {folder.parent for folder in folders}:
            found += [path for folder in _entries(above) if not _test_file(folder).exists() for path in _files(folder)]
        return sorted(set(found) - self._used)

    def _is_unused(self, path: Path) -> bool:
        folder, owner = path.parent, path.name.removesuffix(SUFFIX).split(_AND_NAME)[0]
        owners = self._collected.get(str(folder))
        return (owners is not None and owner not in owners) or (folder, owner) in self._passed


def note_use(report: Any, use: Use) -> None:
    """Let a test's report carry what it did, also from one process to another."""
    paths = {"used": list(map(str, use.used)), "written": list(map(str, use.written))}
    setattr(report, _ON_REPORT, {"folder": str(use.folder), "owner": use.owner, **paths})


def _files(folder: Path) -> Iterator[Path]:
    return (path for path in _entries(folder) if path.name.endswith(SUFFIX) and not path.name.startswith("."))


def _entries(folder: Path) -> list[Path]:
    return sorted(folder.iterdir()) if folder.is_dir() else []


def _test_file(folder: Path) -> Path:
    return folder.parent.parent / f"{folder.name}.py"
