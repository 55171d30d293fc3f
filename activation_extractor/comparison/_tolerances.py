"""How far apart values may be: tolerances, by layer and by dtype."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from activation_extractor.errors import ArgumentError, ArgumentTypeError
from activation_extractor.layers._patterns import Patterns, glob

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
        self._rtol, self._atol = _ByLayer("rtol", rtol), _ByLayer("atol", atol)

    def check(self, layers: Sequence[str]) -> None:
        """Refuse a pattern that fits none of the layers."""
        known = set(layers)
        for given in (self._rtol, self._atol):
            for pattern in given.by_pattern:
                if pattern not in known and not any(map(glob(pattern).fullmatch, layers)):
                    raise ArgumentError(f"a pattern in {given.argument}", "fit a layer of left", pattern)

    def of(self, layer: str, dtypes: Sequence[torch.dtype]) -> Tolerance:
        """The tolerance of a layer with these dtypes."""
        rtol, atol = self._rtol.of(layer), self._atol.of(layer)
        return Tolerance(default_rtol(*dtypes) if rtol is None else rtol, atol)


class _ByLayer:
    """One argument's tolerances, by layer pattern or for all layers."""

    def __init__(self, argument: str, given: GivenTolerance) -> None:
        self.argument = argument
        self.by_pattern: Mapping[str, float] = dict(given) if isinstance(given, Mapping) else {}
        self._of_all = None if isinstance(given, Mapping) else given
        of_all: dict[Any, Any] = {} if self._of_all is None else {"": given}
        for pattern, tolerance in {**self.by_pattern, **of_all}.items():
            is_number = isinstance(tolerance, int | float) and not isinstance(tolerance, bool)
            if not is_number or not isinstance(pattern, str):
                raise ArgumentTypeError(argument, "be a number, or map layer patterns to numbers", given)
            if not 0 <= tolerance < math.inf:
                raise ArgumentError(argument, "be finite and not negative", tolerance)
        self._patterns, self._values = Patterns(self.by_pattern), list(self.by_pattern.values())

    def of(self, layer: str) -> float | None:
        """The tolerance of a layer; None where none is given."""
        place = self._patterns.first(layer)
        return self._of_all if place is None else self._values[place]


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
