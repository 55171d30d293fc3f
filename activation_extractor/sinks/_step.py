"""What a step hands to a sink."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from activation_extractor._format._stored_rows import KeptColumn, Ragged, RowId
from activation_extractor._tensors import as_plain
from activation_extractor.errors import ArgumentError, ArgumentTypeError, StepError
from activation_extractor.reducers._mask_fit import Check


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
    _checks: list[Check] = field(default_factory=list, repr=False)

    def check_masks(self) -> None:
        """Wait for the masks that the values were reduced with, where these are on an accelerator, and check them.

        It is called before `Sink.write`, unless the sink `reads_later`.

        Raises:
            MaskError: a mask is additive, or has a row without a real position.
        """
        while self._checks:
            check = self._checks.pop(0)
            check.settle(check.verdict)


def part_of(step: Step, rows: Sequence[int]) -> Step:
    """Some rows of a step, in this order: views of its tensors where they follow each other, else copies."""
    if len(rows) == step.rows and list(rows) == list(range(step.rows)):
        return step
    values = {key: _rows_of(value, rows) for key, value in step.values.items()}
    keep = {name: _rows_of(value, rows) for name, value in step.keep.items()}
    ids = None if step.ids is None else [step.ids[row] for row in rows]
    return replace(step, rows=len(rows), values=values, ids=ids, keep=keep)


def nbytes_of(step: Step) -> int:
    """The bytes of its columns, but for text."""
    columns = [value.values if isinstance(value, Ragged) else value for value in step.values.values()]
    return sum(column.nbytes for column in [*columns, *step.keep.values()] if isinstance(column, Tensor))


def join(steps: Sequence[Step]) -> Step:
    """One step of the rows of several, with the columns that all of them have."""
    if len(steps) == 1:
        return steps[0]
    values = {
        key: _joined([step.values[key] for step in steps])
        for key in steps[0].values
        if all(key in step.values for step in steps)
    }
    keep = {name: _joined([step.keep[name] for step in steps]) for name in steps[0].keep}
    ids = None if steps[0].ids is None else [row_id for step in steps for row_id in step.ids or ()]
    checks = [check for step in steps for check in step._checks]
    return Step(steps[0].index, sum(step.rows for step in steps), values, ids, keep, checks)


def _joined(parts: Sequence[Any]) -> Any:
    """The rows of several columns, of which each is a tensor, or each `Ragged`, or each a list of text."""
    if isinstance(parts[0], list):
        return [text for part in parts for text in part]
    if isinstance(parts[0], Ragged):
        return Ragged(torch.cat([part.values for part in parts]), torch.cat([part.lengths for part in parts]))
    return torch.cat(list(parts))


def _rows_of(column: Any, rows: Sequence[int]) -> Any:
    """Some rows of a column: a tensor, `Ragged`, or a list of text."""
    if isinstance(column, list):
        return [column[row] for row in rows]
    if isinstance(column, Ragged):
        chosen = column.rows()
        return Ragged(torch.cat([chosen[row] for row in rows]), column.lengths[torch.as_tensor(rows)])
    if rows and list(rows) == list(range(rows[0], rows[0] + len(rows))):
        return column[rows[0] : rows[0] + len(rows)]
    return column[torch.as_tensor(rows, dtype=torch.int64, device=column.device)]


def check_ids(ids: Any) -> list[RowId] | None:
    """Row ids as a list of strings or Python integers; None when there are none.

    Raises:
        ArgumentTypeError: they are not a sequence, or not all strings or all integers.
        ArgumentError: text that is not UTF-8, or an integer of more than 64 bits.
    """
    if ids is None:
        return None
    if isinstance(ids, Tensor | np.ndarray):
        ids = ids.tolist()
    if not isinstance(ids, Iterable) or isinstance(ids, str | bytes | AbstractSet):
        raise ArgumentTypeError("ids", "be a sequence of strings or integers, one for each row", ids)
    checked = [int(row_id) if isinstance(row_id, np.integer) else row_id for row_id in ids]
    wrong = [row_id for row_id in checked if not isinstance(row_id, int | str) or isinstance(row_id, bool)]
    if wrong or len({type(row_id) for row_id in checked}) > 1:
        raise ArgumentTypeError("ids", "be all strings or all integers", (wrong or checked)[0])
    for row_id in checked:
        if not _can_be_stored(row_id):
            raise ArgumentError("ids", "be UTF-8 text or fit 64 bits", row_id)
    return checked


def _can_be_stored(row_id: RowId) -> bool:
    if isinstance(row_id, int):
        return -(2**63) <= row_id < 2**63
    try:
        row_id.encode()
    except UnicodeEncodeError:  # half of a surrogate pair
        return False
    return True


def check_keep(keep: Any) -> dict[str, KeptColumn]:
    """Kept columns as tensors or lists of text, by name.

    Raises:
        ArgumentTypeError: they are not a dict, or a column holds neither numbers nor text.
        ArgumentError: a column is a single number, or holds text that is not UTF-8.
    """
    if keep is None:
        return {}
    if not isinstance(keep, Mapping) or not all(isinstance(name, str) and name for name in keep):
        raise ArgumentTypeError("keep", "be a dict from names to tensors, arrays or lists", keep)
    return {name: _kept_column(name, values) for name, values in keep.items()}


def _kept_column(name: str, values: Any) -> KeptColumn:
    texts = values.tolist() if isinstance(values, np.ndarray) and values.dtype.kind in "UO" else values
    if isinstance(texts, list | tuple) and texts and all(isinstance(text, str) for text in texts):
        for text in texts:
            if not _can_be_stored(text):
                raise ArgumentError("keep", f"be UTF-8 text in column {name!r}", text)
        return list(texts)
    try:
        column = as_plain(values).clone() if isinstance(values, Tensor) else torch.from_numpy(np.array(values))
    except (TypeError, ValueError, RuntimeError) as error:
        condition = f"hold numbers or text in column {name!r}"
        raise ArgumentTypeError("keep", condition, type(values).__name__) from error
    if column.dim() == 0:
        raise ArgumentError("keep", f"have one row for each sample in column {name!r}", column.item())
    return column


def make_step(
    index: int,
    values: Mapping[tuple[str, str], Tensor | Ragged],
    ids: list[RowId] | None,
    keep: Mapping[str, KeptColumn],
    checks: Sequence[Check] = (),
) -> Step:
    """A step whose columns all have the same rows.

    Raises:
        StepError: they have not, or a column has no rows.
    """
    counts: list[tuple[Any, int]] = []
    for key, value in values.items():
        column = value.lengths if isinstance(value, Ragged) else value
        if not column.dim():
            got = f"a single number in {key!r}"
            raise StepError("have a row for each sample in every column", got, "Leave it out.")
        counts.append((key, column.shape[0]))
    counts += [(name, len(kept)) for name, kept in keep.items()]
    rows = len(ids) if ids is not None else counts[0][1]
    for key, count in counts:
        if count != rows:
            advice = "Group calls that belong together, give an id for each row, or leave that layer out."
            raise StepError("have the same rows in every column", f"{count} in {key!r} beside {rows}", advice)
    return Step(index, rows, values, ids, keep, list(checks))
