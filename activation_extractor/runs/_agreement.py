"""Whether the units of a store lie where batches, which are asked for by their numbers, would put them."""

from __future__ import annotations

import numpy as np

from activation_extractor.runs._items import BatchItems
from activation_extractor.runs._layouts import BatchLayout
from activation_extractor.runs._run import Run
from activation_extractor.runs._sources import NumberedBatches, Split


def agreed_layout(run: Run, batches: NumberedBatches, split: Split, *, has_order: bool) -> BatchLayout | None:
    """Where the items of batches are, if the stored units were made from these batches; None where that is not sure.

    What the journals say of the first and the last item of each unit is compared, which tells batches of other sizes.
    """
    assert run.units is not None
    if isinstance(run.items, BatchItems) and not run.units.is_even:
        return None
    layout = batches.layout(run.items, split, has_order=has_order)
    numbers = sorted(run.stored.data)
    if layout is None or not numbers:
        return layout
    starts = np.array(run.units.first_places(numbers[-1] + 2))
    if starts[-1] > layout.most_items:
        return None
    if has_order:  # each row comes with its place
        return layout
    told = np.array([_told(run.stored.positions(number)) for number in numbers], dtype=np.int64)  # (units, 2, 2)
    begin, end = starts[:-1][numbers], starts[1:][numbers] - 1
    found = layout.positions_of(begin), layout.positions_of(end)
    is_there = all(it is not None and np.array_equal(it, told[:, which]) for which, it in enumerate(found))
    return layout if is_there else None


def _told(positions: tuple[tuple[int, int] | None, tuple[int, int] | None]) -> list[tuple[int, int]]:
    return [(-1, -1) if position is None else position for position in positions]
