"""What reading a store in a bucket costs at 20 ms a request, beside getting the same objects by obstore."""

from __future__ import annotations

import atexit
import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any

from activation_extractor import Store, open_store
from activation_extractor._storage import bucket_of
from benchmarks.measure import Case, Group, Run, require
from benchmarks.sizes import Size
from benchmarks.storage import ROW_BYTES, ROWS_PER_MIB, UNIT_BYTES, many_rows, many_shards
from benchmarks.tokens import batch_size, documents

LATENCY_SECONDS = 0.02
ROWS = 1000


def reading(size: Size) -> Iterator[Case]:
    """Columns, rows and tokens out of a bucket."""
    require("obstore")
    dense, ragged = partial(remotely, partial(rows, size)), partial(remotely, partial(documents, size))
    shards = partial(remotely, partial(many_shards, size.shards))
    case = partial(Case, loops=1, most_rounds=15)
    for name, about, there in (("column", "a column", dense), ("ragged_column", "a ragged column", ragged)):
        yield case(
            name=f"bucket.{name}",
            about=f"1 MiB of {about} in blocks, beside `obstore.get` of the same objects, one after the other",
            ours=partial(there, blocks),
            reference=partial(there, get),
            calls=size.cold_megabytes,
            target=1 / 0.8,
        )
    yield case(
        name="bucket.column_beside_stream",
        about="the same beside `obstore.get(...).stream()`, which keeps nothing",
        ours=partial(dense, blocks),
        reference=partial(dense, stream),
        calls=size.cold_megabytes,
        target=1 / 0.8,
    )
    yield case(
        name="bucket.tokens",
        about="1 MiB of tokens in random batches, beside the pieces of the column in order",
        ours=partial(ragged, partial(shuffled, size)),
        reference=partial(ragged, blocks),
        calls=size.cold_megabytes,
    )
    yield case(
        name="bucket.random_rows",
        about=f"{ROWS:,} random rows of 2 KiB at once, beside getting all objects",
        ours=partial(dense, random_rows),
        reference=partial(dense, get),
        calls=1,
    )
    yield case(
        name=f"bucket.open_{size.shards}_shards",
        about="opening a store in a bucket, beside getting one object",
        ours=partial(shards, lambda store: open_store(store.path)),
        reference=partial(shards, one_request),
        calls=1,
    )


BUCKETS: list[Group] = [("bucket", reading)]


# -- systems ----------------------------------------------------------------------------------------------------------


@contextmanager
def remotely(make: Callable[[], Store], run: Callable[[Store], object]) -> Iterator[Run]:
    """A run with a store in a bucket that is a copy of one on the disk, whose headers were read."""
    port = served(make().path)
    values = {"ENDPOINT_URL": f"http://127.0.0.1:{port}", "ALLOW_HTTP": "true", "REGION": "us-east-1"}
    values |= {"ACCESS_KEY_ID": "x", "SECRET_ACCESS_KEY": "y"}
    with environment({f"AWS_{name}": value for name, value in values.items()}):
        yield partial(run, opened(f"s3://benchmark-{os.getpid()}-{port}/store"))


def blocks(store: Store) -> None:
    """The column piece by piece."""
    for _ in store["layer"].blocks():
        pass


def get(store: Store) -> None:
    """The shards one after the other, each whole in memory."""
    import obstore

    for bucket, name in objects(store):
        obstore.get(bucket, name).bytes()


def stream(store: Store) -> None:
    """The same in pieces, as they arrive."""
    import obstore

    for bucket, name in objects(store):
        for _ in obstore.get(bucket, name).stream():
            pass


def shuffled(size: Size, store: Store) -> None:
    """An epoch of tokens in random order."""
    for _ in store.tokens("layer", batch_size=batch_size(size), epochs=1):
        pass


def random_rows(store: Store) -> None:
    """Rows here and there, all at once."""
    store["layer"][random.Random(0).choices(range(store.rows), k=ROWS)]


def one_request(store: Store) -> None:
    """The manifest alone."""
    import obstore

    obstore.get(bucket_of(str(store.path).removesuffix("/store")), "store/manifest.json").bytes()


def objects(store: Store) -> Iterator[tuple[Any, str]]:
    """The bucket and the name of each shard."""
    bucket = bucket_of(str(store.path).removesuffix("/store"))
    return ((bucket, f"store/shards/{shard.path.name}") for shard in store.shards)


def rows(size: Size) -> Store:
    """A store of rows of 2 KiB in shards of 64 MiB."""
    return many_rows(size.cold_megabytes * ROWS_PER_MIB, UNIT_BYTES // ROW_BYTES)


@cache
def opened(url: str) -> Store:
    """A store in a bucket, of whose column the headers were read."""
    store = open_store(url)
    for _ in store["layer"].blocks(flat=True):
        pass
    return store


@cache
def served(folder: Path) -> int:
    """The port at which a folder is served as a bucket's ``store``, by a process that ends with this one."""
    command = [sys.executable, "-m", "benchmarks.bucket_server", str(folder), str(LATENCY_SECONDS)]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[1])
    atexit.register(server.kill)
    assert server.stdout is not None
    return int(server.stdout.readline())


@contextmanager
def environment(values: Mapping[str, str]) -> Iterator[None]:
    """Variables of the environment, for as long as the block runs."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
