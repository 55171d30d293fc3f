"""How close values are to reference values: what is measured, and from when on they differ."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from activation_extractor.comparison._tolerances import Tolerance

_LOWEST = -(2**63)


class Closeness:
    """How close values are to reference values, added up piece by piece in float64.

    What is not finite on both sides is counted and left out of everything else. The numbers are those of
    `LayerComparison`, whose left side is the reference.
    """

    def __init__(self, tolerance: Tolerance) -> None:
        self.max_abs = self.max_rel = 0.0
        self.nan_count = self.inf_count = 0
        self._tolerance, self.rtol = tolerance, tolerance.rtol
        self._excess = 0.0  # of the differences over their relative tolerance, where `atol` is known in the end
        self._is_outside = False
        self._finite = 0
        self._dot = self._reference_square = self._square = 0.0

    def add(self, reference: Tensor, values: Tensor) -> None:
        """Take in a piece: equally many numbers on both sides, of any real or complex dtype, on any device.

        It is copied to the CPU and compared there; beside it a few float64 tensors of its size are held.
        """
        is_complex = reference.is_complex() or values.is_complex()
        reference, values = _flat(reference, is_complex).cpu(), _flat(values, is_complex).cpu()
        left, right = reference.double(), values.double()
        distance = _distance(reference, values, left, right)
        squares = float(left @ left), float(right @ right)
        if not math.isfinite(sum(squares)):
            nans, right_nans = left.isnan(), right.isnan()
            self.nan_count += int((nans ^ right_nans).sum())
            self.inf_count += int(((left.isinf() | right.isinf()) & (left != right) & ~nans & ~right_nans).sum())
            finite = left.isfinite() & right.isfinite()
            left, right, distance = left[finite], right[finite], distance[finite]
            squares = float(left @ left), float(right @ right)
        self._finite += len(left)
        self._dot += float(left @ right)
        self._reference_square += squares[0]
        self._square += squares[1]
        if distance.any():
            size = left.abs()
            self.max_abs = max(self.max_abs, float(distance.max()))
            self.max_rel = max(self.max_rel, float(torch.where(size > 0, distance / size, 0.0).max()))
            if self._tolerance.atol is None:
                self._excess = max(self._excess, float(distance.sub(size, alpha=self.rtol).max()))
            else:
                self._is_outside |= bool((distance > self._tolerance.atol + self.rtol * size).any())

    @property
    def cosine(self) -> float:
        """The cosine of the angle between all values and all reference values; NaN where one side is all zeros."""
        lengths = math.sqrt(self._reference_square) * math.sqrt(self._square)
        return max(-1.0, min(1.0, self._dot / lengths)) if 0 < lengths < math.inf else math.nan

    @property
    def atol(self) -> float:
        """The absolute tolerance that is used."""
        if self._tolerance.atol is not None:
            return self._tolerance.atol
        scale = math.sqrt(self._reference_square / max(1, self._finite))
        return self.rtol * scale if scale < math.inf else 0.0

    @property
    def is_close(self) -> bool:
        """Whether all finite values are within the tolerance."""
        return not self._is_outside and self._excess <= self.atol


def _distance(reference: Tensor, values: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """How far apart numbers of any real dtype are, float64; `left` and `right` are the same numbers in float64.

    Integers are subtracted as integers, since float64 rounds large ones.
    """
    is_unsigned = [tensor.dtype == torch.uint64 for tensor in (reference, values)]
    if reference.is_floating_point() or values.is_floating_point() or is_unsigned[0] != is_unsigned[1]:
        return (right - left).abs()
    # XOR with the lowest integer maps uint64 to int64, keeping order and distances.
    whole, other = (part.to(torch.int64) ^ (_LOWEST if is_unsigned[0] else 0) for part in (reference, values))
    apart = torch.maximum(whole, other) - torch.minimum(whole, other)  # wraps above 2**63
    return torch.where(apart < 0, apart.double() + 2.0**64, apart.double())


def _flat(tensor: Tensor, is_complex: bool) -> Tensor:
    """All its numbers in one axis; complex ones as two each."""
    if is_complex:
        tensor = torch.view_as_real(tensor.to(torch.complex128))
    return tensor.reshape(-1)
