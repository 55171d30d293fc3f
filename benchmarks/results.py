"""What was measured, as JSON: the machine, the versions, and each case with its spread. No host name, no path."""

from __future__ import annotations

import json
import math
import os
import platform
from collections.abc import Iterable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import activation_extractor
from benchmarks.counts import Count
from benchmarks.measure import Case, Rounds, Seconds, Spread, median_interval

CLOCKS = ("wall", "cpu")
SYSTEMS = ("floor", "reference_floor", "reference", "ours")


def describe_machine(device: torch.device) -> dict[str, Any]:
    """What the figures depend on, beside the versions; asked before measuring, for the load is that of others."""
    return {
        "processor": processor_name(),
        "cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "system": platform.system(),
        "load": round(os.getloadavg()[0], 2),
        "device": device_name(device),
    }


def describe_versions(others: Iterable[str] = ()) -> dict[str, str]:
    """The versions that the figures belong to; of other distributions, those that are installed."""
    found = {
        "activation_extractor": activation_extractor.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    return found | {name: version(name) for name in others}


def device_name(device: torch.device) -> str:
    """What the device calls itself, as far as torch tells."""
    if device.type == "cpu":
        return "cpu"
    tell = getattr(torch.get_device_module(device), "get_device_name", None)
    return device.type if tell is None else f"{device.type}, {tell()}"


def describe_case(case: Case, rounds: Rounds) -> dict[str, Any]:
    """One case: the ratio, what is added by a call, and the time of a run of each system, by both clocks."""
    added = ("reference", "ours")
    ran = {name: getattr(rounds, name) for name in SYSTEMS if getattr(rounds, name)}
    ratio = {clock: median_interval(rounds.ratios(clock)) for clock in CLOCKS}
    judged = median_interval(rounds.ratios("wall", case.allowed_us))
    return {
        "name": case.name,
        "about": case.about,
        "target": case.target,
        **({"allowed_us": case.allowed_us} if case.allowed_us else {}),
        "is_met": None if case.target is None else judged.low <= case.target,
        "calls_per_run": case.calls,
        "runs_per_timing": case.loops,
        "rounds": len(rounds.ours),
        "ratio": {clock: _plain(spread) for clock, spread in ratio.items()},
        "added_us_per_call": {name: _added(rounds, name, case.calls) for name in added},
        "run_us": {name: _run(timings) for name, timings in ran.items()},
    }


def describe_count(count: Count, value: float) -> dict[str, Any]:
    """Something that was counted."""
    return {
        "name": count.name,
        "about": count.about,
        "limit": count.limit,
        "value": float(f"{value:.4g}"),
        "is_met": None if count.limit is None else value <= count.limit,
    }


def document(
    results: list[dict[str, Any]],
    counts: list[dict[str, Any]],
    machine: dict[str, Any],
    *,
    quick: bool,
    others: Iterable[str] = (),
) -> dict[str, Any]:
    """Everything that one invocation found; an infinite ratio, where the reference added nothing, is None.

    Args:
        results: the cases.
        counts: what was counted.
        machine: where.
        quick: whether with less work.
        others: distributions whose versions the results depend on too.
    """
    about = {"format": 2, "quick": quick, "machine": machine, "versions": describe_versions(others)}
    return {**about, "results": _finite(results), "counts": counts}


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a document."""
    path.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def processor_name() -> str:
    """The processor's model, as the system calls it."""
    return next(_model_names(), platform.processor() or platform.machine())


def _model_names() -> Iterator[str]:
    listing = Path("/proc/cpuinfo")
    for line in listing.read_text(encoding="utf-8").splitlines() if listing.exists() else ():
        if line.startswith("model name"):
            yield line.partition(":")[2].strip()


def _added(rounds: Rounds, system: str, calls: int) -> dict[str, Any]:
    return {clock: _plain(_microseconds(rounds.added(system, clock), calls)) for clock in CLOCKS}


def _run(timings: list[Seconds]) -> dict[str, Any]:
    return {clock: _plain(_microseconds([getattr(one, clock) for one in timings], 1)) for clock in CLOCKS}


def _microseconds(seconds: list[float], calls: int) -> Spread:
    return median_interval([1e6 * one / calls for one in seconds])


def _plain(spread: Spread) -> dict[str, float]:
    return {name: float(f"{value:.4g}") for name, value in vars(spread).items()}


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(member) for key, member in value.items()}
    if isinstance(value, list):
        return [_finite(member) for member in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
