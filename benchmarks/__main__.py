"""``python -m benchmarks``: run the cases, show a table, store the results."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch

from benchmarks.cases import all_cases
from benchmarks.counts import all_counts
from benchmarks.measure import measure
from benchmarks.peer_cases import installed_peers, missing_peers
from benchmarks.report import plot, table
from benchmarks.results import describe_case, describe_count, describe_machine, document, write_json
from benchmarks.sizes import CPU, QUICK, Size

ROUNDS, QUICK_ROUNDS = 101, 15  # 15 pairs are the fewest that a ratio is given for


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what the command line asks for."""
    options = parser().parse_args(arguments)
    stored = options.stored
    found = measured(options) if stored is None else json.loads(stored.read_text(encoding="utf-8"))
    print(table(found))
    if options.json is not None:
        write_json(options.json, found)
    if options.plot is not None:
        plot(found, options.plot)


def measured(options: argparse.Namespace) -> dict[str, Any]:
    """Measure what the options ask for."""
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    size = replace(QUICK if options.quick else Size(), device=options.device)
    if options.peers and missing_peers():
        print(f"not installed, left out: {', '.join(missing_peers())}", file=sys.stderr)
    machine, results, counted = describe_machine(size.device), [], []
    counts = [count for count in all_counts(size) if _is_wanted(count.name, options.only)]
    for case in all_cases(size, with_peers=options.peers):  # each is made when the ones before it have been measured
        if not _is_wanted(case.name, options.only):
            continue
        print(f"{case.name}: {case.about}", file=sys.stderr)
        results.append(describe_case(case, measure(case, QUICK_ROUNDS if options.quick else ROUNDS)))
    for count in counts:
        print(f"{count.name}: {count.about}", file=sys.stderr)
        counted.append(describe_count(count, count.count(size)))
    if not results and not counted:
        sys.exit(f"--only must match a case, got {', '.join(map(repr, options.only))}. Try --only 'captured_call.*'.")
    others = [peer.distribution for peer in installed_peers() if peer.distribution] if options.peers else []
    return document(results, counted, machine, quick=options.quick, others=["transformers", *others])


def _is_wanted(name: str, patterns: list[str] | None) -> bool:
    return patterns is None or any(fnmatchcase(name, pattern) for pattern in patterns)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="What capturing costs, beside hooks.")
    parser.add_argument("--quick", action="store_true", help="fewer rounds and shorter timings: a first impression")
    parser.add_argument("--json", type=_new_file, metavar="FILE", help="store the results here")
    parser.add_argument(
        "--only", action="append", metavar="PATTERN", help="only the cases of these names: 'set_up.*'; may be repeated"
    )
    parser.add_argument("--device", type=_device, default=CPU, help="where models run: cpu (default), cuda")
    parser.add_argument("--peers", action="store_true", help="beside other libraries too, those that are installed")
    parser.add_argument("--plot", type=_picture, metavar="FILE", help="draw the ratios: .svg or .png; needs matplotlib")
    parser.add_argument(
        "--stored", type=_stored_file, metavar="FILE", help="show or draw stored results, and measure nothing"
    )
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="torch's threads (1)")
    return parser


def _new_file(text: str) -> Path:
    """A file that can be written once all has been measured."""
    path = Path(text)
    if not path.parent.is_dir() or path.is_dir():
        raise argparse.ArgumentTypeError(f"must be a file in a folder that is there, got {text!r}")
    return path


def _picture(text: str) -> Path:
    path = _new_file(text)
    if path.suffix not in (".svg", ".png"):
        raise argparse.ArgumentTypeError(f"must end in .svg or .png, got {text!r}")
    return path


def _stored_file(text: str) -> Path:
    if not Path(text).is_file():
        raise argparse.ArgumentTypeError(f"must be a file that --json has written, got {text!r}")
    return Path(text)


def _device(text: str) -> torch.device:
    """A device that is there."""
    try:
        device = torch.device(text)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise argparse.ArgumentTypeError(f"must be a device that is there, got {text!r}: {reason}") from error
    return device


if __name__ == "__main__":
    main()
