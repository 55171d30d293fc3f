"""Reducers that are told more of each row: several positions, a span of positions, weights."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from activation_extractor.errors import ArgumentError, ArgumentTypeError, PoolingError, PositionError
from activation_extractor.reducers._own_masks import DEFAULT_NAMES
from activation_extractor.reducers._reducers import (
    _BUILT_IN,
    _FEW_OPERATIONS,
    Reducer,
    _dense,
    _expand,
    canonical_name,
    is_linear,
)
from activation_extractor.reducers._row_reducers import RowFields, RowReducer, numbers_of

PerRow = int | str | Sequence[int] | Tensor | np.ndarray[Any, Any] | None
_WEIGHTED = "weighted_mean"
_EACH_POSITION = "Give a weight for each position of the batch, padding included."
Weights = str | Tensor | np.ndarray[Any, Any]


def positions(*ks: int) -> Reducer:
    """A reducer that takes several real positions, in this order: ``(batch, len(ks), *features)``.

    They count as for `position`; its name is ``positions(k, k, ...)``.

    Raises:
        PositionError: when used, a row has fewer real positions; it names the row.

    Example:
        >>> import torch
        >>> from activation_extractor.reducers import positions
        >>> positions(0, -1)(torch.arange(6.0).reshape(1, 3, 2), torch.tensor([[True, True, False]]))
        tensor([[[0., 1.],
                 [2., 3.]]])
    """
    if not ks or not all(isinstance(k, int) and not isinstance(k, bool) for k in ks):
        raise ArgumentTypeError("what is given to positions(k, ...)", "be one or more integers", ks)

    def at_positions(activation: Tensor, mask: Tensor | None) -> Tensor:
        activation, mask = _dense(activation, mask)
        mask = _all_real(activation) if mask is None else mask
        real = mask.sum(1, keepdim=True)  # (batch, 1)
        wanted = torch.tensor(ks, device=activation.device)
        ranks = torch.where(wanted < 0, wanted + real, wanted)  # (batch, k)
        missing = (ranks < 0) | (ranks >= real)
        if not missing.is_meta and missing.any():
            row, index = map(int, missing.nonzero()[0])
            raise PositionError(ks[index], row, int(real[row]))
        places = (~mask).byte().sort(dim=1, stable=True).indices  # real ones first, in their order
        return activation[torch.arange(len(mask), device=mask.device)[:, None], places.gather(1, ranks)]

    at_positions.__name__ = at_positions.__qualname__ = f"positions({', '.join(map(str, ks))})"
    return at_positions


class _Span(RowReducer):
    def __init__(self, start: PerRow, end: PerRow, reduce: str) -> None:
        self._ends = _checked_end("start", start), _checked_end("end", end)
        self._reducer = _BUILT_IN[reduce]
        shown = [str(end) for end in (start, end)] if _has_name(start) and _has_name(end) else []
        shown += [] if reduce == "mean" else [reduce]
        name = f"span({', '.join(shown)})" if shown else "span"
        super().__init__(name, (start, end), is_linear=is_linear(self._reducer))

    def __call__(self, activation: Tensor, mask: Tensor | None) -> Tensor:
        dense, real = _dense(activation, mask)
        inside = self._once(activation, mask, lambda: self._inside(_all_real(dense) if real is None else real))
        return self._reducer(dense, inside)

    def _inside(self, mask: Tensor) -> Tensor:
        """Which positions are in the spans, ``(batch, seq)``."""
        real = mask.sum(1)
        start, end = (
            _per_row(f"{what} of span", self._value(given), real, default)
            for what, given, default in zip(("start", "end"), self._ends, (torch.zeros_like(real), real), strict=True)
        )
        is_wrong = (start < 0) | (end > real) | (start >= end)
        if not is_wrong.is_meta and is_wrong.any():
            row = int(is_wrong.nonzero()[0])
            got = f"{int(start[row])} to {int(end[row])} of {int(real[row])}"
            advice = "Positions count from 0, padding left out, and the end is the first one behind the span."
            raise PoolingError("A span", "hold a position and lie within the real ones of its row", got, row, advice)
        rank = mask.cumsum(1) - 1
        return mask & (rank >= start[:, None]) & (rank < end[:, None])


def span(start: PerRow, end: PerRow, reduce: Literal["mean", "max", "first", "last"] = "mean") -> Reducer:
    """A reducer over a span of the real positions, ``(batch, *features)``: a word, a domain, a region of interest.

    Positions count from 0, padding (and what else the mask leaves out) not counted; negative ones from the end. `end`
    is the first position behind the span. Its name is ``span(start, end)`` where these are numbers or names, else
    ``span``.

    Args:
        start: an integer for all rows; a tensor, array or sequence with one for each row; or, in `extract`, the name of
            the field that holds these in each batch. None means the first position.
        end: as `start`; None means behind the last position.
        reduce: what is kept of the span: its mean, maximum, first or last position.

    Raises:
        PoolingError: when used, a span is empty or reaches beyond the real positions; it names the row.

    Example:
        >>> import torch
        >>> from activation_extractor.reducers import span
        >>> span([0, 1], [1, 3])(torch.arange(6.0).reshape(2, 3, 1), None)
        tensor([[0.0000],
                [4.5000]])
    """
    reducer = canonical_name(reduce)
    if reducer not in ("mean", "max", "first", "last"):
        raise ArgumentError("reduce of span", "be 'mean', 'max', 'first' or 'last'", reduce)
    return _Span(start, end, str(reducer))


class WeightedMean(RowReducer):
    """What `weighted_mean` returns."""

    def __init__(self, weights: Weights) -> None:
        if isinstance(weights, str) and weights in DEFAULT_NAMES:
            advice = "It would not reach the model: use reduce='mean' for the mean over what it marks."
            raise ArgumentError("weights", "name a field that is not the model's mask", weights, advice)
        super().__init__(_WEIGHTED, [weights], is_linear=True)
        self._weights = weights

    def __call__(self, activation: Tensor, mask: Tensor | None) -> Tensor:
        dense, real = _dense(activation, mask)
        dtype = dense.dtype
        is_inexact = dtype.is_floating_point or dtype.is_complex
        dense = dense.to(_FEW_OPERATIONS.get(dtype, dtype))
        sum_dtype = torch.promote_types(dense.dtype, torch.float32) if is_inexact else torch.float32
        shares = self._once(activation, mask, lambda: self._shares(activation, dense, real))
        values = torch.where(_expand(shares != 0, dense), dense, 0)  # so that a NaN in a pad changes nothing
        total = (values.to(sum_dtype) * _expand(shares.to(sum_dtype), dense)).sum(1)
        return total.to(dtype if is_inexact else sum_dtype)

    def totals(self, batch: Mapping[str, Any], is_real: Tensor) -> list[float]:
        """The sum of the weights of each row of a batch, over the positions that are real, ``(batch, seq)``.

        Raises:
            ArgumentError: the weights have another shape.
        """
        given = batch[self._weights] if isinstance(self._weights, str) else self._weights
        weights = numbers_of("weights", given, "numbers").to(is_real.device)
        if weights.shape != is_real.shape:
            raise ArgumentError("weights", f"have shape {tuple(is_real.shape)}", tuple(weights.shape), _EACH_POSITION)
        return weights.where(is_real, 0).sum(1, dtype=torch.float64).tolist()

    def _shares(self, activation: Tensor, dense: Tensor, mask: Tensor | None) -> Tensor:
        """The weights of the real positions, made so that those of each row add up to 1, ``(batch, seq)``."""
        weights = numbers_of("weights", self._value(self._weights), "numbers").to(dense.device)
        if activation.is_nested:
            weights = weights[:, : dense.shape[1]]
        if weights.shape != dense.shape[:2]:
            raise ArgumentError("weights", f"have shape {tuple(dense.shape[:2])}", tuple(weights.shape), _EACH_POSITION)
        weights = weights.to(torch.float32 if dense.dtype != torch.float64 else torch.float64)
        weights = weights if mask is None else torch.where(mask, weights, 0)
        total = weights.sum(1, keepdim=True)
        is_wrong = ~(total > 0) | total.isinf() | (weights < 0).any(1, keepdim=True)
        if not is_wrong.is_meta and is_wrong.any():
            row = int(is_wrong.nonzero()[0, 0])
            least = weights[row].min()
            got = f"the sum {total[row].item():.6g}" if not least < 0 else f"the weight {least.item():.6g}"
            advice = "Leave such rows out, or pool them in a reducer of your own."
            condition = "be finite, not negative and not all 0 over the real positions of a row"
            raise PoolingError("Weights", condition, got, row, advice)
        return weights / total


def weighted_mean(weights: Weights) -> Reducer:
    """A reducer that takes the mean over the real positions by weights, such as idf: ``(batch, *features)``.

    Weights need not add up to 1, and those at padding are ignored. Accumulated in at least float32 and returned in the
    activation's dtype; integers and bools give float32. Its name is ``weighted_mean``.

    Args:
        weights: ``(batch, seq)``, numbers that are not negative; or, in `extract`, the name of the field that holds
            them in each batch.

    Raises:
        ArgumentError: it names the model's mask, which the model would then lack.
        PoolingError: when used, weights of a row are negative, or all 0, or infinite; it names the row.

    Example:
        >>> import torch
        >>> from activation_extractor.reducers import weighted_mean
        >>> weighted_mean(torch.tensor([[3.0, 1.0, 9.0]]))(torch.tensor([[[1.0], [5.0], [7.0]]]), None)
        tensor([[5.4615]])
    """
    if not isinstance(weights, str):
        numbers_of("weights", weights, "numbers")
    return WeightedMean(weights)


def _all_real(activation: Tensor) -> Tensor:
    return torch.ones(activation.shape[:2], dtype=torch.bool, device=activation.device)


def _has_name(end: PerRow) -> bool:
    return end is None or isinstance(end, int | str)


def _checked_end(what: str, given: PerRow) -> Any:
    """One of the ends of a span, refused if it is nothing that `span` takes."""
    if given is None or isinstance(given, str):
        return given
    return numbers_of(f"{what} of span", given, "integers")


def _per_row(what: str, given: Any, real: Tensor, default: Tensor) -> Tensor:
    """A position for each row, ``(batch,)`` int64, counted from the first real one."""
    if given is None:
        return default
    given = numbers_of(what, given, "integers").to(real.device)
    if given.dim() > 1 or (given.dim() == 1 and given.shape != real.shape):
        raise ArgumentError(what, f"hold a position for each of {len(real)} rows", tuple(given.shape))
    return torch.where(given < 0, given + real, given)


def take_fields(reduce: Any, weights: str | None) -> tuple[Any, RowFields]:
    """What ``reduce=`` means where batches hold fields for reducers, and where reducers take them from.

    `weights` is the field that the word ``weighted_mean`` stands for.

    Raises:
        ArgumentError: there are weights and no such word, or the word and no weights.
    """
    fields, words = RowFields(), 0

    def with_fields(item: Any) -> Any:
        nonlocal words
        if isinstance(item, str) and item == _WEIGHTED:
            words += 1
            item = weighted_mean(weights) if weights is not None else item  # else the word is refused later
        if not isinstance(item, RowReducer):
            return item
        fields.names.update(item.fields)
        return item.of_batch(fields)

    if weights is not None and not isinstance(weights, str):
        advice = "In a with-block, give them to the reducer: weighted_mean(weights)."
        raise ArgumentTypeError("weights", "name a field of the batches", weights, advice)
    if isinstance(reduce, Mapping):
        reduce = {name: with_fields(item) for name, item in reduce.items()}
    elif isinstance(reduce, Iterable) and not isinstance(reduce, str):
        reduce = [with_fields(item) for item in reduce]
    else:
        reduce = with_fields(reduce)
    if weights is not None and not words:
        raise ArgumentError("weights", "be left out where reduce= lacks the word 'weighted_mean'", weights)
    return reduce, fields
