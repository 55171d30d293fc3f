"""What was measured, as JSON: the machine, the versions, and each case with its spread. No host name, no path."""

from __future__ import annotations

import json
import math
import os
import platform
from collections.abc import Iterable, Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import activation_extractor
from benchmarks.counts import Count
from benchmarks.measure import Case, Rounds, Seconds, Spread, median_interval

FORMAT = 3
CLOCKS = ("wall", "cpu")
SYSTEMS = ("floor", "reference_floor", "reference", "second_reference", "ours")


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
    return found | {name: number for name in others if (number := _version(name)) is not None}


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
        "verdict": verdict(judged.median, judged.low, case.target),
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
        "verdict": verdict(value, value, count.limit),
    }


def describe_failure(name: str, error: BaseException) -> dict[str, str]:
    """A case, or a group of them, that raised: the error's type and the first line of its text."""
    first, *_ = [*str(error).strip().splitlines(), ""]
    return {"name": name, "error": f"{type(error).__name__}: {first}" if first else type(error).__name__}


def verdict(median: float | None, low: float | None, target: float | None) -> str | None:
    """``"met"`` when the median is within the target, ``"at the edge"`` when only the interval's lower end is.

    None where nothing is demanded. A median or end of None, as stored documents have it, is infinite.
    """
    if target is None:
        return None
    if median is not None and median <= target:
        return "met"
    return "at the edge" if low is not None and low <= target else "missed"


def document(
    machine: dict[str, Any],
    *,
    size: str,
    results: Sequence[dict[str, Any]] = (),
    counts: Sequence[dict[str, Any]] = (),
    failed: Sequence[dict[str, str]] = (),
    left_out: Sequence[dict[str, str]] = (),
    others: Iterable[str] = (),
) -> dict[str, Any]:
    """Everything that one invocation found; an infinite ratio, where the reference added nothing, is None.

    Args:
        machine: where.
        size: how much work the cases were, ``"whole"``, ``"quick"`` or ``"smallest"``.
        results: the cases.
        counts: what was counted.
        failed: the cases that raised, with their errors.
        left_out: the cases that were not begun, with the reasons.
        others: distributions whose versions the results depend on too.
    """
    about = {"format": FORMAT, "size": size, "machine": machine, "versions": describe_versions(others)}
    found = {"results": results, "counts": counts, "failed": failed, "left_out": left_out}
    return {**about, **{name: [_finite(one) for one in listed] for name, listed in found.items()}}


def joined(documents: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The documents of several runs as one; the load is the highest.

    Raises:
        ValueError: they are of different machines, versions or sizes.
    """
    load = max(one["machine"]["load"] for one in documents)
    about = [{**one, "machine": {**one["machine"], "load": load}} for one in documents]
    for name in ("machine", "versions", "size"):
        if any(one[name] != about[0][name] for one in about):
            raise ValueError(f"Results that are joined must have the same {name}, got different ones.")
    listed = ("results", "counts", "failed", "left_out")
    return {**about[0], **{name: [entry for one in documents for entry in one[name]] for name in listed}}


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a document; a process that is killed meanwhile leaves the file as it was."""
    draft = path.with_name(f"{path.name}.tmp")
    draft.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    os.replace(draft, path)


def read_json(path: Path) -> dict[str, Any]:
    """Read a document.

    Raises:
        ValueError: the file holds none, or one of another format.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        found = content["format"]
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError("no results") from error
    if found != FORMAT:
        raise ValueError(f"results of format {found}")
    return dict(content)


def processor_name() -> str:
    """The processor's model, as the system calls it."""
    return next(_model_names(), platform.processor() or platform.machine())


def _model_names() -> Iterator[str]:
    listing = Path("/proc/cpuinfo")
    for line in listing.read_text(encoding="utf-8").splitlines() if listing.exists() else ():
        if line.startswith("model name"):
            yield line.partition(":")[2].strip()


def _version(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


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
