"""The README's table of versions says what was run, and the lower bounds are among it."""

from __future__ import annotations

import json
import re

import pytest
import versions

PYPROJECT = (versions.ROOT / "pyproject.toml").read_text(encoding="utf-8")
BOUNDS = re.findall(r'"([A-Za-z_-]+)>=([0-9.]+)"', PYPROJECT.partition("\nlint = ")[0])


def test_the_table_of_the_readme_is_that_of_what_was_run():
    assert versions.BEGIN + versions.table() + versions.END in (versions.ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(("name", "bound"), BOUNDS)
def test_each_lower_bound_is_a_release_that_the_suite_was_run_on(name, bound):
    ran = versions.read()[versions.OLDEST.name]["versions"][name]
    assert f"{ran}.".startswith(f"{bound}.")


def test_the_oldest_python_is_the_lower_bound_and_one_that_the_suite_was_run_on():
    assert f'requires-python = ">={versions.OLDEST.python}"' in PYPROJECT
    assert versions.read()[versions.OLDEST.name]["versions"]["python"].startswith(f"{versions.OLDEST.python}.")


def test_six_combinations_were_run_and_none_failed():
    ran = versions.read()
    assert list(ran) == [one.name for one in versions.COMBINATIONS]
    assert len(ran) >= 6
    assert {name: result["failed"] for name, result in ran.items()} == dict.fromkeys(ran, 0)


def test_what_a_run_found_is_stored_in_its_place_and_drawn(tmp_path, monkeypatch):
    (tmp_path / "README.md").write_text(f"before\n{versions.BEGIN}old\n{versions.END}behind\n", encoding="utf-8")
    (tmp_path / "report.xml").write_text(
        '<testsuites><testsuite name="pytest" errors="1" failures="2" skipped="3" tests="1010"/></testsuites>'
    )
    monkeypatch.setattr(versions, "ROOT", tmp_path)
    monkeypatch.setattr(versions, "RESULTS", tmp_path / "versions.json")
    names = (*versions.COLUMNS, *(pin.partition("==")[0] for pin in versions.OLDEST.pins))
    for combination in (versions.COMBINATIONS[1], versions.OLDEST):
        found = {**dict.fromkeys(names, "1.0+cpu"), "python": combination.python, "somebody-elses": "1"}
        found.pop("click")
        versions.record(combination, found, tmp_path / "report.xml")
    stored = json.loads((tmp_path / "versions.json").read_text())
    assert list(stored) == [versions.OLDEST.name, versions.COMBINATIONS[1].name]
    assert set(stored[versions.OLDEST.name]["versions"]) == set(names) - {"click"}
    row = "| 1.0 | 3.10 | 1.0 | 1.0 | 1.0 | 1.0 | 1,004 | 3 | 3 |"
    lines = (tmp_path / "README.md").read_text().splitlines()
    assert [lines[0], lines[-1]] == ["before", "behind"]
    assert lines[2].startswith("| torch | Python |")
    assert lines[4] == row
    assert lines[5] == row.replace("3.10", "3.13")
    assert len(lines) == 8
