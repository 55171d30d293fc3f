"""The plug-in as pytest finds it: without configuration, and free for those who do not use it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

from activation_extractor import pytest_plugin

ROOT = Path(__file__).parents[2]
HEAVY = "sorted({'torch', 'numpy', 'safetensors'} & {*sys.modules})"


def run(folder: Path, *arguments: str, **environment: str) -> str:
    """What a fresh process prints."""
    done = subprocess.run(
        [sys.executable, "-m", *arguments],
        cwd=folder,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_pytest_finds_it_and_neither_torch_nor_numpy_is_imported(tmp_path):
    (tmp_path / "conftest.py").write_text(f"import sys\ndef pytest_unconfigure(): print('heavy:', {HEAVY})\n")
    (tmp_path / "test_it.py").write_text(
        "def test_it(pytestconfig):\n    assert pytestconfig.pluginmanager.hasplugin('activation_extractor')\n"
    )
    assert "heavy: []" in run(tmp_path, "pytest", "-q")


def test_it_is_found_by_its_entry_point():
    (found,) = entry_points(group="pytest11", name="activation_extractor")
    assert found.load() is pytest_plugin


def test_its_types_are_public_and_documented():
    assert pytest_plugin.__all__ == ["ActivationSnapshot", "CaptureFixture"]
    for name in pytest_plugin.__all__:
        assert getattr(pytest_plugin, name).__doc__


def test_its_fixtures_are_documented(pytester):
    result = pytester.runpytest_inprocess("--fixtures")
    result.stdout.fnmatch_lines(["activation_snapshot -- *", "*activation_snapshot.check(acts)*golden file*"])
    result.stdout.fnmatch_lines(["capture_activations -- *", "*begins at once, and ends with the test*"])


def test_coverage_of_the_package_begins_before_it_is_imported(tmp_path):
    test = "tests/test_init.py::test_a_name_that_is_not_there_is_the_usual_error"
    report = f"json:{tmp_path / 'result.json'}"
    arguments = ["pytest", "-q", "-p", "no:cacheprovider", test, "--cov", f"--cov-report={report}"]
    run(ROOT, *arguments, COVERAGE_FILE=str(tmp_path / "data"))
    files = json.loads((tmp_path / "result.json").read_text())["files"]
    for name in ("__init__", "pytest_plugin/__init__", "pytest_plugin/_golden", "_display", "errors"):
        path = ROOT / "activation_extractor" / f"{name}.py"
        ran = files[str(path.relative_to(ROOT))]["executed_lines"]
        lines = path.read_text(encoding="utf-8").splitlines()
        top = {
            number for number, line in enumerate(lines, 1) if line.startswith(("import ", "from ", "def ", "class "))
        }
        assert top <= set(ran), name


def test_it_can_be_turned_off(pytester):
    result = pytester.runpytest_inprocess("-p", "no:activation_extractor", "--fixtures")
    result.stdout.no_fnmatch_line("*capture_activations*")
