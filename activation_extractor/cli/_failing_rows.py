"""Rows that a model does not run on."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from activation_extractor._display import one_line
from activation_extractor.cli._feed import Feed
from activation_extractor.cli.inputs import Row
from activation_extractor.errors import ActivationError

_MOST_LETTERS = 200


class FailingRow(NamedTuple):
    """A row that a model does not run on, and why."""

    place: str
    id: str | int | None
    error: ActivationError


def find_failing(feed: Feed, run: Callable[[dict[str, Any]], Any]) -> list[FailingRow]:
    """The rows of the latest batch that the model does not run on alone; none where it runs on no row any more."""
    try:
        run(feed.example())
    except Exception:  # as after an error on an accelerator
        return []
    failing: dict[str, FailingRow] = {}
    for _, row, piece in feed.current:
        try:
            run(feed.batch_of([piece]))
        except Exception as error:
            failing[row.place] = failing_row(row, error)
    return list(failing.values())


def failing_row(row: Row, error: Exception) -> FailingRow:
    """A row that raised an error."""
    what = f"the model must run on {row.place}, got {one_line(error):.{_MOST_LETTERS}}."
    return FailingRow(row.place, row.id, ActivationError(f"{what} Remove that row, or pass --skip-bad-rows FILE."))


def failed_before(file: Path | None) -> Iterator[FailingRow]:
    """The rows that an earlier run listed in a file, since the model does not run on them."""
    if file is None or not file.is_file():
        return
    for line in file.read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
            if row["error"].startswith("the model must run on "):
                yield FailingRow(row["place"], row["id"], ActivationError(row["error"]))
        except (ValueError, TypeError, KeyError):  # a file of something else, which is going to be replaced
            continue
