"""Overlapping windows of rows that are longer than a model takes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise

from activation_extractor._arguments import check_size
from activation_extractor.errors import ArgumentError
from activation_extractor.runs._length_batches import checked_length


@dataclass(frozen=True, slots=True)
class Window:
    """A window of a row, and the positions that count in it.

    Attributes:
        row: the number of its row.
        start, stop: its positions in the row, ``tokens[row][start:stop]``.
        own_start, own_stop: those of them that it owns, also counted in the row. Each position of a row is owned by one
            of its windows: by that in which it is farthest from a cut, and by the earlier of two.
        number: of the window in its row, from 0.
        count: how many windows the row has.
    """

    row: int
    start: int
    stop: int
    own_start: int
    own_stop: int
    number: int
    count: int

    @property
    def length(self) -> int:
        """How many positions it has."""
        return self.stop - self.start

    def owns(self, *, before: int = 0, after: int = 0, counts_special: bool = True) -> slice:
        """Which positions of the model's input count.

        The input is the window with `before` special tokens in front of it and `after` behind it. Those in front count
        in the first window of a row alone, those behind in the last one, as if the row had been run as a whole; or they
        count nowhere, without `counts_special`.

        Raises:
            ArgumentError: a number of special tokens is negative, or no integer.
        """
        for name, tokens in (("before", before), ("after", after)):
            if type(tokens) is not int or tokens < 0:
                raise ArgumentError(name, "be a number of tokens, 0 or more", tokens)
        start, stop = before + self.own_start - self.start, before + self.own_stop - self.start
        begins, ends = counts_special and self.number == 0, counts_special and self.number == self.count - 1
        return slice(0 if begins else start, stop + after if ends else stop)


def windows(lengths: Iterable[int], *, size: int, stride: int | None = None) -> list[Window]:
    """Windows of rows, for a model that takes `size` positions at a time.

    A row of up to `size` positions is one window. A longer one is as many windows of `size` positions as are needed
    when each begins `stride` positions after the one before; the last is moved back so that it is as long as the
    others. `extract` stores rows, not windows, when it is told with ``group=`` which belong together.

    Args:
        lengths: of each row, in tokens. Where special tokens are put around each window, they are no part of it: leave
            room for them in `size`.
        size: how many positions a window has at most.
        stride: how many positions a window begins after the one before, up to `size`; half of `size` by default. The
            ``stride`` of transformers' tokenizers is another one: how many positions two windows share.

    Returns:
        The windows of the first row, in order, of the second one, and so on; at least one for each row.

    Raises:
        ArgumentError: a size is not positive, `stride` is larger than `size`, or a length is negative.

    Example:
        >>> from activation_extractor import windows
        >>> for window in windows([10], size=6, stride=4):
        ...     print(window.start, window.stop, "owns", window.own_start, window.own_stop)
        0 6 owns 0 5
        4 10 owns 5 10
    """
    check_size("size", size)
    if stride is not None:
        check_size("stride", stride)
        if stride > size:
            raise ArgumentError(
                "stride", f"be at most size={size}", stride, "Positions between windows would be left out."
            )
    step = stride or max(1, size // 2)
    return [
        window for row, length in enumerate(lengths) for window in _windows_of(row, checked_length(length), size, step)
    ]


def _windows_of(row: int, length: int, size: int, step: int) -> Iterable[Window]:
    last = max(length - size, 0)
    starts = [*range(0, last, step), last]
    # In what two neighbours share, the first half is farther from a cut in the earlier one, and the middle as far.
    middles = [(before + size + start + 1) // 2 for before, start in pairwise(starts)]
    borders = [0, *middles, length]
    for number, start in enumerate(starts):
        stop = min(start + size, length)
        yield Window(row, start, stop, borders[number], borders[number + 1], number, len(starts))
