"""The reducers that are built in, and how a reducer is used."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from activation_extractor._tensors import as_dense, is_special, refused_kind, rows_of, whole_here
from activation_extractor.errors import (
    ArgumentError,
    ArgumentTypeError,
    DuplicateLayerError,
    PositionError,
    ReducerError,
    TensorKindError,
    add_note,
)

Reducer = Callable[[Tensor, "Tensor | None"], Tensor]
_LOWEST = -(2**63)
_USUAL = (torch.float32, torch.float64)
_HALF = (torch.float16, torch.bfloat16)
# Dtypes that torch hardly computes in, and where their numbers are all found.
_FLOAT8 = [getattr(torch, name) for name in dir(torch) if name.startswith("float8_")]
_FEW_OPERATIONS = {**dict.fromkeys(_FLOAT8, torch.float32), **dict.fromkeys((torch.uint16, torch.uint32), torch.int64)}


def full(activation: Tensor, mask: Tensor | None) -> Tensor:
    """The activation itself, unreduced, padding included, in the layout in which the layer returned it.

    In a store the padded positions are left out instead.
    """
    return activation


def mean(activation: Tensor, mask: Tensor | None) -> Tensor:
    """The mean over the real positions, ``(batch, *features)``.

    Accumulated in at least float32 and returned in the activation's dtype; integers and bools give float32.
    Values in padded slots, NaN included, change nothing.
    """
    dtype = activation.dtype
    if mask is None and (dtype in _USUAL or dtype in _HALF) and type(activation) is Tensor:
        try:
            if activation.numel():  # which is asked faster than a length
                is_exact = dtype in _USUAL or activation.is_cuda  # where halves are added in float32, by one kernel
                return activation.mean(1) if is_exact else activation.mean(1, dtype=torch.float32).to(dtype)
        except RuntimeError:
            if not is_special(activation):
                raise
    activation, mask = _dense(activation, mask)
    dtype = activation.dtype
    is_inexact = dtype.is_floating_point or dtype.is_complex
    if dtype in _FEW_OPERATIONS:
        activation = activation.to(_FEW_OPERATIONS[dtype])
    sum_dtype = torch.promote_types(activation.dtype, torch.float32) if is_inexact else torch.float32
    result_dtype = dtype if is_inexact else sum_dtype
    if mask is None:
        if activation.shape[0] and not activation.shape[1]:
            raise TensorKindError("rows without a position", "Leave empty rows out of the batch.")
        return activation.mean(1, dtype=sum_dtype).to(result_dtype)
    mask = _expand(mask, activation)
    total = torch.where(mask, activation, 0).sum(1, dtype=sum_dtype)
    return (total / mask.sum(1)).to(result_dtype)


def first(activation: Tensor, mask: Tensor | None) -> Tensor:
    """The first real position, ``(batch, *features)``, whichever side is padded."""
    if is_special(activation):
        activation, mask = _dense(activation, mask)
    if mask is None:
        return activation[:, 0].clone()
    return _take(activation, mask.int().argmax(1))  # argmax gives the first of equal values


def last(activation: Tensor, mask: Tensor | None) -> Tensor:
    """The last real position, ``(batch, *features)``, whichever side is padded."""
    if is_special(activation):
        activation, mask = _dense(activation, mask)
    if mask is None:
        return activation.select(1, -1).clone()
    return _take(activation, mask.shape[1] - 1 - mask.int().flip(1).argmax(1))


def max(activation: Tensor, mask: Tensor | None) -> Tensor:
    """The greatest value of each feature over the real positions, ``(batch, *features)``; a real NaN gives NaN."""
    if mask is None and activation.dtype in _USUAL and type(activation) is Tensor:
        try:
            return activation.amax(1)
        except RuntimeError:
            if not is_special(activation):
                raise
    activation, mask = _dense(activation, mask)
    dtype = activation.dtype
    if dtype.is_complex:
        advice = "Take absolute values in a reducer: reduce=lambda activation, mask: max(activation.abs(), mask)."
        raise TensorKindError("complex numbers, of which none is the greatest", advice)
    if dtype in _FEW_OPERATIONS:
        return max(activation.to(_FEW_OPERATIONS[dtype]), mask).to(dtype)
    if dtype == torch.uint64:  # with its highest bit the other way round it is in the order of int64
        return (max(activation.view(torch.int64) ^ _LOWEST, mask) ^ _LOWEST).view(torch.uint64)
    if mask is None:
        return activation.amax(1)
    limit = float("-inf") if dtype.is_floating_point else False if dtype == torch.bool else torch.iinfo(dtype).min
    return torch.where(_expand(mask, activation), activation, limit).amax(1)


def position(k: int) -> Reducer:
    """A reducer that takes the `k`-th real position, counted from 0, or from the end when negative.

    Its name is ``position(k)``.

    Raises:
        PositionError: when used, a row has fewer real positions; it names the row.

    Example:
        >>> import torch
        >>> from activation_extractor.reducers import position
        >>> position(1)(torch.arange(6.0).reshape(1, 3, 2), torch.tensor([[False, True, True]]))
        tensor([[4., 5.]])
    """
    if not isinstance(k, int) or isinstance(k, bool):
        raise ArgumentTypeError("k of position(k)", "be an integer", k)

    def at_position(activation: Tensor, mask: Tensor | None) -> Tensor:
        activation, mask = _dense(activation, mask)
        if mask is None:
            mask = torch.ones(activation.shape[:2], dtype=torch.bool, device=activation.device)
        real = mask.sum(1)
        rank = real + k if k < 0 else torch.full_like(real, k)
        missing = (rank < 0) | (rank >= real)
        if not missing.is_meta and missing.any():
            row = int(missing.nonzero()[0])
            raise PositionError(k, row, int(real[row]))
        is_wanted = mask & (mask.cumsum(1) == rank[:, None] + 1)
        return _take(activation, is_wanted.int().argmax(1))

    at_position.__name__ = at_position.__qualname__ = f"position({k})"
    return at_position


def _dense(activation: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """An activation in full, quantized numbers as float32; the rows of a nested one padded, with a mask that says so.

    Raises:
        TensorKindError: a nested row has no real position.
    """
    if not activation.is_nested:
        return as_dense(whole_here(activation)), mask
    rows = rows_of(activation)
    padded = pad_sequence(rows, batch_first=True)
    lengths = torch.tensor(list(map(len, rows)), device=activation.device)
    is_real = torch.arange(padded.shape[1], device=lengths.device) < lengths[:, None]
    is_real = is_real if mask is None else is_real & mask
    empty = (~is_real.any(1)).nonzero()
    if len(empty):
        kind = f"a nested tensor without a real position in row {int(empty[0])}"
        raise TensorKindError(kind, "Leave empty rows out of the batch.")
    return padded, is_real


def _expand(mask: Tensor, activation: Tensor) -> Tensor:
    return mask.reshape(*mask.shape, *[1] * (activation.dim() - 2))  # (batch, seq, 1, ...)


def _take(activation: Tensor, index: Tensor) -> Tensor:
    return activation[torch.arange(len(index), device=activation.device), index]


_BUILT_IN: dict[str, Reducer] = {"full": full, "mean": mean, "first": first, "last": last, "max": max}
_ROOM = __name__.rpartition(".")[0]
_OURS = (__name__, _ROOM, f"{_ROOM}._pooling")  # where reducers of the library, made of others, come from
_ALIASES = {"FT": "first", "LT": "last"}  # the words of the original system


def resolve_reducers(reduce: Any) -> dict[str, Reducer]:
    """The reducers that ``reduce=`` means, by name: a name, a callable, an iterable of these, or a dict of names.

    Raises:
        ArgumentError: an unknown name, or none at all; or a reducer that names fields of batches.
        DuplicateLayerError: two reducers of one name.
    """
    if isinstance(reduce, Mapping) and reduce:
        for name in reduce:
            if not isinstance(name, str) or not name:
                raise ArgumentTypeError("a name in reduce", "be a string that is not empty", name)
        return {name: _with_name(reducer)[1] for name, reducer in reduce.items()}
    several = isinstance(reduce, Iterable) and not isinstance(reduce, str)
    reducers: dict[str, Reducer] = {}
    for item in reduce if several else [reduce]:
        name, reducer = _with_name(item)
        if name in reducers:
            advice = "Leave one of them out, or name them: reduce={'name': reducer}."
            raise DuplicateLayerError(name, "for two reducers", advice)
        reducers[name] = reducer
    if not reducers:
        raise ArgumentError("reduce", "name at least one reducer", reduce, f"Built in: {', '.join(_BUILT_IN)}.")
    return reducers


def _with_name(reducer: Any) -> tuple[str, Reducer]:
    if isinstance(reducer, str):
        name = str(canonical_name(reducer))
        if name not in _BUILT_IN:
            condition = f"be one of {', '.join(_BUILT_IN)}, FT, LT or a callable"
            advice = "For one position use reducers.position(k)."
            if name == "weighted_mean":
                advice = "Use reducers.weighted_mean(weights), or in extract weights=."
            raise ArgumentError("reduce", condition, reducer, advice)
        return name, _BUILT_IN[name]
    if not callable(reducer):
        raise ArgumentTypeError("reduce", "be a name, a callable (activation, mask) -> tensor or several", reducer)
    if owns_result(reducer) and getattr(reducer, "lacks_fields", False):
        advice = "Only extract takes fields out of batches: give it a tensor with a value for each row."
        raise ArgumentError("a reducer of a with-block", "name no field of batches", reducer.__name__, advice)
    return getattr(reducer, "__name__", type(reducer).__name__), reducer


def canonical_name(name: object) -> object:
    """A reducer's own name for an alias (``FT``, ``LT``); anything else as it is."""
    return _ALIASES.get(name, name) if isinstance(name, str) else name


def reduce_sequence(layer: str, name: str, reducer: Reducer, sequence: Tensor, mask: Tensor | None) -> Tensor:
    """Reduce ``(batch, seq, *features)``; the result owns its memory, and a user's reducer writes to copies alone.

    Raises:
        ReducerError: the reducer returned no tensor with `batch` rows.
    """
    if not (is_ours := owns_result(reducer)):
        sequence, mask = sequence.clone(), None if mask is None else mask.clone()
    try:
        result = reducer(sequence, mask)
    except Exception as error:
        note_reduction(error, layer, name, sequence)
        raise
    return result if is_ours else _own_result(layer, name, sequence, result)


def _own_result(layer: str, name: str, sequence: Tensor, result: Tensor) -> Tensor:
    """A copy of what a user's reducer returned: it may be a part of what it was given, or a buffer that it uses again.

    Raises:
        ReducerError: it is no tensor with a row for each row of the batch.
    """
    if not isinstance(result, Tensor):
        raise ReducerError(name, layer, f"a {type(result).__name__}")
    if result.dim() == 0 or result.size(0) != sequence.size(0):
        shape = "a nested one" if result.is_nested else tuple(result.shape)
        raise ReducerError(name, layer, f"shape {shape} for {sequence.size(0)} rows")
    return result.clone()


def note_reduction(error: Exception, layer: str, name: str, sequence: Tensor) -> None:
    """Add to an error that a reducer raised what it was reducing.

    Raises:
        TensorKindError: from an error of torch over a tensor of a kind that few of its operations know.
    """
    place = f"for reducer {name!r}"
    if isinstance(error, TensorKindError) and error.layer is None:
        raise TensorKindError(error.kind, error.advice, layer, place) from error
    if kind := refused_kind(error, sequence):
        raise TensorKindError(*kind, layer, place) from error
    shape = "nested" if sequence.is_nested else tuple(sequence.shape)
    add_note(error, f"while reducing layer {layer!r} with {name!r}, activation {shape}")


def owns_result(reducer: Reducer) -> bool:
    """Whether the reducer is known to return memory of its own rather than a view of the activation."""
    return reducer in _BUILT_IN.values() or getattr(reducer, "__module__", None) in _OURS


def is_linear(reducer: Reducer) -> bool:
    """Whether a reducer gives the same before a mean over layers as behind it, but for rounding."""
    return owns_result(reducer) and bool(getattr(reducer, "is_linear", reducer not in (full, max)))
