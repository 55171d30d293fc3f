"""Taking a store elsewhere: one file, or a folder of arrays, that other programs read without this library.

Columns are read and written a block at a time. What is written appears whole or not at all, and never in place of
something else.
"""

from __future__ import annotations

import os
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.lib import format as npy
from torch import Tensor

from activation_extractor._files import draft, publish, sync, sync_folder
from activation_extractor._format._entry_names import IDS, OFFSETS, ROWS, entry_name, escape, keep_entry
from activation_extractor._format._headers import bytes_of
from activation_extractor._format._safetensors import arranged, check_dtype
from activation_extractor._format._stored_rows import as_bytes, offsets
from activation_extractor._tensors import to_numpy
from activation_extractor.errors import ArgumentError, StoreError
from activation_extractor.store._columns import BLOCK_BYTES, Column
from activation_extractor.store._parquet import ID, write_parquet
from activation_extractor.store._store import Store

_Array = np.ndarray[Any, Any]
_Source = Any  # a column, an index tensor, or a sequence of text


@dataclass(frozen=True)
class Export:
    """The file or folder that was written, its size, and a line of Python that opens it."""

    path: Path
    nbytes: int
    opened_with: str


def export(store: Store, out: str | os.PathLike[str], to: str) -> Export:
    """Write all of a store to a new file, or folder, of a format that other programs read.

    ==============  ==================================================================================================
    ``parquet``     A file of one table, for pandas, polars, DuckDB or Spark. ``id`` is the first column (row numbers
                    when the store has no ids); kept columns have their names, the others are called ``layer``, or
                    ``layer:reducer`` when there are several reducers. A row of one axis is a fixed-size list, a row of
                    several axes a tensor of Arrow (``fixed_shape_tensor``), which readers that do not know it see as a
                    flattened list; a ragged row is a list of flattened positions. The field's metadata has ``shape``.
                    A column that is short of rows has nulls, and flattened lists of no fixed size, since pyarrow
                    before 26 cannot read nulls among fixed-size ones. bfloat16 and float8 become float32. Needs the
                    extra ``parquet``.
    ``npy``         A folder with ``ids.npy`` and a file for each column, named as in Parquet and percent-escaped.
    ``npz``         One file; entries are called ``layer`` or ``layer:reducer``, as by ``Activations.save``, and
                    ``#ids`` and ``#keep:name`` as in a store's own shards.
    ``safetensors`` The same, with every dtype as it is, and text as UTF-8 bytes.
    ==============  ==================================================================================================

    In the last three, a ragged column is the positions of all rows one behind the other, and ``...#offsets`` says where
    each row begins and the last one ends; so is text in safetensors. ``...#rows`` says which rows a column has that is
    short of them.

    `out` is a path at which nothing is yet, outside the store; `to` is the format.

    Raises:
        ArgumentError: an unknown format, or one that cannot hold what is in the store.
        MissingExtraError: Parquet without pyarrow.
        StoreError: there is something at that path already, it cannot be written, or the store is damaged.

    """
    if to not in _FORMATS:
        raise ArgumentError("to", f"be one of {', '.join(_FORMATS)}", to)
    out, (write, opened_with) = Path(out), _FORMATS[to]
    if os.path.lexists(out):
        raise _taken(out, to)
    if out.resolve().is_relative_to(store.path.resolve()):
        raise StoreError(out, "be outside the store", "a path inside it", "Choose another place.")
    with draft(out) as beside:
        write(store, beside)
        if not publish(beside, out):
            raise _taken(out, to)
    files = out.iterdir() if out.is_dir() else [out]
    return Export(out, sum(file.stat().st_size for file in files), opened_with.format(str(out)))


def _taken(out: Path, to: str) -> StoreError:
    kind = "folder" if to == "npy" else "file"
    return StoreError(out, f"be a new {kind}", "one that exists already", "Choose another path, or move it away.")


def _is_text(source: _Source) -> bool:
    return not hasattr(source, "dtype")


def _ids(store: Store) -> _Source:
    return store.ids if store.manifest["ids"] == "str" else torch.tensor(store.ids, dtype=torch.int64)


def _columns(store: Store, reserved: str) -> dict[str, _Source]:
    """The columns by names that are neither escaped nor reserved."""
    layers = [(layer, f"{layer}:{reducer}", store[layer, reducer]) for layer, reducer in store.pairs]
    is_short = len(store.reducers) == 1
    named: list[tuple[str, _Source]] = [
        (layer if is_short and layer != reserved else long, column) for layer, long, column in layers
    ]
    taken = {reserved, *(name for name, _ in named)}
    named += [(f"keep:{name}" if name in taken else name, column) for name, column in store.keep.items()]
    columns = dict(named)
    if len(columns) < len(named):
        name = Counter(name for name, _ in named).most_common(1)[0][0]
        raise ArgumentError("to", f"be a format that can tell two columns called {name!r} apart", "another", "Use npz.")
    return columns


def _with_indices(store: Store, columns: Mapping[str, _Source]) -> Iterator[tuple[str, _Source]]:
    """The columns; behind a ragged one its offsets, and behind one that is short of rows the rows that it has."""
    for name, column in columns.items():
        yield name, column
        if not _is_text(column) and column.is_ragged:
            yield name + OFFSETS, offsets(column.lengths())
        if len(column) < store.rows:
            yield name + ROWS, column.rows


def _entries(store: Store) -> dict[str, _Source]:
    """Everything by the names that a shard has for it."""
    columns = {entry_name(*(key if isinstance(key, tuple) else (key,))): store[key] for key in store}
    kept = {keep_entry(name): column for name, column in store.keep.items()}
    return {IDS: _ids(store), **dict(_with_indices(store, {**columns, **kept}))}


def _shape(source: Column | Tensor) -> tuple[int, ...]:
    if isinstance(source, Tensor):
        return tuple(source.shape)
    return (int(source.lengths().sum()) if source.is_ragged else len(source), *source.row_shape)


def _blocks(source: Column | Tensor) -> Iterator[Tensor]:
    return iter([source]) if isinstance(source, Tensor) else source.blocks(flat=True)


def _write_npy(store: Store, folder: Path) -> None:
    folder.mkdir()
    for name, source in {"ids": _ids(store), **_columns(store, "ids")}.items():
        for entry, array in _with_indices(store, {escape(name): source}) if name != "ids" else [(name, source)]:
            with open(folder / f"{entry}.npy", "xb") as file:
                _write_array(file, entry, array)
                sync(file)
    sync_folder(folder)


def _write_npz(store: Store, path: Path) -> None:
    with open(path, "xb") as file:
        with zipfile.ZipFile(file, "w", allowZip64=True) as archive:
            for name, source in _entries(store).items():
                with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                    _write_array(member, name, source)
        sync(file)


def _write_array(file: Any, name: str, source: _Source) -> None:
    """Write an array as numpy's format 1.0 has it, block by block."""
    shape: tuple[int, ...]
    arrays: Iterable[_Array]
    if _is_text(source):
        longest = 1
        for text in source:
            longest = max(longest, len(text))
            if text.endswith("\0"):
                advice = "numpy leaves such an end out; export it to safetensors."
                raise ArgumentError(f"text in {name!r}", "end in something else than NUL", text, advice)
        dtype, shape = np.dtype(f"U{longest}"), (len(source),)
        texts, count = iter(source), max(1, BLOCK_BYTES // dtype.itemsize)
        arrays = (np.array(list(islice(texts, count)), dtype) for _ in range(0, len(source), count))
    else:
        dtype, shape = to_numpy(torch.empty(0, dtype=source.dtype)).dtype, _shape(source)
        arrays = map(to_numpy, _blocks(source))
    description = {"descr": npy.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    npy.write_array_header_1_0(file, description)
    for array in arrays:
        file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)


def _write_safetensors(store: Store, path: Path) -> None:
    sources: dict[str, _Source] = {}
    for name, source in _entries(store).items():
        if _is_text(source):
            texts = as_bytes(source)
            sources[name], sources[name + OFFSETS] = texts.values, offsets(texts.lengths)
        else:
            check_dtype(source.dtype)
            sources[name] = source
    # Not the columns' own mapped chunks: those of all columns would be more maps than a process may have (65,530).
    outlines = {
        name: [torch.empty(_shape(source), dtype=source.dtype, device="meta")] for name, source in sources.items()
    }
    names = {id(outline): name for name, (outline,) in outlines.items()}
    header, order = arranged(outlines, None)
    with open(path, "xb") as file:
        file.write(header)
        for outline in order:
            for block in _blocks(sources[names[id(outline)]]):
                file.write(bytes_of(block))
        sync(file)


_FORMATS: dict[str, tuple[Callable[[Store, Path], None], str]] = {  # what writes it, and a line that opens it
    "parquet": (
        lambda store, path: write_parquet(path, store.ids, _columns(store, ID)),
        "import pyarrow.parquet; table = pyarrow.parquet.read_table({!r})",
    ),
    "npy": (
        _write_npy,
        "import numpy, pathlib; "
        "arrays = {{path.stem: numpy.load(path, mmap_mode='r') for path in pathlib.Path({!r}).iterdir()}}",
    ),
    "npz": (_write_npz, "import numpy; arrays = numpy.load({!r})"),
    "safetensors": (_write_safetensors, "import safetensors; tensors = safetensors.safe_open({!r}, 'pt')"),
}
