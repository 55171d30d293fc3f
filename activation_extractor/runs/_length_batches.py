"""Batches of rows of similar length, so that little is computed on padding."""

from __future__ import annotations

from collections.abc import Sequence

from activation_extractor._arguments import check_size
from activation_extractor.errors import ArgumentError, ArgumentTypeError

WINDOW_ROWS = 1024


def length_batches(
    lengths: Sequence[int],
    *,
    batch_size: int | None = None,
    max_tokens: int | None = None,
    window_rows: int = WINDOW_ROWS,
) -> list[list[int]]:
    """Which rows go into one batch: rows of similar length, longest first within a window.

    Rows are sorted by length within windows of consecutive rows; windows keep their order. `extract` puts rows back
    into the data set's order when it is given (``order=``), and a window bounds what it holds for that. The result is
    also a ``batch_sampler`` for a ``DataLoader``. The same lengths always give the same batches, so a run can be
    resumed.

    Args:
        lengths: of each row, in tokens.
        batch_size: how many rows a batch has at most.
        max_tokens: how many tokens it has at most, padding counted: its rows times the longest of them. A row that is
            longer by itself is a batch of its own. Give `batch_size`, `max_tokens` or both.
        window_rows: how many consecutive rows are sorted together.

    Returns:
        For each batch the numbers of its rows; each row once.

    Raises:
        ArgumentError: neither `batch_size` nor `max_tokens` is given, a size is not positive, or a length is negative.

    Example:
        >>> from activation_extractor import length_batches
        >>> length_batches([3, 9, 2, 8], max_tokens=18)
        [[1, 3], [0, 2]]
        >>> length_batches([3, 9, 2, 8], batch_size=2, window_rows=2)
        [[1, 0], [3, 2]]
    """
    if batch_size is None and max_tokens is None:
        raise ArgumentError("batch_size or max_tokens", "be given", None)
    for name, value in (("batch_size", batch_size), ("max_tokens", max_tokens), ("window_rows", window_rows)):
        if value is not None:
            check_size(name, value)
    sizes = [checked_length(length) for length in lengths]
    most_rows, most_tokens = batch_size or len(sizes), max_tokens or float("inf")
    batches: list[list[int]] = []
    for start in range(0, len(sizes), window_rows):
        window = range(start, min(start + window_rows, len(sizes)))
        batches.append([])
        for row in sorted(window, key=lambda row: (-sizes[row], row)):
            batch = batches[-1]
            if batch and (len(batch) == most_rows or (len(batch) + 1) * sizes[batch[0]] > most_tokens):
                batches.append([])
            batches[-1].append(row)
    return batches


def checked_length(length: int) -> int:
    """The length of a row as a Python integer; an ArgumentError where it cannot be one."""
    size = int(length)
    if size != length:
        raise ArgumentTypeError("a length", "be an integer", length)
    if size < 0:
        raise ArgumentError("a length", "not be negative", size)
    return size
