"""Batches of rows of similar length, so that little is computed on padding."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

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
    into the data set's order when it is told it (``order=``), and a window bounds what it has to hold for that. What is
    returned is also a ``batch_sampler`` for a ``DataLoader``. The same lengths always give the same batches, which is
    what makes a run go on where it ended.

    Args:
        lengths: of each row, in tokens.
        batch_size: how many rows a batch has at most.
        max_tokens: how many tokens it has at most, padding counted: its rows times the longest of them. A row that is
            longer by itself is a batch of its own. Either of the two, or both.
        window_rows: how many consecutive rows are sorted together.

    Returns:
        For each batch the numbers of its rows; each row once.

    Raises:
        ArgumentError: neither `batch_size` nor `max_tokens`, or one that is not positive, or a negative length.

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
        if value is not None and (type(value) is not int or value < 1):
            raise ArgumentError(name, "be a positive integer", value)
    sizes = [_checked(length) for length in lengths]
    most_rows, most_tokens = batch_size or len(sizes), max_tokens or float("inf")
    return [
        batch
        for start in range(0, len(sizes), window_rows)
        for batch in _batches(_longest_first(sizes, start, start + window_rows), sizes, most_rows, most_tokens)
    ]


def _checked(length: int) -> int:
    size = int(length)
    if size != length:
        raise ArgumentTypeError("a length", "be an integer", length)
    if size < 0:
        raise ArgumentError("a length", "not be negative", size)
    return size


def _longest_first(sizes: Sequence[int], start: int, stop: int) -> list[int]:
    return sorted(range(start, min(stop, len(sizes))), key=lambda row: (-sizes[row], row))


def _batches(rows: list[int], sizes: Sequence[int], most_rows: int, most_tokens: float) -> Iterator[list[int]]:
    """Rows, longest first, cut where a batch is full."""
    batch: list[int] = []
    for row in rows:
        is_full = len(batch) == most_rows or (len(batch) + 1) * sizes[batch[0] if batch else row] > most_tokens
        if batch and is_full:
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch
