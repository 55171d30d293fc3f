"""`compare`: two runs side by side, layer by layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from activation_extractor._format._entries import Key
from activation_extractor.activations import Activations
from activation_extractor.comparison._closeness import Closeness
from activation_extractor.comparison._comparison import Comparison, LayerComparison
from activation_extractor.comparison._match import Match, matched_rows, paired, row_order
from activation_extractor.comparison._sides import Side, paired_pieces
from activation_extractor.comparison._tolerances import GivenTolerance, Tolerances
from activation_extractor.errors import ArgumentTypeError
from activation_extractor.store import Store

Source = Activations | Store | Mapping[Any, Any]


def compare(
    left: Source,
    right: Source,
    *,
    match: Match = None,
    rtol: GivenTolerance = None,
    atol: GivenTolerance = None,
    check_dtype: bool | None = None,
) -> Comparison:
    """Compare two runs layer by layer, and find the first layer that differs.

    A value differs where ``|right - left| > atol + rtol * |left|``; so `left` is the reference. NaNs at the same places
    are the same, and so are infinities of one sign. Rows of two stores that have ids are matched by them. Columns of
    stores are read a few MiB at a time, or a row where that is more, and compared in float64 on the CPU.

    Args:
        left: the reference: the `Activations` of a block, a `Store`, or a mapping of names, or ``(name, reducer)``, to
            tensors or arrays.
        right: what is compared with it, likewise.
        match: which layers belong together; by default those of one name. A dict ``{left: right}`` of names, or of
            patterns whose wildcards are filled in on the right (``{"h.*": "layers.*"}``), the first that fits counts; a
            callable that is given a name of `left` and returns one of `right`, or None; or ``"order"``, the first layer
            that ran with the first, and so on. What a dict or callable does not name is left out.
        rtol: the relative tolerance, or one for each layer by pattern (``{"h.*": 1e-3, "**": 1e-5}``, by the names of
            `left`, the first that fits counts). By default what rounding comes to in deep models: 1e-9 for float64,
            1e-4 for float32, 2**-5 for float16, 2**-2 for bfloat16, 2**-1 for float8, of two dtypes the coarser one's;
            0 for integers. A mistake that changes less, such as another epsilon where variances are large, needs a
            smaller one to be found.
        atol: the absolute tolerance, likewise. By default `rtol` times the root mean square of the layer's values in
            `left`, since small values are sums of large ones.
        check_dtype: whether another dtype is a difference. By default it is one unless all layers differ in it: a model
            in bfloat16 may be compared with one in float32, a single layer that returns bfloat16 is found.

    Returns:
        A `Comparison`, a row for each layer and reducer, in the order in which they ran on the left.

    Raises:
        MatchError: nothing belongs together, or the stores hold other rows.
        ArgumentError: a pattern that fits no layer, or a negative tolerance.
        OverwrittenError: a value kept with ``copy=False`` was written to.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from activation_extractor import capture, compare
        >>> def run(model):
        ...     with capture(model, "*") as acts:
        ...         model(torch.linspace(-1, 1, 8).view(2, 4))
        ...     return acts
        >>> layers = [nn.LayerNorm(4), nn.GELU(), nn.Softmax(-1)]
        >>> found = compare(run(nn.Sequential(*layers)), run(nn.Sequential(layers[0], nn.SiLU(), layers[2])))
        >>> found.ok, found.first_difference
        (False, '1')
    """
    tolerances = Tolerances(rtol, atol)
    if not isinstance(check_dtype, bool | None):
        raise ArgumentTypeError("check_dtype", "be True, False or None", check_dtype)
    sides = Side(left, "left"), Side(right, "right")
    pairs = paired(sides[0].keys, sides[1].keys, match)
    tolerances.check([key[0] for key, _ in pairs if key])
    order = row_order(sides[0].store, sides[1].store)
    rows = [_compared(sides, key, other, order, tolerances) for key, other in pairs]
    return Comparison(_judged_by_dtype(rows, check_dtype))


def _compared(
    sides: tuple[Side, Side], key: Key | None, other: Key | None, order: Tensor | None, tolerances: Tolerances
) -> LayerComparison:
    left, right = sides
    if key is None or other is None:
        return _missing(sides, key, other)
    one, two = left.value(key), right.value(other)
    row = LayerComparison(key[0], key[1] or other[1], other[0], (one.dtype, two.dtype), (one.shape, two.shape))
    if left.store is not None and right.store is not None:
        try:
            rows = matched_rows(left.store, right.store, key, other, order)
        except LookupError:
            return replace(row, differences=("rows",))
        two = right.value(other, rows)
    pieces = paired_pieces(one, two)
    if pieces is None:
        return replace(row, differences=("shape",))
    closeness = Closeness(tolerances.of(key[0], (one.dtype, two.dtype)))
    for piece, piece_of_other in pieces:
        closeness.add(piece, piece_of_other)
    return _measured(row, closeness)


def _missing(sides: tuple[Side, Side], key: Key | None, other: Key | None) -> LayerComparison:
    one, two = sides[0].value(key) if key else None, sides[1].value(other) if other else None
    where = "missing on the left" if key is None else "missing on the right"
    name, reducer = key or other or ("", None)
    return LayerComparison(
        name,
        reducer,
        other and other[0],
        (one.dtype if one else None, two.dtype if two else None),
        (one.shape if one else None, two.shape if two else None),
        differences=(where,),
    )


def _measured(row: LayerComparison, closeness: Closeness) -> LayerComparison:
    found = {"NaN": closeness.nan_count > 0, "infinity": closeness.inf_count > 0, "values": not closeness.is_close}
    return replace(
        row,
        max_abs=closeness.max_abs,
        max_rel=closeness.max_rel,
        cosine=closeness.cosine,
        nan_count=closeness.nan_count,
        inf_count=closeness.inf_count,
        rtol=closeness.rtol,
        atol=closeness.atol,
        differences=tuple(what for what, is_found in found.items() if is_found),
    )


def _judged_by_dtype(rows: list[LayerComparison], check_dtype: bool | None) -> list[LayerComparison]:
    """The rows, with another dtype as a difference where it is one."""
    if check_dtype is None:
        check_dtype = any(row.dtypes[0] == row.dtypes[1] and _is_inexact(row.dtypes[0]) for row in rows)
    return [_with_dtype(row) if check_dtype else row for row in rows]


def _with_dtype(row: LayerComparison) -> LayerComparison:
    if None in row.dtypes or row.dtypes[0] == row.dtypes[1]:
        return row
    return replace(row, differences=("dtype", *row.differences))


def _is_inexact(dtype: torch.dtype | None) -> bool:
    return dtype is not None and (dtype.is_floating_point or dtype.is_complex)
