"""Running the benchmark suite: what fails costs itself alone, time is bounded, and what is known is stored at once."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[2]))  # the suite is beside the package, and not installed with it

from benchmarks import __main__ as command
from benchmarks.cases import all_groups
from benchmarks.counts import Count
from benchmarks.measure import LEAST_ROUNDS, Case, Group, UnavailableError, measure, require
from benchmarks.results import joined, write_json
from benchmarks.sizes import SMALLEST, Size
from benchmarks.suite import NO_TIME, Budget, Found, Suite, may_match


class Clock:
    """Stands in for `time.monotonic` in the suite; `spend` lets seconds go by."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now

    def spend(self, seconds: float) -> Callable[[], None]:
        def run() -> None:
            self.now += seconds

        return run


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    for module in ("measure", "suite"):
        monkeypatch.setattr(f"benchmarks.{module}.monotonic", clock)
    return clock


def fails() -> None:
    raise RuntimeError("no such kernel\nand a long story")


def case(name: str, run: Callable[[], object]) -> Case:
    @contextmanager
    def system() -> Iterator[Any]:
        yield run

    @contextmanager
    def reference() -> Iterator[Any]:
        yield lambda: None

    return Case(name, "about", system, reference, calls=1, loops=1)


def group(name: str, *runs: Callable[[], object]) -> Group:
    return name, lambda size: [case(f"{name}.{number}", run) for number, run in enumerate(runs)]


def ran(*groups: Group, counts: Iterable[Count] = (), seconds: float = math.inf, rounds: int = 1) -> Found:
    return Suite(SMALLEST, rounds, None, lambda found: None, seconds).run(groups, list(counts))


def names(entries: list[dict[str, Any]]) -> list[str]:
    return [entry["name"] for entry in entries]


def test_a_case_that_raises_is_listed_and_the_others_go_on() -> None:
    found = ran(group("a", fails, int), group("b", int), counts=[Count("c", "pears", None, lambda size: 1.0)])
    assert found.failed == [{"name": "a.0", "error": "RuntimeError: no such kernel"}]
    assert (names(found.results), names(found.counts)) == (["a.1", "b.0"], ["c"])


def test_a_group_that_raises_keeps_the_cases_it_gave_before() -> None:
    def broken(size: Size) -> Iterator[Case]:
        yield case("a.0", int)
        raise ValueError

    found = ran(("a", broken), group("b", int))
    assert found.failed == [{"name": "a.*", "error": "ValueError"}]
    assert names(found.results) == ["a.0", "b.0"]


def test_what_is_not_here_is_left_out_and_no_failure() -> None:
    def unavailable(size: Size) -> list[Case]:
        raise UnavailableError("needs an accelerator")

    found = ran(("a", unavailable), ("a", unavailable), group("b", int))
    assert found.left_out == [{"name": "a.*", "why": "needs an accelerator"}]
    assert (names(found.results), found.failed) == (["b.0"], [])


def test_a_package_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)  # type: ignore[arg-type]  # an import of it raises
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UnavailableError, match="needs typer, which is not installed"):
        require("typer")
    left_out = []
    for name, make in all_groups():
        try:
            list(make(SMALLEST))
        except UnavailableError as error:
            left_out.append((name, str(error)))
    reason = "needs transformers, which is not installed"
    assert {("transformer", reason), ("extract", reason), ("llama", reason), ("compiled", reason)} <= set(left_out)
    assert ("start_up", "needs typer, which is not installed") in left_out


def test_everything_is_saved_whenever_more_is_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, seen = tmp_path / "results.json", []

    def look() -> None:
        seen.append({key: names(value) for key, value in read(file).items() if key in ("results", "failed")})

    monkeypatch.setattr(command, "all_groups", lambda with_peers: [group("a", int, look, fails), group("b", look)])
    monkeypatch.setattr(command, "COUNTS", [])
    assert command.main(["--smallest", "--json", str(file)]) == 1
    assert seen[0] == {"results": ["a.0"], "failed": []}
    assert seen[-1] == {"results": ["a.0", "a.1"], "failed": ["a.2"]}
    assert names(read(file)["results"]) == ["a.0", "a.1", "b.0"]


def test_a_failure_is_shown_and_the_exit_code_is_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "all_groups", lambda with_peers: [group("a", fails)])
    assert command.main(["--smallest", "--only", "a.*"]) == 1
    captured = capsys.readouterr()
    assert captured.out.splitlines()[-2:] == [
        "failed                         error",
        "a.0     RuntimeError: no such kernel",
    ]
    assert "and a long story" in captured.err  # the whole of it, with where it came from


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(source: Any, target: Any) -> None:
        raise KeyboardInterrupt

    file = tmp_path / "results.json"
    write_json(file, {"number": 1})
    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        write_json(file, {"number": 2})
    assert read(file) == {"number": 1}


# -- time -------------------------------------------------------------------------------------------------------------


def test_cases_that_were_not_begun_in_time_are_listed(clock: Clock) -> None:
    late = Count("d", "pears", None, lambda size: 1.0)
    found = ran(group("a", int, clock.spend(30), int), group("b", int), counts=[late], seconds=50)
    assert names(found.results) == ["a.0", "a.1"]  # which took 60 seconds
    assert found.left_out == [{"name": name, "why": NO_TIME} for name in ("a.2", "b.*", "d")]


def test_a_case_begins_no_round_when_its_share_is_over_but_has_those_that_an_interval_needs(clock: Clock) -> None:
    slow, quick = case("a", clock.spend(10)), case("b", clock.spend(1))
    assert len(measure(slow, 20, seconds=5).ours) == LEAST_ROUNDS == 6
    assert len(measure(quick, 20, seconds=9).ours) == 8  # and one to warm up
    assert len(measure(quick, 4, seconds=1).ours) == 4
    assert len(measure(quick, 20).ours) == 20


def test_groups_share_the_time_that_is_left_equally_and_so_do_their_cases(clock: Clock) -> None:
    found = ran(
        group("a", clock.spend(1), clock.spend(1)),
        group("b", clock.spend(1)),
        counts=[Count("c", "pears", None, lambda size: 1.0)],
        seconds=120,
        rounds=99,
    )
    # 120 seconds by three are 40, by two are 20; of the 80 that are left the second group has 40
    assert [result["rounds"] for result in found.results] == [19, 19, 39]


def test_time_that_was_not_needed_goes_to_those_behind(clock: Clock) -> None:
    budget = Budget(100)
    assert budget.share(4).left == 25
    clock.spend(10)()
    assert budget.share(3).left == 30
    clock.spend(200)()
    assert budget.left == budget.share(2).left == 0
    assert Budget().share(2).left == math.inf


# -- what is wanted ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pattern", "is_meant"),
    [
        ("a_group.*", True),
        ("a_group.case", True),
        ("a_gr*", True),
        ("*.case", True),
        ("?_group.case", True),
        ("a_group.[xy]", True),
        ("a_group", True),  # matches no case, which is seen when they are made
        ("another.*", False),
        ("a_groups.*", False),
        ("b*", False),
    ],
)
def test_a_group_is_made_only_if_a_pattern_may_be_meant_for_it(pattern: str, is_meant: bool) -> None:
    assert may_match("a_group", ["nothing", pattern]) == is_meant
    assert may_match("a_group", None)


def test_groups_that_are_not_wanted_are_not_made(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(size: Size) -> list[Case]:
        raise AssertionError

    monkeypatch.setattr(command, "all_groups", lambda with_peers: [("a", refuses), group("b", int)])
    assert command.main(["--smallest", "--only", "b.*"]) == 0


def test_names_begin_with_that_of_their_group() -> None:
    for name, make in all_groups(with_peers=True):
        try:
            assert all(one.name.startswith(f"{name}.") for one in make(SMALLEST))
        except UnavailableError:
            assert name in ("copy", "tokens")  # which need a device, and SAELens


# -- several documents ------------------------------------------------------------------------------------------------


def test_documents_of_one_machine_are_joined() -> None:
    first, second = made(load=1, results=[1], failed=[2]), made(load=2, results=[3], left_out=[4])
    assert joined([first, second]) == made(load=2, results=[1, 3], failed=[2], left_out=[4])


@pytest.mark.parametrize(("name", "value"), [("machine", {"load": 1, "cores": 3}), ("versions", {}), ("size", "quick")])
def test_documents_that_belong_to_different_things_are_not(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"must have the same {name}"):
        joined([made(), {**made(), name: value}])


def made(load: float = 1, **listed: list[Any]) -> dict[str, Any]:
    about = {"size": "whole", "machine": {"load": load, "cores": 2}, "versions": {"torch": "2"}}
    return {**about, "results": [], "counts": [], "failed": [], "left_out": [], **listed}


def read(file: Path) -> Any:
    return json.loads(file.read_text(encoding="utf-8"))
