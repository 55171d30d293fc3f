"""``python -m benchmarks``: run the cases, show a table, store the results."""

from __future__ import annotations

import argparse
import importlib.util
import math
import sys
import warnings
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.cases import all_groups
from benchmarks.counts import COUNTS
from benchmarks.peer_cases import installed_peers, missing_peers
from benchmarks.report import plot, table
from benchmarks.results import describe_machine, document, joined, read_json, write_json
from benchmarks.sizes import CPU, QUICK, SMALLEST, Size
from benchmarks.suite import Found, Suite, may_match

ROUNDS, QUICK_ROUNDS, SMALLEST_ROUNDS = 101, 15, 1

ABOUT = """What capturing costs, beside hooks.

The results are stored after each case (--json), so that a run that is killed leaves what it had found. A case that
raises is listed with its error, and the others go on; the exit code is 1 then. What needs a package or a device that
is not here is left out, and listed with the reason."""
SECONDS = """bound the whole run: what is left of this time is shared equally by the groups of cases that are still to
come, and within a group by its cases. A case begins no further round when its share is over, but runs the 6 rounds
that an interval needs, and what is counted is counted to its end: what was begun in time may end behind it. Cases that
were not begun in time are listed as left out"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what the command line asks for; the exit code: 1 when a case raised."""
    options = _checked(parser(), arguments)
    warnings.filterwarnings("ignore", "The model ran")  # in one block again and again: that is what is timed
    found = measured(options) if options.stored is None else options.stored
    print(table(found))
    if options.json is not None:
        write_json(options.json, found)
    if options.plot is not None:
        plot(found, options.plot)
    return 1 if found["failed"] else 0


def measured(options: argparse.Namespace) -> dict[str, Any]:
    """Measure what the options ask for, and store it as it comes."""
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    name, size, rounds = _size(options)
    if options.peers and missing_peers():
        print(f"not installed, left out: {', '.join(missing_peers())}", file=sys.stderr)
    machine = describe_machine(options.device)
    others = [peer.distribution for peer in installed_peers() if peer.distribution] if options.peers else []

    def described(found: Found) -> dict[str, Any]:
        return document(machine, size=name, others=["transformers", *others], **asdict(found))

    def save(found: Found) -> None:
        if options.json is not None:
            write_json(options.json, described(found))

    suite = Suite(replace(size, device=options.device), rounds, options.only, save, options.seconds)
    found = suite.run(all_groups(with_peers=options.peers), COUNTS)
    if not any(vars(found).values()):
        sys.exit(f"--only must match a case, got {', '.join(map(repr, options.only))}. Try --only 'captured_call.*'.")
    return described(found)


def _size(options: argparse.Namespace) -> tuple[str, Size, int]:
    if options.smallest:
        return "smallest", SMALLEST, SMALLEST_ROUNDS
    return ("quick", QUICK, QUICK_ROUNDS) if options.quick else ("whole", Size(), ROUNDS)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    kind = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=ABOUT, formatter_class=kind)
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="fewer rounds and shorter timings: a first impression")
    size.add_argument("--smallest", action="store_true", help="hardly any work: whether everything runs, no figures")
    parser.add_argument("--json", type=_new_file, metavar="FILE", help="store the results here, after each case")
    parser.add_argument(
        "--only", action="append", metavar="PATTERN", help="only the cases of these names: 'set_up.*'; may be repeated"
    )
    parser.add_argument("--seconds", type=_seconds, default=math.inf, metavar="N", help=SECONDS)
    parser.add_argument("--device", type=_device, default=CPU, help="where models run: cpu (default), cuda")
    parser.add_argument("--peers", action="store_true", help="beside other libraries too, those that are installed")
    parser.add_argument("--plot", type=_picture, metavar="FILE", help="draw the ratios: .svg or .png; needs matplotlib")
    parser.add_argument(
        "--stored",
        type=_stored_file,
        nargs="+",
        metavar="FILE",
        help="show or draw stored results, several as one, and measure nothing",
    )
    parser.add_argument("--threads", type=_threads, default=1, metavar="N", help="torch's threads (1)")
    return parser


def _checked(parser: argparse.ArgumentParser, arguments: Sequence[str] | None) -> argparse.Namespace:
    options = parser.parse_args(arguments)
    names = [*(name for name, _ in all_groups(with_peers=options.peers)), *(count.name for count in COUNTS)]
    for pattern in options.only or ():
        if not any(may_match(name.partition(".")[0], [pattern]) for name in names):
            parser.error(f"--only must match a case, got {pattern!r}. Try --only 'captured_call.*'.")
    if options.stored is not None:
        try:
            options.stored = joined(options.stored)
        except ValueError as error:
            parser.error(str(error))
    return options


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
    if importlib.util.find_spec("matplotlib") is None:
        raise argparse.ArgumentTypeError("needs matplotlib, which is not installed")
    return path


def _stored_file(text: str) -> dict[str, Any]:
    path = Path(text)
    if not path.is_file():
        raise argparse.ArgumentTypeError(f"must be a file that --json has written, got {text!r}")
    try:
        return read_json(path)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"must be a file that --json has written, got {error} in {text!r}") from error


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not seconds > 0:  # NaN is not
        raise argparse.ArgumentTypeError(f"must be a positive number, got {text!r}")
    return seconds


def _threads(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a positive whole number, got {text!r}")
    return int(text)


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
    sys.exit(main())
