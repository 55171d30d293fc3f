"""Numbers that figures show: even samples of rows, principal components, norms, linear CKA."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from activation_extractor.errors import ArgumentError
from activation_extractor.store import Column

_MOST_BYTES = 1 << 30  # of rows that are held at once
_ROUNDING = 1e-13  # what centring leaves of a constant, as a part of it


def cka_matrix(layers: Sequence[Tensor]) -> Tensor:
    """Linear centred kernel alignment of each pair of representations of the same rows, between 0 and 1.

    ``||Y'X||² / (||X'X|| ||Y'Y||)`` with Frobenius norms, for X and Y with each feature's mean taken off (Kornblith,
    Norouzi, Lee, Hinton: Similarity of Neural Network Representations Revisited, ICML 2019, equation 5). It is 1 for
    representations that differ by a rotation, a scale and a shift. With fewer rows than features it is biased upward.
    Layers are ``(rows, features)``; the result is ``(layers, layers)`` float64, NaN for constant ones.

    Raises:
        ArgumentError: other shapes, or different numbers of rows.
    """
    for layer in layers:
        if layer.ndim != 2 or len(layer) != len(layers[0]):
            condition = f"have shape ({len(layers[0])}, features)"
            raise ArgumentError("Each layer", condition, tuple(layer.shape), "Take the same rows of all layers.")
    widths = [layer.shape[1] for layer in layers]
    if sum(widths) ** 2 < len(layers) * len(layers[0]) ** 2:
        features = torch.cat([_centred(layer) for layer in layers], dim=1)
        squares = (features.T @ features).square()  # blocks sum up to the squared Frobenius norms of Y'X
        bands = (torch.split(band, widths, 1) for band in torch.split(squares, widths))
        products = torch.stack([torch.stack([block.sum() for block in band]) for band in bands])
    else:
        grams = torch.stack([(rows @ rows.T).flatten() for rows in map(_centred, layers)])
        products = grams @ grams.T
    lengths = products.diagonal().sqrt()
    return (products / torch.outer(lengths, lengths)).clamp(0, 1)


def principal_components(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Where rows lie on their first two principal components, and how much of the variance each explains.

    From all eigenvectors of the smaller of covariance and Gram matrix, so that the same rows always give the same. The
    row that is farthest out on a component has a positive score.

    Rows are ``(rows, features)`` and finite; scores ``(rows, 2)`` and shares ``(2,)`` float64, zero where there is no
    component.
    """
    centred = _centred(rows, is_scaled=False)
    scale = centred.abs().max().clamp_min(torch.finfo(torch.float64).tiny) if centred.numel() else 1.0
    scaled = centred / scale
    is_wide = scaled.shape[1] > len(scaled)
    values, vectors = torch.linalg.eigh(scaled @ scaled.T if is_wide else scaled.T @ scaled)
    values, vectors = values.flip(0)[:2].clamp_min(0), vectors.flip(1)[:, :2]
    scores = vectors * values.sqrt() if is_wide else scaled @ vectors
    farthest = scores.gather(0, scores.abs().argmax(0, keepdim=True))
    scores = scores * torch.where(farthest < 0, -1.0, 1.0) * scale
    shares = values / scaled.square().sum().clamp_min(torch.finfo(torch.float64).tiny)
    absent = 2 - scores.shape[1]
    return torch.nn.functional.pad(scores, (0, absent)), torch.nn.functional.pad(shares, (0, absent))


def common_rows(columns: Sequence[Column], max_rows: int) -> tuple[list[Tensor], int]:
    """The same rows of all columns: which ones of each, sampled evenly, and how many they share.

    No more than `max_rows` are taken, and no more than fit in about a gigabyte. Indices are ``(rows,)`` int64.

    Raises:
        ArgumentError: `max_rows` is not positive.
    """
    if max_rows < 1:
        raise ArgumentError("max_rows", "be positive", max_rows)
    numbers = [column.rows.numpy() for column in columns]
    shared = numbers[0]
    for more in numbers[1:]:
        shared = shared[np.isin(shared, more)]
    row_bytes = sum(_width(column) * _held(column).itemsize for column in columns)
    count = min(len(shared), max_rows, max(3, _MOST_BYTES // max(1, row_bytes)))
    taken = shared[np.linspace(0, max(0, len(shared) - 1), count).round().astype(np.int64)]
    orders = [np.argsort(rows, kind="stable") for rows in numbers]
    places = (order[np.searchsorted(rows, taken, sorter=order)] for rows, order in zip(numbers, orders, strict=True))
    return [torch.from_numpy(indices) for indices in places], len(shared)


def read_rows(column: Column, indices: Tensor) -> Tensor:
    """Rows of a column as ``(rows, features)``: the mean over the positions where rows have them, else flat.

    Only these rows are read, a block at a time, as float32, or float64 where the column is.
    """
    out, place = torch.empty((len(indices), _width(column)), dtype=_held(column)), 0
    for block in _blocks(column, indices):
        means = block.mean(1) if has_positions(column) else block
        out[place : place + len(block)] = means.flatten(1)
        place += len(block)
    return out


def read_norms(column: Column, indices: Tensor) -> Tensor:
    """The L2 norms of rows of a column, of each position where rows have them; ``(norms,)`` float64."""
    parts = [torch.empty(0, dtype=torch.float64)]
    for block in _blocks(column, indices):
        vectors = block.flatten(0, 1).flatten(1) if has_positions(column) else block.flatten(1)
        parts.append(torch.linalg.vector_norm(vectors, dim=1))
    return torch.cat(parts)


def has_positions(column: Column) -> bool:
    """Whether a row is ``(positions, *features)``: in ragged columns, and where positions and features were kept."""
    return column.is_ragged or len(column.row_shape) == 2


def _centred(rows: Tensor, *, is_scaled: bool = True) -> Tensor:
    """Rows in float64 with each feature's mean taken off, and scaled so that no square of a square overflows.

    Features that are constant but for rounding become zero.
    """
    rows = rows.double()
    centred = rows - rows.mean(0)
    is_rounding = centred.abs().amax(0) <= _ROUNDING * rows.abs().amax(0)
    centred = torch.where(is_rounding, 0.0, centred)
    if not is_scaled:
        return centred
    most = centred.abs().max()
    return centred / most if most > 0 else centred


def _held(column: Column) -> torch.dtype:
    return torch.float64 if column.dtype in (torch.float64, torch.complex128) else torch.float32


def _width(column: Column) -> int:
    shape = column.row_shape[1:] if has_positions(column) and not column.is_ragged else column.row_shape
    return int(np.prod(shape, dtype=np.int64)) * (2 if column.dtype.is_complex else 1)


def _blocks(column: Column, indices: Tensor) -> Iterator[Tensor]:
    """Rows a block at a time, ``(rows, features)`` or ``(rows, positions, *features)`` float64; complex ones as pairs.

    Ragged rows come one by one.
    """
    for block in column.blocks(indices=indices):
        for rows in (row[None] for row in block) if column.is_ragged else (block,):
            values = (torch.view_as_real(rows) if rows.is_complex() else rows).double()
            yield values if has_positions(column) or values.ndim > 1 else values[:, None]
