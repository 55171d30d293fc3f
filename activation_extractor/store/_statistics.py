"""Statistics of a column, in one pass over it and in little memory."""

from __future__ import annotations

import math
from dataclasses import astuple, dataclass
from typing import Any

import numpy as np

from activation_extractor._display import html_table
from activation_extractor._tensors import to_numpy
from activation_extractor.errors import ArgumentTypeError
from activation_extractor.store._columns import Column

_BLOCK_VALUES = 1 << 18  # 2 MiB as float64, which stays in a processor's cache
_HEADER = ("rows", "features", "mean norm", "variance", "dead features", "NaN", "infinite")

_Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class Statistics:
    """What the numbers of a column are like. A feature is one place of ``column.row_shape``.

    In a ragged column each position counts as a row. What is not finite is left out of all but its own counts: a value
    from its feature's variance and from what makes the feature dead, and its whole row from the mean norm.

    Attributes:
        rows: how many rows there are; positions, when ragged.
        features: how many features a row has.
        mean_norm: the mean over rows of the Euclidean norm, the root of the sum of squares over all features.
        variance: the mean over features of the variance over rows, ``mean((x - mean(x))**2)``: that of a population,
            divided by the number of rows and not by one less.
        dead_features: features with the same value in every row, such as a unit that is never active. In a column of
            one row this is every feature.
        nan_count: how many values are NaN.
        inf_count: how many are infinite.
    """

    rows: int
    features: int
    mean_norm: float
    variance: float
    dead_features: int
    nan_count: int
    inf_count: int

    def _repr_html_(self) -> str:
        numbers = (f"{value:,}" if isinstance(value, int) else f"{value:,.4g}" for value in astuple(self))
        return html_table("Statistics", [tuple(numbers)], header=_HEADER)


def statistics(column: Column) -> Statistics:
    """Go once through a column of a store and say what its numbers are like.

    It is read in blocks of a quarter million values, or a row where that has more, and summed up in float64 whatever
    its dtype; beside a block, three float64 numbers are held for each feature. The variance is updated block by block,
    with squares around each block's own mean, so that a large mean costs no digits (T. Chan, G. Golub and R. LeVeque,
    "Updating formulae and a pairwise algorithm for computing sample variances", 1979, equations 2.1).

    Args:
        column: of real numbers, ragged or not. One that is short of rows (``missing="skip"``) counts those it has.

    Returns:
        The statistics; ``mean_norm`` and ``variance`` are NaN where nothing finite is left to average.

    Raises:
        ArgumentTypeError: a column of text or of complex numbers.
        StoreError: a shard is damaged or gone.

    Example:
        >>> import tempfile, torch
        >>> from torch import nn
        >>> from activation_extractor import capture, open_store
        >>> from activation_extractor.store import statistics
        >>> model, folder = nn.Sequential(nn.ReLU()), tempfile.mkdtemp()
        >>> with capture(model, "0", sink=folder):
        ...     _ = model(torch.tensor([[3.0, 4.0, -1.0], [0.0, 2.0, -5.0]]))
        >>> found = statistics(open_store(folder)["0"])
        >>> found.mean_norm, found.dead_features
        (3.5, 1)
    """
    if not isinstance(column, Column):
        raise ArgumentTypeError("column", "be a column of numbers, as store[layer, reducer] is", column)
    if column.dtype.is_complex:
        raise ArgumentTypeError("column", "hold real numbers", column, "Store the absolute values, with a reducer.")
    running = _Running(math.prod(column.row_shape))
    for block in column.blocks(_BLOCK_VALUES * column.dtype.itemsize, flat=True):
        running.add(to_numpy(block).reshape(len(block), -1))
    return running.result()


class _Running:
    """Statistics of the rows that were added so far."""

    def __init__(self, features: int) -> None:
        self._rows, self._finite_rows, self._norms, self._nans, self._infs = 0, 0, 0.0, 0, 0
        self._counts = np.zeros(features)  # of finite values
        self._means = np.zeros(features)
        self._squares = np.zeros(features)  # the sum of squared distances from the mean
        self._least: _Array | None = None
        self._greatest: _Array | None = None

    def add(self, block: _Array) -> None:
        """Take in rows, ``(rows, features)`` of any real dtype."""
        if block.dtype == np.float16:
            block = block.astype(np.float32)  # numpy compares halves five times as slowly
        finite = np.isfinite(block)
        self._rows += len(block)
        with np.errstate(over="ignore", invalid="ignore"):  # squares may be too large for float64: they are infinite
            if finite.all():  # no masks, which are slower
                self._add_norms(block)
                self._merge(block.astype(np.float64), np.full(block.shape[1], len(block)), None)
                self._widen(block.min(axis=0), block.max(axis=0))
            else:
                nans = int(np.isnan(block).sum())
                self._nans += nans
                self._infs += int(finite.size - finite.sum()) - nans
                self._add_norms(block[finite.all(axis=1)])
                self._merge(np.where(finite, block, 0).astype(np.float64), finite.sum(axis=0), finite)
                with_gaps = np.where(finite, block, np.array(np.nan, block.dtype))
                self._widen(np.fmin.reduce(with_gaps, axis=0), np.fmax.reduce(with_gaps, axis=0))

    def result(self) -> Statistics:
        """The statistics of all rows."""
        has_values = self._counts > 0
        with np.errstate(over="ignore", invalid="ignore"):
            variances = self._squares[has_values] / self._counts[has_values]
            variance = float(variances.mean()) if len(variances) else math.nan
        norm = self._norms / self._finite_rows if self._finite_rows else math.nan
        dead = 0 if self._least is None else int((self._least == self._greatest)[has_values].sum())
        return Statistics(self._rows, len(has_values), norm, variance, dead, self._nans, self._infs)

    def _add_norms(self, block: _Array) -> None:
        values = block.astype(np.float64)
        self._norms += float(np.sqrt(np.einsum("rf,rf->r", values, values)).sum())
        self._finite_rows += len(block)

    def _merge(self, values: _Array, counts: _Array, finite: _Array | None) -> None:
        """Bring means and variances up to date. `values` is used up, and has zeros where it was not finite."""
        means = values.sum(axis=0) / np.maximum(counts, 1)
        values -= means
        if finite is not None:
            values[~finite] = 0
        totals = np.maximum(self._counts + counts, 1)
        shifts = means - self._means
        self._squares += np.einsum("rf,rf->f", values, values) + np.square(shifts) * self._counts * counts / totals
        self._means += shifts * counts / totals
        self._counts += counts

    def _widen(self, least: _Array, greatest: _Array) -> None:
        """Bring the range of each feature up to date, in its own dtype, since float64 rounds large integers."""
        self._least = least if self._least is None else np.fmin(self._least, least)
        self._greatest = greatest if self._greatest is None else np.fmax(self._greatest, greatest)
