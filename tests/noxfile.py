"""Run the suite on each combination of releases and put what it found into the README's table::

    pip install nox uv
    nox -f tests/noxfile.py                                    # all of them whose interpreters are there
    nox -f tests/noxfile.py -s torch-2.6-python-3.10 -- -x     # one, with options for pytest

A torch that is not at hand is a download of some 3 GB. Where there is no uv, pip does it.
"""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import nox

sys.path.insert(0, str(Path(__file__).parent))
from versions import COMBINATIONS, MODELS, ROOT, Combination, record

nox.options.envdir = str(ROOT / ".nox")
nox.options.default_venv_backend = "uv|virtualenv"
nox.options.reuse_venv = "yes"
nox.options.error_on_missing_interpreters = False
_VERSIONS = (
    "import json, platform; from importlib.metadata import distributions; "
    "print(json.dumps({'python': platform.python_version(), "
    "**{one.metadata['Name'].lower(): one.version for one in distributions()}}))"
)


def run_suite(session: nox.Session, combination: Combination) -> None:
    """Install, run, record."""
    session.chdir(ROOT)
    session.install("-e", ".[test]", *combination.pins)
    session.install("--no-deps", *MODELS)
    with TemporaryDirectory() as folder:  # not in the checkout, whose settings the plug-in would find
        report = Path(folder, "report.xml")
        options = ["-q", "-n", "auto", "-p", "no:cacheprovider", f"--junitxml={report}"]
        options += session.posargs or ["--ignore=tests/test_versions.py"]  # which is about the table
        session.run("python", "-m", "pytest", *options, env={"HF_HUB_OFFLINE": "1"}, success_codes=[0, 1])
        if not session.posargs:  # of part of the suite there is nothing to tell
            record(combination, json.loads(session.run("python", "-c", _VERSIONS, silent=True)), report)


for combination in COMBINATIONS:
    nox.session(partial(run_suite, combination=combination), python=combination.python, name=combination.name)
