"""How far apart values may be: tolerances, by layer and by dtype."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from activation_extractor.errors import ArgumentError, ArgumentTypeError
from activation_extractor.layers._patterns import glob

GivenTolerance = float | Mapping[str, float] | None
# What rounding may come to, beside the scale of a layer: more than any layer of pretrained transformers of 6 and 8
# blocks showed against finer dtypes, other attention kernels and other threads. Halves are 32 epsilons.
_ROUNDING = {
    torch.float64: 1e-9,
    torch.float32: 1e-4,
    torch.float16: 2.0**-5,
    torch.bfloat16: 2.0**-2,
    torch.complex128: 1e-9,
    torch.complex64: 1e-4,
    torch.complex32: 2.0**-5,
}
_COARSEST = 2.0**-1  # float8


class Tolerances:
    """The tolerance of each layer; one that is negative or no number is an `ArgumentError`."""

    def __init__(self, rtol: GivenTolerance, atol: GivenTolerance) -> None:
        self._rtol, self._atol = _by_pattern("rtol", rtol), _by_pattern("atol", atol)

    def check(self, layers: Sequence[str]) -> None:
        """Refuse a pattern that fits none of the layers."""
        for argument, given in (("rtol", self._rtol), ("atol", self._atol)):
            for pattern in given:
                if not any(map(_layers_of(pattern).fullmatch, layers)):
                    raise ArgumentError(f"a pattern in {argument}", "fit a layer of left", pattern)

    def of(self, layer: str, dtypes: Sequence[torch.dtype]) -> Tolerance:
        """The tolerance of a layer with these dtypes."""
        rtol, atol = _first_fit(self._rtol, layer), _first_fit(self._atol, layer)
        return Tolerance(default_rtol(*dtypes) if rtol is None else rtol, atol)


def _by_pattern(argument: str, given: GivenTolerance) -> dict[str | None, float]:
    """Tolerances by layer pattern; None is every layer."""
    if given is None:
        return {}
    tolerances: dict[str | None, float] = dict(given.items()) if isinstance(given, Mapping) else {None: given}
    for pattern, tolerance in tolerances.items():
        is_number = isinstance(tolerance, int | float) and not isinstance(tolerance, bool)
        if not is_number or not isinstance(pattern, str | None):
            raise ArgumentTypeError(argument, "be a number, or map layer patterns to numbers", given)
        if not 0 <= tolerance < math.inf:
            raise ArgumentError(argument, "be finite and not negative", tolerance)
    return tolerances


def _first_fit(tolerances: Mapping[str | None, float], layer: str) -> float | None:
    fits = (tolerance for pattern, tolerance in tolerances.items() if _layers_of(pattern).fullmatch(layer))
    return next(fits, None)


def _layers_of(pattern: str | None) -> re.Pattern[str]:
    return re.compile(".*", re.DOTALL) if pattern is None else glob(pattern)


def default_rtol(*dtypes: torch.dtype) -> float:
    """The relative tolerance of values of these dtypes: that of the coarsest; 0 for integers and booleans."""
    inexact = [dtype for dtype in dtypes if dtype.is_floating_point or dtype.is_complex]
    return max((_ROUNDING.get(dtype, _COARSEST) for dtype in inexact), default=0.0)


@dataclass(frozen=True)
class Tolerance:
    """Beyond which values differ: ``|value - reference| > atol + rtol * |reference|``.

    An `atol` of None is `rtol` times the root mean square of all reference values.
    """

    rtol: float
    atol: float | None = None
