"""The script that measures a GPU in one command, on whatever is here: all of it once, and what becomes of a part."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2]))  # the suite is beside the package, and not installed with it

from benchmarks.report import table
from benchmarks.results import joined, read_json

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "benchmarks/on_gpu.sh"
PARTS = ["2_hooks.json", "3_device.json", "4_llama.json", "5_compiled.json", "6_rest.json"]
FILES = {"1_tests.txt", *PARTS, "log.txt"}
GROUPS = {"captured_call", "pooled_call", "copy", "device_memory", "synchronisations", "llama", "llama_memory"}
GROUPS |= {"compiled", "taps", "set_up", "block", "transformer", "early_stop", "cnn", "generate", "layers", "threads"}
GROUPS |= {"extract", "save", "peer"}

# Stands in for Python: it finds no GPU, and does at once what a part would do. {} is what it does for some parts.
STAND_IN = """#!/usr/bin/env bash
while [ "$1" != --json ] && [ $# -gt 0 ]; do case $1 in -c) echo cpu; exit;; esac; shift; done
case $2 in
  {}
  ?*) echo '"whole"' > "$2"; echo "measured $(basename "$2")";;
  *) echo "2 skipped";;
esac
"""


def run(*arguments: str | Path, python: str | Path = sys.executable) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["bash", SCRIPT, *arguments], **options(python), capture_output=True)


def options(python: str | Path) -> dict:
    return {"env": os.environ | {"PYTHON": str(python)}, "text": True}


def stand_in(folder: Path, some_parts: str) -> Path:
    path = folder / "python"
    path.write_text(STAND_IN.replace("{}", some_parts))
    path.chmod(0o755)
    return path


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_every_part_writes_its_file_and_all_of_them_make_one_document(tmp_path: Path) -> None:
    folder = tmp_path / "figures"
    done = run("--quick", folder)
    assert done.returncode == 0, done.stdout + done.stderr + (folder / "log.txt").read_text()
    assert names(folder) == FILES
    assert len(FILES) < 8  # one more while it is written
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+", name) for name in FILES)
    assert re.search(r"\d+ (passed|skipped)", (folder / "1_tests.txt").read_text())
    documents = [read_json(folder / name) for name in PARTS]
    whole = joined(documents)
    found = {entry["name"].split(".")[0] for key in ("results", "counts", "left_out") for entry in whole[key]}
    assert found == GROUPS
    assert whole["failed"] == []
    assert all(table(one) in done.stdout for one in documents)


def test_a_run_that_is_killed_leaves_what_it_had_found(tmp_path: Path) -> None:
    folder = tmp_path / "figures"
    real = (
        f'*6_rest.json) exec {sys.executable} -m benchmarks --smallest --only "extract.*" --only "save.*" --json "$2";;'
    )
    script = ["bash", SCRIPT, "--quick", folder]
    process = subprocess.Popen(script, **options(stand_in(tmp_path, real)), stdout=subprocess.DEVNULL)
    last, deadline = folder / "6_rest.json", time.monotonic() + 60
    while not (last.exists() and read_json(last)["results"]):
        assert process.poll() is None, (folder / "log.txt").read_text()
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.terminate()
    assert process.wait(timeout=10) == 143  # when the part has ended too
    assert names(folder) - {"6_rest.json.tmp"} == FILES
    assert all((folder / name).read_text() == '"whole"\n' for name in PARTS[:-1])
    found = read_json(last)
    assert 1 <= len(found["results"]) < 4
    time.sleep(0.5)
    assert read_json(last) == found


@pytest.mark.parametrize("ending", ["exit 1", "kill -SEGV $$"])
def test_a_part_that_fails_costs_only_itself(tmp_path: Path, ending: str) -> None:
    folder = tmp_path / "figures"
    done = run(folder, "--quick", python=stand_in(tmp_path, f"*3_device.json) echo why >&2; {ending};;"))
    assert done.returncode == 1
    assert names(folder) == FILES - {"3_device.json"}
    assert "measured 6_rest.json" in done.stdout
    assert "Failed: 3_device. What was found is stored; log.txt says why." in done.stderr
    assert "== 3_device\nwhy\n" in (folder / "log.txt").read_text()


def test_a_part_that_takes_too_long_costs_only_itself(tmp_path: Path) -> None:
    folder = tmp_path / "figures"
    fast = tmp_path / "benchmarks/on_gpu.sh"
    fast.parent.mkdir()
    fast.write_text(
        SCRIPT.read_text().replace("late_seconds=20", "late_seconds=1").replace("3_device 50", "3_device 1")
    )
    python = stand_in(tmp_path, "*3_device.json) sleep 60;;")
    done = subprocess.run(["bash", fast, folder, "--quick"], **options(python), capture_output=True)
    assert done.returncode == 1
    assert names(folder) == FILES - {"3_device.json"}
    assert "3_device was stopped: its time was over." in done.stdout


def test_all_time_that_parts_may_take_is_less_than_eight_minutes() -> None:
    text = SCRIPT.read_text()
    assert "most_seconds=470" in text
    parts = [int(number) for number in re.findall(r"^(?:bounded|measure) \w+ (\d+)", text, re.MULTILINE)]
    assert len(parts) == 5
    assert sum(parts) < 470 - 20


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--slow"], "The arguments must be [FOLDER] [--quick], got '--slow'."),
        ([""], "The arguments must be [FOLDER] [--quick], got ''."),
        (["a", "b"], "There must be one FOLDER, got 'a' and 'b'."),
        ([ROOT, "--quick"], f"FOLDER must be new or empty, got '{ROOT}'. Name another one."),
        ([SCRIPT], f"FOLDER must be a folder that can be made, got '{SCRIPT}'."),
    ],
)
def test_arguments_are_looked_at_first(arguments: list[str | Path], text: str) -> None:
    done = run(*arguments, python="/bin/false")
    assert (done.returncode, done.stderr.splitlines()[-1]) == (2, text)


def test_a_python_that_is_not_there_or_has_no_torch_is_named(tmp_path: Path) -> None:
    done = run("--quick", tmp_path / "a", python="no-such-python")
    assert (done.returncode, done.stderr) == (2, "PYTHON must be a Python, got 'no-such-python'.\n")
    done = run("--quick", tmp_path / "b", python="/bin/false")
    assert done.returncode == 2
    assert "PYTHON must be able to import torch, and '/bin/false' is not" in done.stderr


def test_without_a_gpu_the_whole_sizes_are_refused(tmp_path: Path) -> None:
    done = run(tmp_path / "a", python=stand_in(tmp_path, ""))
    assert (done.returncode, done.stderr) == (2, "torch finds no GPU here. With --quick the CPU will do.\n")


def test_no_test_of_a_gpu_is_anywhere_else_than_where_the_script_looks() -> None:
    files = Path(__file__).parents[1].rglob("test_*.py")
    marked = {path.name for path in files if "pytest.mark.gpu" in path.read_text()}
    assert {name for name in marked if not name.startswith("test_gpu")} == {Path(__file__).name}
    assert len(marked) > 2
