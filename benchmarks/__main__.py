"""``python -m benchmarks``: run the cases, show a table, store the results."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path

import torch

from benchmarks.cases import all_cases
from benchmarks.counts import COUNTS
from benchmarks.measure import measure
from benchmarks.report import table
from benchmarks.results import describe_case, describe_count, describe_machine, document, write_json
from benchmarks.sizes import QUICK, Size

ROUNDS, QUICK_ROUNDS = 101, 15  # 15 pairs are the fewest that a ratio is given for


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what the command line asks for."""
    options = parser().parse_args(arguments)
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    size = QUICK if options.quick else Size()
    cases = [case for case in all_cases(size) if _is_wanted(case.name, options.only)]
    counts = [count for count in COUNTS if _is_wanted(count.name, options.only)]
    if not cases and not counts:
        sys.exit(f"--only must match a case, got {', '.join(map(repr, options.only))}. Try --only 'captured_call.*'.")
    machine, results, counted = describe_machine(), [], []
    for case in cases:
        print(f"{case.name}: {case.about}", file=sys.stderr)
        results.append(describe_case(case, measure(case, QUICK_ROUNDS if options.quick else ROUNDS)))
    for count in counts:
        print(f"{count.name}: {count.about}", file=sys.stderr)
        counted.append(describe_count(count, count.count(size)))
    found = document(results, counted, machine, quick=options.quick)
    print(table(found))
    if options.json is not None:
        write_json(options.json, found)


def _is_wanted(name: str, patterns: list[str] | None) -> bool:
    return patterns is None or any(fnmatchcase(name, pattern) for pattern in patterns)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="What capturing costs, beside hooks.")
    parser.add_argument("--quick", action="store_true", help="fewer rounds and shorter timings: a first impression")
    parser.add_argument("--json", type=Path, metavar="FILE", help="store the results here")
    parser.add_argument(
        "--only", action="append", metavar="PATTERN", help="only the cases of these names: 'set_up.*'; may be repeated"
    )
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="torch's threads (1)")
    return parser


if __name__ == "__main__":
    main()
