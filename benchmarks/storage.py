"""What the store costs: writing, opening and reading, beside the plainest way to do each."""

from __future__ import annotations

import atexit
import json
import os
import random
import shutil
import tempfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from activation_extractor import Column, SafetensorsSink, Store, open_store
from activation_extractor.sinks import Step
from benchmarks.measure import Case, Group, Run
from benchmarks.sizes import Size
from benchmarks.systems import prepared

MIB = 2**20
UNIT_BYTES = 64 * MIB
ROW_BYTES = 2048
WIDTH = ROW_BYTES // 4
ROWS_PER_MIB = MIB // ROW_BYTES


def writing(size: Size) -> Iterator[Case]:
    """Full activations into a store; the same bytes with ``os.write``, a file for each unit, synced likewise."""
    steps = [torch.randn(ROWS_PER_MIB, WIDTH) for _ in range(size.megabytes)]
    plain = partial(in_folder, partial(write_plainly, steps))
    yield Case(
        name="store_write.full",
        about="1 MiB of activations to the disk, checksum included",
        ours=partial(in_folder, partial(write_store, steps)),
        reference=plain,
        calls=size.megabytes,
        loops=1,
        target=1 / 0.85,
        most_rounds=31,
    )
    yield Case(
        name="store_write.checksum_alone",
        about="what a checksum adds to the plain write, in one thread",
        ours=partial(in_folder, partial(write_plainly, steps, has_checksum=True)),
        reference=plain,
        calls=size.megabytes,
        loops=1,
        most_rounds=31,
    )


def opening(size: Size) -> Iterator[Case]:
    """Opening a store of many shards."""
    yield Case(
        name=f"store_open.{size.shards}_shards",
        about="opening a store, beside reading one JSON file that lists its shards",
        ours=partial(prepared, lambda: partial(open_store, many_shards(size.shards).path)),
        reference=partial(prepared, lambda: partial(read_json, many_shards(size.shards).path / "listed.json")),
        calls=1,
        loops=size.loops,
        target=5.0,
    )


def columns(size: Size) -> Iterator[Case]:
    """A column of a store of many shards."""
    shards = size.shards
    yield Case(
        name=f"store_column.{shards}_shards",
        about="a column of a store, beside adding up the rows of its shards",
        ours=partial(prepared, lambda: partial(many_shards(shards).__getitem__, "layer")),
        reference=partial(prepared, lambda: partial(np.cumsum, np.ones(shards, dtype=np.int64))),
        calls=1,
        loops=size.loops * 20,
    )


def rows_of_many(size: Size) -> Iterator[Case]:
    """Rows of a store of many shards in random order."""
    shards = size.shards
    places = random.Random(0).choices(range(shards), k=shards)
    yield Case(
        name=f"store_read.row_of_{shards}_shards",
        about="a random row of a store of many shards, beside opening a file for each and reading it",
        ours=partial(prepared, lambda: partial(read_rows, many_shards(shards)["layer"], places)),
        reference=partial(prepared, lambda: partial(read_of_files, files_of(many_shards(shards)), places)),
        calls=len(places),
        loops=size.loops,
        target=5.0,
    )


def ids(size: Size) -> Iterator[Case]:
    """The ids of all rows of a store of many shards."""
    shards = size.shards
    yield Case(
        name=f"store_ids.{shards}_shards",
        about="the ids in a shard, beside reading its file",
        ours=partial(prepared, lambda: partial(read_ids, many_shards(shards))),
        reference=partial(prepared, lambda: partial(read_whole, files_of(many_shards(shards)))),
        calls=shards,
        loops=size.loops,
        target=8.0,
    )


def reading(size: Size) -> Iterator[Case]:
    """A random row of a store; all of its rows one behind the other."""
    rows = size.megabytes * ROWS_PER_MIB
    places = random.Random(0).choices(range(rows), k=200)
    yield Case(
        name="store_read.warm_row",
        about="a random row in the page cache, beside np.array(memmap[i])",
        ours=partial(prepared, lambda: partial(read_rows, one_shard(rows)["layer"], places)),
        reference=partial(prepared, lambda: partial(read_arrays, mapped(one_shard(rows)), places)),
        calls=len(places),
        loops=size.loops,
        target=3.0,
    )
    spans = [slice(start, start + ROWS_PER_MIB) for start in range(0, rows, ROWS_PER_MIB)]
    yield Case(
        name="store_read.sequential",
        about="1 MiB of consecutive rows in the page cache, beside reading the file as it is",
        ours=partial(prepared, lambda: partial(read_rows, one_shard(rows)["layer"], spans)),
        reference=partial(prepared, lambda: partial(read_file, shard_of(one_shard(rows)))),
        calls=size.megabytes,
        loops=1,
        target=1.1,
    )


def cold_reading(size: Size) -> Iterator[Case]:
    """All rows of a store of which nothing is in the page cache: random rows may not be had at their cost."""
    rows = size.megabytes * ROWS_PER_MIB
    spans = [slice(start, start + ROWS_PER_MIB) for start in range(0, rows, ROWS_PER_MIB)]
    yield Case(
        name="store_read.cold_sequential",
        about="1 MiB of consecutive rows from the disk, beside reading the file as it is",
        ours=partial(
            prepared, lambda: partial(cold, one_shard(rows), partial(read_rows, one_shard(rows)["layer"], spans))
        ),
        reference=partial(
            prepared, lambda: partial(cold, one_shard(rows), partial(read_file, shard_of(one_shard(rows))))
        ),
        calls=size.megabytes,
        loops=1,
        target=1.1,
        most_rounds=31,
    )


STORAGE: list[Group] = [
    ("store_write", writing),
    ("store_open", opening),
    ("store_column", columns),
    ("store_ids", ids),
    ("store_read", reading),
    ("store_read", rows_of_many),
    ("store_read", cold_reading),
]


# -- systems ----------------------------------------------------------------------------------------------------------


@contextmanager
def in_folder(run: Callable[[Path], object]) -> Iterator[Run]:
    """A run that is given a new folder each time; they are removed afterwards."""
    with tempfile.TemporaryDirectory() as folder:
        yield lambda: run(Path(tempfile.mkdtemp(dir=folder)))


def write_store(steps: Sequence[Tensor], folder: Path) -> None:
    """Through the sink, as a with-block would."""
    sink = SafetensorsSink(folder / "store", unit_bytes=UNIT_BYTES, rows_per_unit=UNIT_BYTES // ROW_BYTES)
    for index, values in enumerate(steps):
        sink.write(Step(index, len(values), {("layer", "full"): values}))
    sink.close()


def write_plainly(steps: Sequence[Tensor], folder: Path, *, has_checksum: bool = False) -> None:
    """With ``os.write``: a file for each unit; file and folder are synced."""
    per_file = UNIT_BYTES // MIB
    for start in range(0, len(steps), per_file):
        descriptor = os.open(folder / f"{start}", os.O_WRONLY | os.O_CREAT | os.O_EXCL)
        crc = 0
        for values in steps[start : start + per_file]:
            data = memoryview(values.view(torch.uint8).numpy())  # type: ignore[arg-type]
            crc = zlib.crc32(data, crc) if has_checksum else crc
            os.write(descriptor, data)
        os.fsync(descriptor)
        os.close(descriptor)
        sync(folder)


def sync(folder: Path) -> None:
    """Bring a folder's names to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def read_json(path: Path) -> Any:
    """One file that says of each shard what a reader has to know."""
    return json.loads(path.read_bytes())


def read_rows(column: Column, places: Sequence[Any]) -> None:
    """From the store."""
    for place in places:
        column[place]


def read_arrays(values: np.ndarray[Any, Any], places: Sequence[Any]) -> None:
    """From a memory map, as copies."""
    for place in places:
        np.array(values[place])


def read_file(path: Path) -> None:
    """A file in pieces of 1 MiB."""
    with open(path, "rb", buffering=0) as file:
        while len(np.fromfile(file, np.uint8, MIB)):
            pass


def read_ids(store: Store) -> None:
    """The ids of all rows; `Store.ids` would remember them."""
    for _ in store.iter_ids():
        pass


def files_of(store: Store) -> list[str]:
    """The path of each shard."""
    return [str(shard.path) for shard in store.shards]


def read_of_files(files: Sequence[str], places: Sequence[int]) -> None:
    """A row's bytes of a file for each place."""
    for place in places:
        descriptor = os.open(files[place], os.O_RDONLY)
        os.pread(descriptor, ROW_BYTES, 512)
        os.close(descriptor)


def read_whole(files: Sequence[str]) -> None:
    """Each file as it is."""
    for file in files:
        with open(file, "rb", buffering=0) as opened:
            opened.read()


def cold(store: Store, run: Run) -> None:
    """A run that finds nothing of a store in the page cache."""
    drop_cache(shard_of(store))
    run()


def drop_cache(path: Path) -> None:
    """Take a file out of the page cache; it must have been synced."""
    descriptor = os.open(path, os.O_RDONLY)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)


# -- stores -----------------------------------------------------------------------------------------------------------


@cache
def many_shards(shards: int) -> Store:
    """A store of this many shards of one row with an id, and beside it a JSON file that lists them."""
    store = _written(rows=shards, rows_per_unit=1, has_ids=True)
    lines = [line for path in (store.path / "journal").iterdir() for line in path.read_text().splitlines()]
    (store.path / "listed.json").write_text(json.dumps([json.loads(line) for line in lines]))
    return open_store(store.path)


@cache
def one_shard(rows: int) -> Store:
    """A store of one shard."""
    return _written(rows=rows, rows_per_unit=rows)


@cache
def many_rows(rows: int, rows_per_unit: int) -> Store:
    """A store of shards of so many rows."""
    return _written(rows=rows, rows_per_unit=rows_per_unit)


def mapped(store: Store) -> np.ndarray[Any, Any]:
    """The memory map that the rows of a store of one shard would be read from by hand."""
    path = shard_of(store)
    extent = store._reader.shard(str(path)).extents["layer:full"]
    return np.memmap(path, dtype=np.float32, mode="r", offset=extent.start, shape=extent.shape)


def shard_of(store: Store) -> Path:
    """The only shard of a store."""
    (path,) = (store.path / "shards").iterdir()
    return path


def _written(rows: int, rows_per_unit: int, *, has_ids: bool = False) -> Store:
    folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    sink = SafetensorsSink(folder, rows_per_unit=rows_per_unit)
    step = min(rows_per_unit, ROWS_PER_MIB)
    for index, start in enumerate(range(0, rows, step)):
        count = min(step, rows - start)
        ids = [f"row/{row}" for row in range(start, start + count)] if has_ids else None
        sink.write(Step(index, count, {("layer", "full"): torch.randn(count, WIDTH)}, ids))
    sink.close()
    return open_store(folder)
