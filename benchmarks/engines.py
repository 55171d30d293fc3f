"""`Columns`, called as an engine calls it, beside `extract` over the same rows in one process."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

from activation_extractor import Columns
from benchmarks.extraction import BLOCKS, POOLED, extract_into
from benchmarks.measure import Case, Group, require
from benchmarks.models import gpt2, token_batches
from benchmarks.sizes import Size
from benchmarks.storage import in_folder
from benchmarks.systems import ready


def columns(size: Size) -> Iterator[Case]:
    """Mean and last token of every block, handed back to the engine, as arrays and as tensors of Arrow."""
    require("pyarrow")
    import pyarrow as pa

    model, batches = gpt2(size), token_batches(max(1, size.batches // 8))
    arrays = [{"id": batch["id"].numpy(), "input_ids": batch["input_ids"].numpy()} for batch in batches]
    tables = [
        pa.table({"id": batch["id"], "input_ids": pa.FixedShapeTensorArray.from_numpy_ndarray(batch["input_ids"])})
        for batch in arrays
    ]
    kinds: list[tuple[str, Sequence[Any]]] = [("arrays", arrays), ("tables", tables)]
    for name, given in kinds:
        yield Case(
            name=f"columns.{name}",
            about=f"a batch of 4 x 128 through {size.blocks} blocks, {name} in and out, beside `extract` to the disk",
            ours=partial(ready, partial(map_batches, Columns(model, BLOCKS, reduce=POOLED), given)),
            reference=partial(in_folder, partial(extract_into, model, batches, reduce=POOLED)),
            calls=len(batches),
            loops=1,
            target=1.1,
            most_rounds=31,
        )


ENGINES: list[Group] = [("columns", columns)]


def map_batches(function: Columns, batches: Sequence[Any]) -> None:
    """What an engine does, but for where it gets the batches from and what it does with the results."""
    for batch in batches:
        function(batch)
