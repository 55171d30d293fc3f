"""The pages show what is stored, and a command draws them anew."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2]))  # the suite is beside the package, and not installed with it

from benchmarks import page
from benchmarks.report import plot, table
from benchmarks.results import read_json, verdict

STORED = sorted(path.stem for path in page.HERE.glob("results/*.json"))


@pytest.mark.parametrize("name", STORED)
def test_the_page_shows_what_is_stored(name: str) -> None:
    assert table(read_json(page.stored(name))) in page.PAGE.read_text(encoding="utf-8")


def test_pages_are_redrawn_from_what_is_stored() -> None:
    text = page.PAGE.read_text(encoding="utf-8")
    stale = re.sub(r"\d\.\d\d \[", "9.99 [", text)
    assert stale != text
    assert page.redrawn(stale) == text == page.redrawn(text)
    front = page.FRONT_PAGE.read_text(encoding="utf-8")
    stale = re.sub(r"\d\.\d\d \[", "9.99 [", front)
    assert stale != front
    assert page.redrawn_front(stale) == front == page.redrawn_front(front)


def test_a_table_is_drawn_into_an_empty_block() -> None:
    text = "Drawn from [results/cpu.json](results/cpu.json).\n\n```\n```\n\nAnd so on.\n"
    drawn = page.redrawn(text)
    assert drawn == text.replace("```\n```", f"```\n{table(read_json(page.stored('cpu')))}\n```")


def test_the_picture_is_that_of_the_stored_results(tmp_path: Path) -> None:
    plot(read_json(page.stored("cpu")), tmp_path / "cpu.svg")
    drawn, stored = (path.read_text(encoding="utf-8") for path in (tmp_path / "cpu.svg", page.HERE / "results/cpu.svg"))
    assert re.findall("<!-- (.*?) -->", drawn) == re.findall("<!-- (.*?) -->", stored)  # its texts


@pytest.mark.parametrize("name", STORED)
def test_stored_verdicts_are_those_of_the_stored_intervals(name: str) -> None:
    found = read_json(page.stored(name))
    for result in found["results"]:
        ratio = result["ratio"]["wall"]
        by_ratio = verdict(ratio["median"], ratio["low"], result["target"])
        assert result["verdict"] in (by_ratio, "met" if "allowed_us" in result else by_ratio)  # which needs every round
    for count in found["counts"]:
        assert count["verdict"] == verdict(count["value"], count["value"], count["limit"])
