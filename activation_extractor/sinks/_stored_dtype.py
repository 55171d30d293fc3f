"""Whether values fit the dtype in which they are stored."""

from __future__ import annotations

import torch
from torch import Tensor

from activation_extractor._display import dtype_name
from activation_extractor.errors import StoredDtypeError
from activation_extractor.sinks._step import Step


class OverflowCheck:
    """A check that no finite value of a column became infinite, computed where the column is.

    Attributes:
        verdict: ``(3,)`` int64 on the column's device: whether one did; the first row of `computed` that has one; and
            the bits of the one of this row that is farthest from zero.
    """

    def __init__(
        self, key: tuple[str, str], computed: Tensor, stored: Tensor, lengths: Tensor | None, step: Step
    ) -> None:
        is_overflow = stored.isinf() & ~computed.isinf()
        has_overflow = is_overflow.flatten(1).any(1) if stored.dim() > 1 else is_overflow
        row = has_overflow.int().argmax().reshape(1)  # argmax gives the first of equal values
        values, converted = computed.index_select(0, row).flatten(), stored.index_select(0, row).flatten()
        is_wanted = converted.isinf() & ~values.isinf()
        farthest = torch.where(is_wanted, values, 0).abs().argmax().reshape(1)
        self._key, self._lengths, self._ids = key, lengths, step.ids
        self._dtype, self._computed = stored.dtype, computed.dtype
        value = values.index_select(0, farthest)
        bits = value.view(torch.int64) if value.dtype == torch.float64 else value.float().view(torch.int32).long()
        self.verdict = torch.cat([has_overflow.any().reshape(1).long(), row.long(), bits])

    @classmethod
    def add(cls, key: tuple[str, str], computed: Tensor, stored: Tensor, lengths: Tensor | None, step: Step) -> None:
        """Check a column of a step: on the CPU at once, elsewhere with the step's other checks."""
        if torch.finfo(computed.dtype).max <= torch.finfo(stored.dtype).max or not computed.numel():
            return
        if computed.itemsize == 1:  # a float8, of which torch does not say what is infinite
            computed = computed.float()
        if computed.device.type != "cpu":
            step._checks.append(cls(key, computed, stored, lengths, step))
        elif stored.isinf().any():
            check = cls(key, computed, stored, lengths, step)
            check.settle(check.verdict)

    def settle(self, verdict: Tensor) -> None:
        """Raise the error that a verdict stands for; `verdict` may be a copy on the CPU.

        Raises:
            StoredDtypeError: a finite value is too large.
        """
        is_too_large, row, bits = verdict.tolist()
        if not is_too_large:
            return
        if self._lengths is not None:  # of positions, one row's behind another's
            row = int(torch.searchsorted(self._lengths.cpu().cumsum(0), row, right=True))
        width = torch.int64 if self._computed == torch.float64 else torch.int32
        value = torch.tensor(bits).to(width).view(torch.float64 if width == torch.int64 else torch.float32).item()
        name = f"row {row}" + (f", id {self._ids[row]!r}" if self._ids else "")
        dtype = self._dtype
        raise StoredDtypeError(*self._key, name, value, dtype_name(dtype), torch.finfo(dtype).max)
