"""A whole data set to the disk, pooled and full, beside the bare loop, a plain file write, and the original system."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from activation_extractor import extract, open_store
from activation_extractor.sinks._transfer import Arrival, Transfer
from benchmarks.measure import Case, Group, Run, System, UnavailableError
from benchmarks.models import gpt2, token_batches
from benchmarks.sizes import Size
from benchmarks.storage import MIB, in_folder, write_plainly
from benchmarks.systems import first_tensor, prepared, ready

BLOCKS = "h.*"
POOLED = ["mean", "last"]
_SHAPE = (4, 128, 256)


def pooled(size: Size) -> Iterator[Case]:
    """Mean and last token of every block, to disk, beside the bare loop of forwards.

    On an accelerator so small a model is bound by launches, to which each reducer adds; nothing is demanded there.
    """
    model, batches = gpt2(size), token_batches(size.batches)
    yield Case(
        name="extract.pooled",
        about=f"a batch of 4 x 128 through {size.blocks} blocks of width 256, mean and last of each to the disk",
        ours=partial(in_folder, partial(extract_into, model, batches, reduce=POOLED)),
        reference=partial(ready, partial(forward_alone, model, batches, size.device)),
        calls=size.batches,
        loops=1,
        target=None if size.has_accelerator else 1.02,
        most_rounds=15,
    )


def saving(size: Size) -> Iterator[Case]:
    """The same without the time of a forward, so that saving is seen: beside the original system's way."""
    model, batches = Handing(size.blocks), activation_batches(size)
    floor = partial(ready, partial(forward_alone, model, batches, size.device))
    yield Case(
        name="save.pooled",
        about="saving a batch, beside copying it to numpy whole, reducing it there, and a compressed file a layer",
        ours=partial(in_folder, partial(extract_into, model, batches, reduce=POOLED)),
        reference=partial(in_folder, partial(save_like_the_original, model, batches)),
        floor=floor,
        calls=size.batches,
        loops=1,
        target=0.2,
        most_rounds=31,
    )
    yield Case(
        name="save.full",
        about="saving a batch whole, beside a plain file write of the same bytes",
        ours=partial(in_folder, partial(extract_into, model, batches)),
        reference=partial(in_folder, partial(write_after, model, batches, size)),
        floor=floor,
        calls=size.batches,
        loops=1,
        target=1.2,
        most_rounds=31,
    )


def full(size: Size) -> Iterator[Case]:
    """Every block whole, to disk, beside the larger of the forwards alone and the plain write alone."""
    model, batches = gpt2(size), token_batches(max(1, size.batches // 4))
    yield Case(
        name="extract.full",
        about=f"a batch through {size.blocks} blocks, each whole to the disk, beside the forwards or the write alone",
        ours=partial(in_folder, partial(extract_into, model, batches)),
        reference=partial(ready, partial(forward_alone, model, batches, size.device)),
        second_reference=plain_write(_activation_bytes(size, len(batches))),
        calls=len(batches),
        loops=1,
        target=None if size.has_accelerator else 1.15,
        most_rounds=15,
    )


def resuming(size: Size) -> Iterator[Case]:
    """A complete run that is called again: what is stored is neither loaded nor computed, but for one batch."""
    rows = Rows(10 * size.batches)
    made = Made(rows)
    listed = [{"input": row["input"][None], "id": [row["id"]]} for row in map(rows.__getitem__, range(len(rows)))]
    for name, batches in (("loader", DataLoader(rows, batch_size=1)), ("list", listed)):
        yield Case(
            name=f"resume.{name}",
            about=f"a unit of {len(rows)} of a complete run that is called again, beside opening its store",
            ours=partial(made.ready, partial(extract_rows, batches)),
            reference=partial(made.ready, open_store),
            calls=len(rows),
            loops=1,
            most_rounds=7,
        )


def copying(size: Size) -> Iterator[Case]:
    """The pooled results of a step to the host, beside one plain copy of as many bytes into pinned memory."""
    if not size.has_accelerator:
        raise UnavailableError("needs an accelerator")
    results = {str(index): torch.randn(4, 256, device=size.device) for index in range(2 * size.blocks)}
    whole = {str(index): torch.randn(*_SHAPE, device=size.device) for index in range(size.blocks)}
    for name, tensors in (("pooled", results), ("full", whole)):
        yield Case(
            name=f"copy.{name}",
            about=f"{len(tensors)} results to the host, beside one plain copy of their bytes into pinned memory",
            ours=partial(ready, partial(to_host, Transfer(), tensors)),
            reference=partial(prepared, partial(plain_copy, sum(one.nbytes for one in tensors.values()), size.device)),
            calls=1,
            loops=20 * size.loops,  # some tens of microseconds each
        )


EXTRACTION: list[Group] = [
    ("extract", pooled),
    ("save", saving),
    ("extract", full),
    ("resume", resuming),
    ("copy", copying),
]


# -- models and systems -----------------------------------------------------------------------------------------------


class Handing(nn.Module):
    """Blocks that hand on what they are given, as the activations of a transformer would come."""

    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.h = nn.ModuleList(nn.Identity() for _ in range(blocks))

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:  # noqa: ARG002 - see below
        """What it is given, through all blocks; the mask is for reducers alone."""
        for block in self.h:
            input_ids = block(input_ids)
        return input_ids


def activation_batches(size: Size) -> list[dict[str, Tensor]]:
    """What a transformer's blocks would return, and a number for each row; all batches share their memory."""
    values = torch.randn(*_SHAPE, device=size.device)
    return [{"input_ids": values, "id": torch.arange(4) + 4 * number} for number in range(size.batches)]


class Rows(Dataset[Any]):
    """Rows of a few numbers, with ids."""

    def __init__(self, rows: int) -> None:
        self._values = torch.randn(rows, 8, generator=torch.Generator().manual_seed(0))

    def __len__(self) -> int:
        return len(self._values)

    def __getitem__(self, row: int) -> dict[str, Any]:
        return {"input": self._values[row], "id": str(row)}


def extract_rows(batches: Any, out: Path) -> None:
    """A run with a unit for each row, or what is left of it."""
    torch.manual_seed(0)
    extract(nn.Sequential(nn.Linear(8, 8)), batches, "0", out=out, ids="id", rows_per_unit=1, progress=False)


class Made:
    """The store of such a run, which is made when it is first needed."""

    def __init__(self, rows: Rows) -> None:
        self._rows = rows
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    @contextmanager
    def ready(self, act: Callable[[Path], object]) -> Iterator[Run]:
        """Something that is done with the store."""
        if self._folder is None:
            self._folder = tempfile.TemporaryDirectory()
            extract_rows(DataLoader(self._rows, batch_size=1), Path(self._folder.name, "store"))
        yield partial(act, Path(self._folder.name, "store"))


def extract_into(
    model: nn.Module, batches: Sequence[Any], folder: Path, reduce: Any = "full", layers: str = BLOCKS
) -> None:
    """The whole way."""
    extract(model, batches, layers, reduce=reduce, out=folder / "store", ids="id", progress=False)


def forward_alone(model: nn.Module, batches: Sequence[Any], device: torch.device) -> None:
    """The loop that a user would write who wants nothing but the forwards."""
    with torch.inference_mode():
        for batch in batches:
            model(input_ids=batch["input_ids"].to(device))


def save_like_the_original(model: Any, batches: Sequence[Any], folder: Path) -> None:
    """Whole activations to numpy in the hook, reduced there, one compressed file for each layer and batch."""
    store: dict[str, Any] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            store[name] = first_tensor(output).detach().cpu().numpy()

        return hook

    handles = [block.register_forward_hook(keep(f"h.{index}")) for index, block in enumerate(model.h)]
    with torch.inference_mode():
        for number, batch in enumerate(batches):
            model(input_ids=batch["input_ids"])
            for name, values in store.items():
                ids = batch["id"].numpy()
                np.savez_compressed(folder / f"{name}_{number}", mean=values.mean(1), last=values[:, -1], id=ids)
    for handle in handles:
        handle.remove()


def write_after(model: nn.Module, batches: Sequence[Any], size: Size, folder: Path) -> None:
    """The forwards, then as many bytes as their activations have, plainly."""
    forward_alone(model, batches, size.device)
    write_plainly(_plain_bytes(_activation_bytes(size, len(batches))), folder)


def plain_write(nbytes: int) -> System:
    """As many bytes, plainly, in new files."""
    return partial(in_folder, partial(write_plainly, _plain_bytes(nbytes)))


def _plain_bytes(nbytes: int) -> list[Tensor]:
    return [torch.ones(MIB // 4)] * max(1, nbytes // MIB)


def _activation_bytes(size: Size, batches: int) -> int:
    return batches * size.blocks * torch.Size(_SHAPE).numel() * 4


def to_host(transfer: Transfer, tensors: dict[str, Tensor]) -> None:
    """As a step's results travel."""
    arrival = Arrival()
    transfer.to_host(tensors, arrival)
    arrival.wait()


def plain_copy(nbytes: int, device: torch.device, times: int = 1) -> Run:
    """Copies of as many bytes into memory that is pinned once, where there is an accelerator; waited for at the end."""
    source = torch.empty(nbytes, dtype=torch.uint8, device=device)
    host = torch.empty(nbytes, dtype=torch.uint8, pin_memory=device.type != "cpu")

    def run() -> None:
        for _ in range(times):
            host.copy_(source, non_blocking=True)
        if device.type != "cpu":
            torch.accelerator.current_stream(device).synchronize()

    return run
