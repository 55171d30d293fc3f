"""`compare`: two runs side by side, layer by layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from activation_extractor.activations import Activations
from activation_extractor.comparison._closeness import Closeness
from activation_extractor.comparison._comparison import Comparison, LayerComparison
from activation_extractor.comparison._match import Match, Pair, matched_rows, paired, row_order
from activation_extractor.comparison._sides import Side, paired_pieces
from activation_extractor.comparison._tolerances import GivenTolerance, Tolerances
from activation_extractor.errors import ArgumentTypeError
from activation_extractor.store import Store

_NUMBERS = ("max_abs", "max_rel", "cosine", "nan_count", "inf_count", "rtol", "atol")

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
        right: what is compared with the reference, of any of these types.
        match: which layers belong together; by default those of the same name. A dict ``{left: right}`` of names, or of
            patterns whose wildcards are filled in on the right (``{"h.*": "layers.*"}``), of which the first that fits
            counts; a callable that takes a name of `left` and returns a name of `right`, or None; or ``"order"``: the
            layers that ran first, those that ran second, and so on. What a dict or callable does not name is left out.
        rtol: the relative tolerance, or one for each layer by pattern (``{"h.*": 1e-3, "**": 1e-5}``, by the names of
            `left`, the first that fits counts). By default what rounding comes to in deep models: 1e-9 for float64,
            1e-4 for float32, 2**-5 for float16, 2**-2 for bfloat16, 2**-1 for float8, of two dtypes the coarser one's;
            0 for integers. A mistake that changes less, such as another epsilon where variances are large, needs a
            smaller one to be found.
        atol: the absolute tolerance, or one for each layer by pattern. By default `rtol` times the root mean square of
            the layer's values in `left`, since small values are sums of large ones.
        check_dtype: whether another dtype is a difference. By default it is one unless all layers differ in it: a model
            in bfloat16 may be compared with one in float32, a single layer that returns bfloat16 is found.

    Returns:
        A `Comparison`, a row for each layer and reducer, in the order in which they ran on the left.

    Raises:
        MatchError: nothing belongs together, or the stores hold different rows.
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
    rows = [_compared(sides, pair, order, tolerances) for pair in pairs]
    if check_dtype is None:
        alike = (row.dtypes[0] for row in rows if row.dtypes[0] == row.dtypes[1])
        check_dtype = any(dtype.is_floating_point or dtype.is_complex for dtype in alike if dtype)
    if check_dtype:
        for index, row in enumerate(rows):
            if None not in row.dtypes and row.dtypes[0] != row.dtypes[1]:
                rows[index] = replace(row, differences=("dtype", *row.differences))
    return Comparison(rows)


def _compared(sides: tuple[Side, Side], pair: Pair, order: Tensor | None, tolerances: Tolerances) -> LayerComparison:
    key, other_key = pair
    reference = sides[0].value(key) if key else None
    values = sides[1].value(other_key) if other_key else None
    name, reducer = key or other_key or ("", None)
    row = LayerComparison(
        name,
        reducer or (other_key[1] if other_key else None),
        other_key[0] if other_key else None,
        (reference.dtype if reference else None, values.dtype if values else None),
        (reference.shape if reference else None, values.shape if values else None),
    )
    if key is None or other_key is None or reference is None or values is None:
        return replace(row, differences=("missing on the left" if key is None else "missing on the right",))
    if sides[0].store is not None and sides[1].store is not None:
        try:
            rows = matched_rows(sides[0].store, sides[1].store, key, other_key, order)
        except LookupError:
            return replace(row, differences=("rows",))
        values = sides[1].value(other_key, rows)
    pieces = paired_pieces(reference, values)
    if pieces is None:
        return replace(row, differences=("shape",))
    closeness = Closeness(tolerances.of(name, (reference.dtype, values.dtype)))
    for piece, other_piece in pieces:
        closeness.add(piece, other_piece)
    is_found = {"NaN": closeness.nan_count > 0, "infinity": closeness.inf_count > 0, "values": not closeness.is_close}
    numbers: dict[str, Any] = {number: getattr(closeness, number) for number in _NUMBERS}
    return replace(row, **numbers, differences=tuple(what for what, is_present in is_found.items() if is_present))
