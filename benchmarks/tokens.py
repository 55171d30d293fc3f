"""What batches of tokens in random order cost, beside reading the same bytes in order, and how well they are mixed."""

from __future__ import annotations

import atexit
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from functools import cache, partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from activation_extractor import SafetensorsSink, Store, open_store
from activation_extractor.sinks import Ragged, Step
from benchmarks.measure import Case, Group, Run, require
from benchmarks.sizes import Size
from benchmarks.storage import MIB, drop_cache, read_file
from benchmarks.systems import prepared

WIDTH, ITEM_BYTES = 768, 2  # of bfloat16
TOKENS_PER_MIB = 770  # a little more than 1 MiB
BATCH = 4096
BUFFER_MIB = 256
MEMORY_MIB = BUFFER_MIB + 64
_UNCACHED_BATCHES = 24
_DOCUMENTS = (100, 295)  # the lengths of documents, from and below


def tokens(size: Size) -> Iterator[Case]:
    """An epoch of batches of tokens in random order; the same bytes read in order, and other ways to mix them."""
    case = partial(Case, loops=1, most_rounds=11)
    yield case(
        name="tokens.shuffled",
        about="1 MiB of tokens in random batches, beside reading them in order into memory, store.flat()",
        ours=partial(prepared, lambda: partial(exhaust, epoch(size))),
        reference=partial(prepared, lambda: lambda: documents(size)["layer"].flat()),
        calls=size.cold_megabytes,
        target=4.0,
    )
    yield case(
        name="tokens.cold",
        about="the same from the disk, beside reading the files as they are",
        ours=partial(prepared, lambda: partial(cold, documents(size), partial(exhaust, epoch(size)))),
        reference=partial(prepared, lambda: partial(cold, documents(size), partial(read_files, documents(size)))),
        calls=size.cold_megabytes,
        target=4.0,
    )
    yield case(
        name="tokens.random_rows",
        about="the first batches of a store that no memory holds, beside single tokens out of mapped files",
        ours=partial(prepared, lambda: partial(uncached, documents(size), epoch(size))),
        reference=partial(prepared, lambda: partial(uncached, documents(size), single_tokens(size))),
        calls=1,
    )
    yield case(
        name="tokens.ordered",
        about="batches in the order of the store, beside the same pieces of the column",
        ours=partial(prepared, lambda: partial(exhaust, epoch(size, shuffle=False))),
        reference=partial(prepared, lambda: partial(exhaust, pieces(size))),
        calls=size.cold_megabytes,
    )
    yield case(
        name="tokens.statistics",
        about="batches with statistics, beside the same batches without",
        ours=partial(prepared, lambda: partial(exhaust, epoch(size, statistics=True))),
        reference=partial(prepared, lambda: partial(exhaust, epoch(size))),
        calls=size.cold_megabytes,
    )


def sae_lens(size: Size) -> Iterator[Case]:
    """The same beside what SAELens does with activations."""
    require("sae_lens")
    yield Case(
        name="tokens.sae_lens",
        about="batches of tokens, beside the buffer of SAELens, filled with the column's pieces in order",
        ours=partial(prepared, lambda: partial(exhaust, epoch(size))),
        reference=partial(prepared, lambda: partial(exhaust, mixing_buffer(size))),
        calls=size.cold_megabytes,
        loops=1,
        most_rounds=11,
    )


TOKENS: list[Group] = [("tokens", tokens), ("tokens", sae_lens)]


# -- counted ----------------------------------------------------------------------------------------------------------


def mixing(size: Size) -> float:
    """How many times fewer documents a batch has tokens of than one of tokens drawn from the whole store."""
    found = documents(size)["layer"].lengths().double()
    ideal = float((1 - (1 - found / found.sum()) ** batch_size(size)).sum())
    counts = [len(set(rows.tolist())) for _, rows in epoch(size, rows=True)()]
    return ideal * len(counts) / sum(counts)


def memory(size: Size) -> float:
    """MiB of memory at the peak of two epochs, above what the process had with the store open."""
    command = [sys.executable, "-m", "benchmarks.tokens", str(documents(size).path), str(batch_size(size))]
    root = Path(__file__).parents[1]
    return float(subprocess.run(command, check=True, capture_output=True, text=True, cwd=root).stdout)


def read_by_resumed(size: Size) -> float:
    """Bytes that are read of the last tenth of an epoch by who goes on there, for each byte that it holds."""
    store = documents(size)
    batches = store.tokens("layer", batch_size=batch_size(size), epochs=1, buffer_bytes=BUFFER_MIB * MIB)
    handed_out = batches.batches_per_epoch * 9 // 10
    batches.load_state_dict({**batches.state_dict(), "batches": handed_out})
    before = _read_characters()
    left: int = sum(batch.nbytes for batch in batches)
    return (_read_characters() - before) / left


# -- systems ----------------------------------------------------------------------------------------------------------


def exhaust(make: Callable[[], Iterable[Any]]) -> None:
    """Go through all batches, and do nothing with them."""
    for _ in make():
        pass


def batch_size(size: Size) -> int:
    """Tokens of a batch; fewer where the store has but a few."""
    return min(BATCH, size.cold_megabytes * TOKENS_PER_MIB // 10)


def epoch(size: Size, **options: Any) -> Callable[[], Iterable[Tensor]]:
    """Batches of tokens from the store."""
    options = {"batch_size": batch_size(size), "epochs": 1, "buffer_bytes": BUFFER_MIB * MIB, **options}
    return lambda: documents(size).tokens("layer", **options)


def pieces(size: Size) -> Callable[[], Iterable[Tensor]]:
    """The column in order, in pieces as large as the batches."""
    return lambda: documents(size)["layer"].blocks(batch_size(size) * WIDTH * ITEM_BYTES, flat=True)


def single_tokens(size: Size) -> Callable[[], Iterator[Tensor]]:
    """Batches of tokens drawn from the whole store, by hand, out of mapped files."""

    def batches() -> Iterator[Tensor]:
        mapped = documents(size)["layer"].mapped()
        starts = torch.tensor([0, *map(len, mapped)]).cumsum(0)
        for places in torch.split(torch.randperm(int(starts[-1])), batch_size(size)):
            batch = torch.empty(len(places), WIDTH, dtype=torch.bfloat16)
            files = torch.searchsorted(starts, places, right=True) - 1
            for number in sorted(set(files.tolist())):
                here = files == number
                batch[here] = mapped[number].index_select(0, places[here] - starts[number])
            yield batch

    return batches


def mixing_buffer(size: Size) -> Callable[[], Iterator[Tensor]]:
    """What SAELens does with activations: half of a buffer is handed out and filled anew."""
    from sae_lens.training.mixing_buffer import mixing_buffer

    buffered = min(BUFFER_MIB * MIB // (WIDTH * ITEM_BYTES), size.cold_megabytes * TOKENS_PER_MIB // 2)
    return lambda: mixing_buffer(buffered, batch_size(size), iter(pieces(size)()))


def read_files(store: Store) -> None:
    """The shards as they are, in pieces of 1 MiB."""
    for shard in store.shards:
        read_file(shard.path)


def cold(store: Store, run: Run) -> None:
    """A run that finds nothing of a store in the page cache."""
    for shard in store.shards:
        drop_cache(shard.path)
    run()


def uncached(store: Store, make: Callable[[], Iterable[Any]]) -> None:
    """The first batches, before each of which the page cache is emptied of the store."""
    for _ in islice(make(), _UNCACHED_BATCHES):
        for shard in store.shards:
            drop_cache(shard.path)


@cache
def documents(size: Size) -> Store:
    """A store of documents of different lengths, in shards of some 64 MiB."""
    folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    generator, count = torch.Generator().manual_seed(0), size.cold_megabytes * TOKENS_PER_MIB
    sink = SafetensorsSink(folder, rows_per_unit=200)
    step = 0
    while count > 0:
        lengths = torch.randint(*_DOCUMENTS, (20,), generator=generator)
        values = torch.randn(int(lengths.sum()), WIDTH).bfloat16()
        sink.write(Step(step, 20, {("layer", "full"): Ragged(values, lengths)}))
        step, count = step + 1, count - len(values)
    sink.close()
    return open_store(folder)


def _read_characters() -> int:
    return int(_line("/proc/self/io", "rchar"))


def _line(path: str, name: str) -> str:
    return next(line for line in Path(path).read_text().splitlines() if line.startswith(name)).split()[1]


if __name__ == "__main__":
    torch.set_num_threads(1)
    column = (store := open_store(sys.argv[1]))["layer"]
    next(column.blocks(flat=True))
    before = int(_line("/proc/self/status", "VmHWM"))
    for _ in store.tokens("layer", batch_size=int(sys.argv[2]), epochs=2, buffer_bytes=BUFFER_MIB * MIB):
        pass
    print((int(_line("/proc/self/status", "VmHWM")) - before) / 1024)
