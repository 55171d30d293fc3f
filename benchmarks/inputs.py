"""Inputs of the command line: rows looked through and read, beside the libraries that read the same files alone."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from activation_extractor.cli.inputs import open_source
from benchmarks.measure import Case, Group, Run, require
from benchmarks.sizes import Size

_LETTERS = "ACDEFGHIKLMNPQRSTVWY"
_NAMES = ("id", "text", "label", "score")
_ROUNDS = 9
_COLUMNS: dict[str, Any] = {"id_column": "id", "keep": ["label"]}


def inputs(size: Size) -> Iterator[Case]:
    """Each kind of file, surveyed and gone through once, as a run does; and read by a library alone."""
    rows = size.input_rows // 10
    for suffix, (package, about, read_alone) in _ALONE.items():
        require(package)
        yield Case(
            f"input.{suffix}",
            f"a row of a .{suffix} file of {rows:,}, surveyed and read, beside {about}",
            partial(_reading, suffix, rows, _read),
            partial(_reading, suffix, rows, read_alone),
            calls=rows,
            loops=1,
            most_rounds=_ROUNDS,
        )


INPUTS: list[Group] = [("input", inputs)]


def held_memory(size: Size, suffix: str) -> float:
    """MiB of memory at the peak of a process that surveys and reads a file."""
    require("pyarrow")
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "benchmarks.inputs", write(Path(folder), suffix, size.input_rows)]
        done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    return float(done.stdout)


def write(folder: Path, suffix: str, rows: int) -> str:
    """Write a file with rows of some 180 bytes: an id, 160 letters, a number and a fraction."""
    draw, path = random.Random(0), folder / f"x.{suffix}"
    records = ((f"r{row}", "".join(draw.choices(_LETTERS, k=160)), row % 7, row / 8) for row in range(rows))
    if suffix == "parquet":
        _write_parquet(path, records)
        return str(path)
    lines: Mapping[str, Callable[[Any], str]] = {
        "csv": lambda record: ",".join(map(str, record)),
        "fa": lambda record: f">{record[0]} {record[2]}\n{record[1][:80]}\n{record[1][80:]}",
        "jsonl": lambda record: json.dumps(dict(zip(_NAMES, record, strict=True))),
    }
    with path.open("w") as file:
        file.writelines([f"{','.join(_NAMES)}\n"] if suffix == "csv" else [])
        file.writelines(f"{lines[suffix](record)}\n" for record in records)
    return str(path)


def _write_parquet(path: Path, records: Iterator[Any]) -> None:
    import pyarrow as pa
    from pyarrow.parquet import ParquetWriter

    kinds = (pa.string(), pa.string(), pa.int64(), pa.float64())
    schema = pa.schema(list(zip(_NAMES, kinds, strict=True)))
    with ParquetWriter(path, schema) as writer:
        while piece := list(islice(records, 100_000)):
            columns = zip(zip(*piece, strict=True), kinds, strict=True)
            writer.write_table(pa.table([pa.array(cells, kind) for cells, kind in columns], schema))


@contextmanager
def _reading(suffix: str, rows: int, read: Callable[[str], object]) -> Iterator[Run]:
    """Reading a file of its own."""
    with tempfile.TemporaryDirectory() as folder:
        yield partial(read, write(Path(folder), suffix, rows))


def _read(path: str) -> int:
    return sum(1 for _ in open_source(path, **({} if path.endswith(".fa") else _COLUMNS)))


def _csv_alone(path: str) -> object:
    import pyarrow as pa
    from pyarrow import csv

    types = csv.ConvertOptions(column_types=dict.fromkeys(_NAMES, pa.string()))
    return sum(batch.num_rows for batch in csv.open_csv(path, convert_options=types))


def _json_alone(path: str) -> object:
    with open(path, encoding="utf-8") as lines:
        return sum(1 for _ in map(json.loads, lines))


def _fasta_alone(path: str) -> object:
    import dnaio

    with dnaio.open(path) as records:
        return sum(1 for _ in records)


def _parquet_alone(path: str) -> object:
    from pyarrow.parquet import ParquetFile

    return sum(batch.num_rows for batch in ParquetFile(path).iter_batches(columns=list(_NAMES[:3])))


_ALONE: dict[str, tuple[str, str, Callable[[str], object]]] = {
    "csv": ("pyarrow", "pyarrow alone, which makes no Python text of it", _csv_alone),
    "jsonl": ("json", "json.loads of each line", _json_alone),
    "fa": ("dnaio", "dnaio alone", _fasta_alone),
    "parquet": ("pyarrow", "pyarrow alone, which makes no Python text of it", _parquet_alone),
}


if __name__ == "__main__":
    _read(sys.argv[1])
    status = Path("/proc/self/status").read_text().splitlines()
    print(int(next(line for line in status if line.startswith("VmHWM")).split()[1]) / 1024)
