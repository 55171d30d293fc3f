"""The benchmark suite at its smallest size: that it runs, and what it stores and shows. No timing is asserted."""

from __future__ import annotations

import json
import platform
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from models import count_hooks

from activation_extractor import capture

sys.path.insert(0, str(Path(__file__).parents[2]))  # the suite is beside the package, and not installed with it

from benchmarks import __main__ as command
from benchmarks import systems
from benchmarks.cases import all_cases
from benchmarks.counts import COUNTS, Count
from benchmarks.measure import Case, Rounds, Seconds, UnavailableError, measure
from benchmarks.models import small_layers
from benchmarks.report import table
from benchmarks.results import describe_case, describe_count, describe_machine, document, verdict
from benchmarks.sizes import SMALLEST

CPU = torch.device("cpu")
CASES = {case.name: case for case in all_cases(SMALLEST, with_peers=True)}


@pytest.mark.filterwarnings("ignore:The model ran")
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_every_case_runs_once_at_its_smallest_size(case: Case) -> None:
    rounds = measure(case, 1)
    assert len(rounds.ours) == len(rounds.reference) == 1
    assert len(rounds.floor) == (case.floor is not None)
    assert len(rounds.reference_floor) == (case.reference_floor is not None)
    assert min(timing.wall for timing in [*rounds.ours, *rounds.reference, *rounds.floor]) > 0
    assert set(describe_case(case, rounds)["ratio"]) == {"wall", "cpu"}


def test_cases_have_names_of_their_own() -> None:
    assert len(CASES) == len(list(all_cases(SMALLEST, with_peers=True)))


@pytest.mark.filterwarnings("ignore:The model ran")
@pytest.mark.parametrize("name", ["hooked", "captured"])
def test_systems_leave_the_model_as_it_was(name: str) -> None:
    model, x = small_layers(3), torch.randn(4, 16)
    options: Any = {"make_hook": systems.store_itself} if name == "hooked" else {"copy": True}
    with getattr(systems, name)(model, x, torch.no_grad, **options) as run:
        assert torch.equal(run(), model(x))
        assert count_hooks(model) >= 3
    assert count_hooks(model) == 0


def test_both_systems_of_a_captured_call_keep_the_same_values() -> None:
    model, x = small_layers(3), torch.randn(4, 16)
    store: dict[str, torch.Tensor] = {}
    handles = [
        module.register_forward_hook(systems.store_detached_clone(store, name))
        for name, module in model.named_children()
    ]
    with capture(model, "*") as acts:
        model(x)
    for handle in handles:
        handle.remove()
    assert list(acts) == list(store)
    assert all(torch.equal(acts[name], value) and not value.requires_grad for name, value in store.items())


# -- what is stored and shown -----------------------------------------------------------------------------------------


def test_the_command_stores_json_with_machine_versions_and_spread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "QUICK", SMALLEST)
    monkeypatch.setattr(command, "QUICK_ROUNDS", 2)
    file = tmp_path / "results.json"
    command.main(["--quick", "--json", str(file), "--only", "captured_call.*"])
    stored = json.loads(file.read_text(encoding="utf-8"))
    assert set(stored) == {"format", "size", "machine", "versions", "results", "counts", "failed", "left_out"}
    assert (stored["format"], stored["size"]) == (3, "quick")
    assert stored["machine"]["cores"] >= 1
    assert stored["machine"]["processor"]
    assert set(stored["versions"]) == {"activation_extractor", "python", "torch", "transformers"}
    assert [result["name"] for result in stored["results"]] == [name for name in CASES if name.startswith("captured")]
    for result in stored["results"]:
        assert result["rounds"] == 2
        assert set(result["run_us"]) == {"floor", "reference", "ours"}
        for spread in [*result["ratio"].values(), *result["run_us"]["ours"].values()]:
            assert set(spread) == {"median", "low", "high"}
    assert table(stored) in capsys.readouterr().out  # the table needs nothing that was not stored


def test_stored_results_are_shown_and_drawn_and_nothing_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stored = Path(command.__file__).parent / "results/cpu.json"
    monkeypatch.setattr(command, "Suite", None)
    for suffix in ("svg", "png"):
        assert command.main(["--stored", str(stored), "--plot", str(tmp_path / f"plot.{suffix}")]) == 0
        assert table(json.loads(stored.read_text(encoding="utf-8"))) in capsys.readouterr().out
    drawn = (tmp_path / "plot.svg").read_text(encoding="utf-8")
    assert "<svg" in drawn
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_several_stored_files_become_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = Path(command.__file__).parent / "results"
    cpu, disk, other, old = results / "cpu.json", results / "storage_cpu.json", tmp_path / "o", tmp_path / "old"
    assert command.main(["--stored", str(cpu), str(disk), "--json", str(tmp_path / "both.json")]) == 0
    both = json.loads((tmp_path / "both.json").read_text(encoding="utf-8"))
    assert {"layers.1", "store_read.warm_row"} <= {result["name"] for result in both["results"]}
    assert table(both) in capsys.readouterr().out
    content = json.loads(cpu.read_text(encoding="utf-8"))
    other.write_text(json.dumps({**content, "versions": {"torch": "1"}}))
    old.write_text(json.dumps({**content, "format": 2}))
    for files, text in (([cpu, other], "must have the same versions"), ([old], "results of format 2 in")):
        with pytest.raises(SystemExit) as caught:
            command.main(["--stored", *map(str, files)])
        assert caught.value.code == 2
        assert text in capsys.readouterr().err


def test_a_picture_is_the_same_from_the_same_results(tmp_path: Path) -> None:
    stored = Path(command.__file__).parent / "results/cpu.json"
    for name in ("one.svg", "two.svg"):
        command.main(["--stored", str(stored), "--plot", str(tmp_path / name)])
    assert (tmp_path / "one.svg").read_bytes() == (tmp_path / "two.svg").read_bytes()


def test_a_device_that_is_not_there_is_an_error_of_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    for device in ("cuda", "toaster"):
        if device == "cuda" and torch.cuda.is_available():
            continue
        with pytest.raises(SystemExit) as caught:
            command.main(["--device", device])
        assert caught.value.code == 2
        assert f"must be a device that is there, got {device!r}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--json", "nowhere/results.json"], "must be a file in a folder that is there, got 'nowhere/results.json'"),
        (["--plot", "plot.txt"], "must end in .svg or .png, got 'plot.txt'"),
        (["--stored", "nowhere.json"], "must be a file that --json has written, got 'nowhere.json'"),
        (["--stored", __file__], "must be a file that --json has written, got no results in"),
        (["--seconds", "0"], "must be a positive number, got '0'"),
        (["--seconds", "nan"], "must be a positive number, got 'nan'"),
        (["--seconds", "soon"], "must be a positive number, got 'soon'"),
        (["--threads", "0"], "must be a positive whole number, got '0'"),
        (["--only", "nothing"], "--only must match a case, got 'nothing'. Try --only 'captured_call.*'."),
        (["--only", "layers.*", "--only", "lairs.*"], "--only must match a case, got 'lairs.*'"),
        (["--quick", "--smallest"], "not allowed with argument --quick"),
    ],
)
def test_arguments_are_looked_at_before_anything_is_measured(
    arguments: list[str], text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        command.main(arguments)
    assert caught.value.code == 2
    assert text in capsys.readouterr().err


def test_peers_that_are_not_installed_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "QUICK", SMALLEST)
    monkeypatch.setattr(command, "QUICK_ROUNDS", 1)
    monkeypatch.setattr(command, "missing_peers", lambda: ["nnsight", "captum"])
    command.main(["--quick", "--peers", "--only", "peer.cloning_hook"])
    captured = capsys.readouterr()
    assert "not installed, left out: nnsight, captum" in captured.err
    assert "peer.cloning_hook" in captured.out


def test_results_name_neither_the_host_nor_a_path() -> None:
    found = made_document()
    del found["machine"]["processor"]  # may hold a slash of its own
    content = json.dumps(found)
    assert "/" not in content
    assert f'"{platform.node()}"' not in content


def test_an_infinite_ratio_is_stored_as_null_and_shown() -> None:
    rounds = Rounds([Seconds(2.0, 2.0)], [], [Seconds(1.0, 1.0)], [Seconds(3.0, 3.0)])
    found = made_document(results=[describe_case(made_of(None, None, None), rounds)])
    assert found["results"][0]["ratio"]["wall"]["median"] is None
    assert "inf [inf, inf]" in table(found)
    json.dumps(found, allow_nan=False)


def test_a_demand_is_met_by_the_median_and_at_the_edge_when_only_the_lower_end_is_within_it() -> None:
    def judged(*ratios: float) -> Any:
        ours = [Seconds(ratio, ratio) for ratio in ratios]
        rounds = Rounds(reference=[Seconds(1.0, 1.0)] * len(ratios), ours=ours)
        return describe_case(made_of(None, None, None), rounds)

    judgements = [judged(1.1, 1.2, 1.3), judged(1.2, 1.21, 1.3), judged(1.21, 1.3, 1.3)]  # the demand is 1.2
    assert [one["verdict"] for one in judgements] == ["met", "at the edge", "missed"]
    shown = table(made_document(results=judgements)).splitlines()[-3:]
    assert [line.partition("  1.20  ")[2].strip() for line in shown] == ["met", "at the edge", "MISSED"]


@pytest.mark.parametrize(
    ("allowed_us", "judged", "shown"),
    [(0.0, "missed", "1.20  MISSED"), (40.0, "missed", "1.20 + 40 us  MISSED"), (60.0, "met", "1.20 + 60 us  met")],
)
def test_a_time_may_be_allowed_beside_the_ratio_that_is_demanded(allowed_us: float, judged: str, shown: str) -> None:
    rounds = Rounds(reference=[Seconds(1e-3, 1e-3)], ours=[Seconds(1.25e-3, 1.25e-3)])
    result = describe_case(replace(made_of(None, None, None), allowed_us=allowed_us), rounds)
    assert (result["verdict"], result["ratio"]["wall"]["median"]) == (judged, 1.25)
    assert table(made_document(results=[result])).endswith(f"  {shown}")


def test_an_infinite_ratio_as_it_is_stored_is_judged_as_one() -> None:
    assert verdict(None, 1.0, 1.2) == "at the edge"
    assert verdict(None, None, 1.2) == "missed"
    assert verdict(None, None, None) is None


def test_a_pattern_that_matches_no_case_of_its_group_says_so() -> None:
    with pytest.raises(SystemExit, match="must match a case, got 'captured_call.nothing'"):
        command.main(["--only", "captured_call.nothing"])


def made_document(**found: Any) -> dict[str, Any]:
    return document(describe_machine(CPU), size="smallest", **found)


def made_of(ours: Any, reference: Any, floor: Any) -> Case:
    return Case("case", "about", ours, reference, floor=floor, calls=1, loops=2, target=1.2)


# -- what is counted --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", COUNTS, ids=[count.name for count in COUNTS])
def test_every_count_is_counted_once_at_its_smallest_size(count: Count) -> None:
    if count.name.startswith(("device_memory", "llama_memory", "synchronisations")):
        with pytest.raises(UnavailableError, match="needs a"):
            count.count(SMALLEST)
        return
    value = count.count(SMALLEST)
    described = describe_count(count, value)
    verdict = None if count.limit is None else "met" if value <= count.limit else "missed"
    assert described["verdict"] == verdict
    assert count.name in table(made_document(counts=[described]))


def test_a_count_above_its_limit_is_missed() -> None:
    free = describe_count(Count("a.c", "pears", None, lambda size: 0.0), 7.0)
    assert free["verdict"] is None
    assert table(made_document(counts=[free])).splitlines()[-1].split() == ["a.c", "7.00", "-", "pears"]
    count = Count("a.b", "apples", 2.0, lambda size: 0.0)
    judged = [describe_count(count, value) for value in (1.0, 2.0, 2.1)]
    assert [one["verdict"] for one in judged] == ["met", "met", "missed"]
    last = table(made_document(counts=judged)).splitlines()[-1]
    assert last.split() == ["a.b", "2.10", "2.00", "MISSED", "apples"]
