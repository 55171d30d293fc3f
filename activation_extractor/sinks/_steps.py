"""What a step hands to a sink."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from activation_extractor._format._rows import KeptColumn, Ragged, RowId
from activation_extractor.errors import ArgumentError, ArgumentTypeError, StepError
from activation_extractor.reducers._mask_fit import MaskCheck


@dataclass(frozen=True)
class Step:
    """One forward of the model, or one ``step`` block.

    Attributes:
        index: the step's number in its block, from 0.
        rows: how many samples it has.
        values: by recorded name and reducer, a tensor with one row for each sample, or `Ragged`. The tensors are the
            sink's own, detached, on the device where they were reduced.
        ids: the samples' ids, or None when none were given.
        keep: further columns of the user's, with one row for each sample: tensors on any device, or lists of text.
    """

    index: int
    rows: int
    values: Mapping[tuple[str, str], Tensor | Ragged]
    ids: Sequence[RowId] | None = None
    keep: Mapping[str, KeptColumn] = field(default_factory=dict)
    _checks: list[MaskCheck] = field(default_factory=list, repr=False)

    def check_masks(self) -> None:
        """Wait for the masks that the values were reduced with, where these are on an accelerator, and check them.

        It is called before `Sink.write`, unless the sink `reads_later`.

        Raises:
            MaskError: a mask is additive, or has a row without a real position.
        """
        while self._checks:
            check = self._checks.pop(0)
            check.settle(check.verdict)


def check_ids(ids: Any) -> list[RowId] | None:
    """Row ids as a list of strings or Python integers; None when none are given."""
    if ids is None:
        return None
    if isinstance(ids, Tensor | np.ndarray):
        ids = ids.tolist()
    if not isinstance(ids, Iterable) or isinstance(ids, str | bytes | AbstractSet):
        raise ArgumentTypeError("ids", "be a sequence of strings or integers, one for each row", ids)
    checked = [int(one) if isinstance(one, np.integer) else one for one in ids]
    wrong = [one for one in checked if not isinstance(one, int | str) or isinstance(one, bool)]
    if wrong or len({type(one) for one in checked}) > 1:
        raise ArgumentTypeError("ids", "be all strings or all integers", (wrong or checked)[0])
    unfit = [one for one in checked if not _fits(one)]
    if unfit:
        raise ArgumentError("ids", "be UTF-8 text or fit 64 bits", unfit[0])
    return checked


def _fits(row_id: RowId) -> bool:
    if isinstance(row_id, int):
        return -(2**63) <= row_id < 2**63
    try:
        row_id.encode()
    except UnicodeEncodeError:  # half of a surrogate pair
        return False
    return True


def check_keep(keep: Any) -> dict[str, KeptColumn]:
    """Further columns as tensors or lists of text, by name."""
    if keep is None:
        return {}
    if not isinstance(keep, Mapping) or not all(isinstance(name, str) and name for name in keep):
        raise ArgumentTypeError("keep", "be a dict from names to tensors, arrays or lists", keep)
    return {name: _kept(name, values) for name, values in keep.items()}


def _kept(name: str, values: Any) -> KeptColumn:
    listed = values.tolist() if isinstance(values, np.ndarray) and values.dtype.kind in "UO" else values
    if isinstance(listed, list | tuple) and listed and all(isinstance(one, str) for one in listed):
        return _texts(name, list(listed))
    try:
        column = values.detach().clone() if isinstance(values, Tensor) else torch.from_numpy(np.array(values))
    except (TypeError, ValueError, RuntimeError) as error:
        condition = f"hold numbers or text in column {name!r}"
        raise ArgumentTypeError("keep", condition, type(values).__name__) from error
    if column.dim() == 0:
        raise ArgumentError("keep", f"have one row for each sample in column {name!r}", column.item())
    return column


def _texts(name: str, values: list[str]) -> list[str]:
    unfit = [one for one in values if not _fits(one)]
    if unfit:
        raise ArgumentError("keep", f"be UTF-8 text in column {name!r}", unfit[0])
    return values


def make_step(
    index: int,
    values: Mapping[tuple[str, str], Tensor | Ragged],
    ids: list[RowId] | None,
    keep: Mapping[str, KeptColumn],
    checks: Sequence[MaskCheck] = (),
) -> Step:
    """A step whose columns all have the same rows.

    Raises:
        StepError: they have not, or a column has no rows.
    """
    counts = {key: _rows(key, value) for key, value in values.items()}
    kept = {name: len(column) for name, column in keep.items()}
    rows = len(ids) if ids is not None else next(iter([*counts.values(), *kept.values()]))
    for key, count in (*counts.items(), *kept.items()):
        if count != rows:
            advice = "Group calls that belong together, give an id for each row, or leave that layer out."
            raise StepError("have the same rows in every column", f"{count} in {key!r} beside {rows}", advice)
    return Step(index, rows, values, ids, keep, list(checks))


def _rows(key: tuple[str, str], value: Tensor | Ragged) -> int:
    if isinstance(value, Ragged):
        return len(value.lengths)
    if not value.dim():
        raise StepError("have a row for each sample in every column", f"a single number in {key!r}", "Leave it out.")
    return value.shape[0]
