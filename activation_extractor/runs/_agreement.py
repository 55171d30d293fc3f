"""Whether the units of a store lie where batches, which are asked for by their numbers, would put them."""

from __future__ import annotations

import numpy as np

from activation_extractor.runs._items import BatchItems
from activation_extractor.runs._layouts import BatchLayout
from activation_extractor.runs._run import Run
from activation_extractor.runs._sources import NumberedBatches, Split


def agreed_layout(run: Run, batches: NumberedBatches, split: Split, *, has_order: bool) -> BatchLayout | None:
    """Where the items of batches are, if the stored units were made from these batches; None where that is not sure.

    What the journals say of the first and the last item of each unit is compared, which tells batches of other sizes. A
    unit of which they say nothing may lie anywhere.
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
    known = {number: data for number, data in run.stored.data.items() if data}
    indices = np.array([*known], dtype=np.int64)
    found = [layout.positions_of(places) for places in (starts[:-1][indices], starts[1:][indices] - 1)]
    told = [[data.begins or (-1, -1) for data in known.values()], [data.ends or (-1, -1) for data in known.values()]]
    is_there = all(np.array_equal(it, np.array(some).reshape(-1, 2)) for it, some in zip(found, told, strict=True))
    return layout if is_there else None
