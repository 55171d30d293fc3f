"""What a store takes for each unit, row and column: the coefficients of scale.md.

``python -m benchmarks.scale`` measures them in a few minutes and prints them; ``--part sizes`` one part of them, and
``--small`` at sizes that say nothing, for the tests. Sizes and counts of calls are exact and the same everywhere; times
and memory are those of the machine, one process, one thread.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import resource
import struct
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from activation_extractor import SafetensorsSink, capture, extract, open_store
from activation_extractor._format._seen_ids import SeenIds
from activation_extractor.runs._items import RowItems

_CALLS = ("open", "link", "unlink", "mkdir", "scandir", "listdir", "stat", "lstat", "fsync", "pread", "preadv", "write")
_SIZES = {
    False: {
        "layers": (1, 32),
        "units": (200, 1000),
        "many": 10_000,
        "ids": 10_000_000,
        "files": 300_000,
        "appends": (10_000, 300_000),
        "rows": (100_000, 400_000),
    },
    True: {
        "layers": (1, 2),
        "units": (3, 6),
        "many": 9,
        "ids": 2000,
        "files": 20,
        "appends": (10, 20),
        "rows": (1000, 2000),
    },
}


class Layers(nn.Module):
    """Layers that are called as those of a Llama are, of 8 features."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.model = nn.Module()
        self.model.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(count))

    def forward(self, x: Tensor) -> Tensor:
        """``(batch, seq, 8)`` through all layers."""
        for layer in self.model.layers:  # type: ignore[union-attr]
            x = layer(x)
        return x


def run(folder: Path, layers: int, units: int, *, rows: int = 1, reduce: str = "mean") -> None:
    """A run of `extract` in units of so many rows, with ids of 12 letters."""
    torch.manual_seed(0)
    tokens = torch.ones(rows, 4, 8)
    ids = ([f"row {unit * rows + row:08d}" for row in range(rows)] for unit in range(units))
    data = ({"x": tokens, "id": names} for names in ids)
    options: dict[str, Any] = {"reduce": reduce, "rows_per_unit": rows, "progress": False}
    extract(Layers(layers), data, "model.layers.*", out=folder, ids="id", **options)


def sizes(size: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Bytes: of the manifest, of a shard beside its values, of its line in the journal."""
    found: dict[str, Any] = {}
    for reduce in ("mean", "full"):
        parts: list[tuple[int, int, int]] = []
        for layers in size["layers"]:
            run(folder / f"{reduce}{layers}", layers, 2, rows=100, reduce=reduce)
            parts.append(_parts(folder / f"{reduce}{layers}"))
        few, many = size["layers"]
        found[f"{reduce}: a row, bytes beside its values and the text of its id"] = _beside(folder, many, reduce)
        for name, less, more in zip(("manifest", "header", "journal line"), *parts, strict=True):
            column = (more - less) / (many - few)
            found[f"{reduce}: {name}, bytes"] = {"fixed": round(less - few * column), "a column": round(column, 1)}
    return found


def _beside(folder: Path, layers: int, reduce: str) -> float:
    """Bytes of a shard that each further row takes, which has 8 values a layer and position and an id of 12 letters."""
    nbytes, values = [], layers * 8 * 4 * (4 if reduce == "full" else 1)
    for rows in (1000, 2000):
        out = folder / f"{reduce} of {rows}"
        run(out, layers, 1, rows=rows, reduce=reduce)
        shard = next((out / "shards").iterdir())
        nbytes.append(shard.stat().st_size - values * rows - 12 * rows)
    return (nbytes[1] - nbytes[0]) / 1000


def _parts(store: Path) -> tuple[int, int, int]:
    shard = sorted((store / "shards").iterdir())[0].read_bytes()
    journal = next((store / "journal").iterdir()).read_bytes().splitlines()
    return (store / "manifest.json").stat().st_size, 8 + struct.unpack("<Q", shard[:8])[0], len(journal[0]) + 1


def calls(size: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Calls of the file system for each further unit: writing, resuming, opening, reading."""
    few, many = size["units"]
    stores = {units: folder / f"calls{units}" for units in (few, many)}
    acts: dict[str, Callable[[int], object]] = {
        "writing": lambda units: run(stores[units], 1, units),
        "extract again, all stored": lambda units: run(stores[units], 1, units),
        "open_store": lambda units: open_store(stores[units]),
        "open_store and a whole column": lambda units: open_store(stores[units])["model.layers.0"].numpy(),
        "open_store and all ids": lambda units: open_store(stores[units]).ids,
    }
    found = {}
    for name, act in acts.items():
        counts = []
        for units in (few, many):
            with _counted() as count:
                act(units)
            counts.append(count)
        each = {call: round((counts[1][call] - counts[0][call]) / (many - few), 2) for call in _CALLS}
        found[f"{name}: calls a unit"] = {call: number for call, number in each.items() if number}
    return found


@contextlib.contextmanager
def _counted() -> Iterator[Counter[str]]:
    """Count calls of functions of `os`; that of `open` by whatever opens a file."""
    count: Counter[str] = Counter()
    is_on = True
    sys.addaudithook(lambda event, _: count.update([event]) if is_on and event == "open" else None)  # for ever
    before = {name: getattr(os, name) for name in _CALLS if name != "open"}

    def counting(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *given, **named: (count.update([name]), call(*given, **named))[1]

    for name, call in before.items():
        setattr(os, name, counting(name, call))
    try:
        yield count
    finally:
        for name, call in before.items():
            setattr(os, name, call)
        is_on = False


def units(size: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Time and memory for each further unit, of one row: writing, opening the store, reading a column, verifying."""
    found: dict[str, Any] = {}
    for layers, (few, many) in zip(size["layers"], ((size["units"][1], size["many"]), size["units"]), strict=True):
        stores = {number: folder / f"units{layers}x{number}" for number in (few, many)}
        for number, store in stores.items():
            start, used = time.perf_counter(), time.process_time()
            run(store, layers, number)
            found[f"{layers} columns: writing a tiny unit, ms"] = _ms(time.perf_counter() - start, number)
            found[f"{layers} columns: writing a tiny unit, ms of CPU"] = _ms(time.process_time() - used, number)
        less, more = (_child("opened", str(store)) for store in stores.values())
        for what in more:
            found[f"{layers} columns: {what}"] = round((more[what] - less[what]) / (many - few), 1)
    return found


def _ms(seconds: float, count: int) -> float:
    return round(1e3 * seconds / count, 2)


def opened(store: str) -> dict[str, float]:
    """What opening a store costs this process for all units, in CPU time and memory."""
    memory, times = _resident(), [time.process_time()]
    opened = open_store(store)
    times.append(time.process_time())
    memory = _resident() - memory
    opened["model.layers.0"].numpy()
    times.append(time.process_time())
    opened.verify()
    times.append(time.process_time())
    names = ("opening, us a unit", "reading a column, us a unit", "verify, us a unit")
    each = {name: 1e6 * (end - start) for name, start, end in zip(names, times, times[1:], strict=False)}
    return each | {"opening, bytes of memory a unit": float(memory)}


def ids(size: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Memory and time of the ids that a writer remembers."""
    return _child("remembered", str(size["ids"]))


def remembered(count: str) -> dict[str, float]:
    """What a number of ids costs this process."""
    seen, rows = SeenIds(), int(count)
    memory, start, step = _resident(), time.process_time(), min(1000, rows)
    for at in range(0, rows, step):
        seen.add([f"row {row:08d}" for row in range(at, at + step)])
    took, kept = time.process_time() - start, _resident() - memory
    return {
        f"{rows} ids, bytes an id": round(kept / rows, 1),
        f"{rows} ids, bytes an id at the peak": round((_peak() - memory) / rows, 1),
        f"{rows} ids, us of CPU an id": round(1e6 * took / rows, 2),
    }


def rows(size: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Memory and time of ids that are read from a store."""
    few, many = size["rows"]
    for number in (few, many):
        run(folder / f"rows{number}", 1, number // 1000, rows=1000)
    less, more = (_child("read", str(folder / f"rows{number}")) for number in (few, many))
    return {what: round((more[what] - less[what]) / (many - few), 1) for what in more}


def read(store: str) -> dict[str, float]:
    """What the ids of a store cost this process."""
    opened, memory, start = open_store(store), _resident(), time.process_time()
    names = opened.ids
    listed, first = _resident(), time.process_time()
    opened.rows_of(names[-1:])
    return {
        "store.ids, bytes of memory a row": float(listed - memory),
        "store.ids, us of CPU a row": 1e6 * (first - start),
        "rows_of, further bytes of memory a row": float(_resident() - listed),
        "rows_of, us of CPU a row": 1e6 * (time.process_time() - first),
    }


def appends(size: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Adding one row to a store of with-blocks that holds many."""
    model, found = nn.Sequential(nn.Linear(1, 1)), {}
    for rows in size["appends"]:
        out = folder / f"appends{rows}"
        for first, last in ((0, rows), (rows, rows + 1)):
            start = time.perf_counter()
            with capture(model, "0", sink=SafetensorsSink(out, append=True)) as acts:
                for at in range(first, last, 1000):
                    names = [f"row {row:08d}" for row in range(at, min(at + 1000, last))]
                    with acts.step(ids=names):
                        model(torch.ones(len(names), 1))
        found[f"adding a row to {rows}, ms"] = round(1e3 * (time.perf_counter() - start), 1)
    return found


def files(size: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Many files in one folder: listing them."""
    count, place = size["files"], folder / "files"
    place.mkdir()
    start = time.perf_counter()
    for number in range(count):
        os.close(os.open(place / f"{number:08d}.safetensors", os.O_CREAT | os.O_WRONLY))
    made = time.perf_counter()
    with os.scandir(place) as entries:
        listed = sum(1 for _ in entries)
    took = time.perf_counter() - made
    assert listed == count
    return {
        f"{count} files: listing, us a file": round(1e6 * took / count, 2),
        "making, us a file": _us(made - start, count),
    }


def _us(seconds: float, count: int) -> float:
    return round(1e6 * seconds / count, 1)


def _child(part: str, argument: str) -> dict[str, Any]:
    """What a function of this file returns in a process of its own."""
    program = f"import json; from benchmarks import scale; print(json.dumps(scale.{part}({argument!r})))"
    ended = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    return dict(json.loads(ended.stdout))


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def plan(size: dict[str, Any], folder: Path) -> dict[str, Any]:
    """What a billion rows of 32 layers come to, by the sizes that a small run has; in units of the size given."""
    million, layers = 10**6, 32
    measured = sizes(_SIZES[False], folder)
    found: dict[str, Any] = {}
    for reduce, features, item, positions in (("mean", 384, 4, 1), ("mean", 4096, 2, 1), ("full", 384, 4, 128)):
        row = layers * features * item * positions
        beside = {name: measured[f"{reduce}: {name}, bytes"] for name in ("header", "journal line")}
        each = {name: part["fixed"] + layers * part["a column"] for name, part in beside.items()}
        each["row"] = 12 + measured[f"{reduce}: a row, bytes beside its values and the text of its id"]
        for unit_bytes in (None, 2**30, 2**34):
            items = RowItems(None, None, unit_bytes=unit_bytes)
            items.choose_size(1, row)
            units = -(-1000 * million // (items.size or 1))
            found[f"{reduce}, {features} features of {item} bytes, {positions} positions, unit_bytes={unit_bytes}"] = {
                "TB of values": round(row / 1000, 1),
                "rows a unit": items.size,
                "units": units,
                "GB beside values": round((units * each["header"] + 1000 * million * each["row"]) / 1e9, 1),
                "GB of journal": round(units * each["journal line"] / 1e9, 2),
            }
    return found


PARTS = {
    "sizes": sizes,
    "calls": calls,
    "units": units,
    "ids": ids,
    "rows": rows,
    "appends": appends,
    "files": files,
    "plan": plan,
}


def main(arguments: list[str] | None = None) -> None:
    """Measure the parts that are asked for, and print them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--part", choices=PARTS, action="append")
    parser.add_argument("--small", action="store_true")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    for name in options.part or PARTS:
        with tempfile.TemporaryDirectory() as folder:
            for what, value in PARTS[name](_SIZES[options.small], Path(folder)).items():
                print(f"{name:8} {what}: {value}", flush=True)


if __name__ == "__main__":
    main()
