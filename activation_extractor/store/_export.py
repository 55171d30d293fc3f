"""Taking a store elsewhere: files that other programs read without this library.

Columns are read and written a block at a time. What is written appears whole or not at all, and never in place of
something else.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from activation_extractor._arguments import check_path, check_size
from activation_extractor._files import draft, publish
from activation_extractor.errors import ArgumentError, StoreError
from activation_extractor.store._array_files import write_npy, write_npz, write_safetensors
from activation_extractor.store._datasets_folder import write_datasets
from activation_extractor.store._export_columns import Content
from activation_extractor.store._h5ad import write_h5ad
from activation_extractor.store._parquet import write_parquet, write_parquet_shards
from activation_extractor.store._store import Store

_SHARD_BYTES = 500 * 10**6  # of a folder for `datasets`, which writes such shards itself


@dataclass(frozen=True)
class Export:
    """The file or folder that was written, its size, and a line of Python that opens it."""

    path: Path
    nbytes: int
    opened_with: str


def export(
    store: Store,
    out: str | os.PathLike[str],
    to: str,
    *,
    keys: Iterable[Any] | None = None,
    shard_bytes: int | None = None,
) -> Export:
    """Write a store to a new file, or folder, of a format that other programs read.

    ==============  ==================================================================================================
    ``parquet``     A file of one table, for pandas, polars, DuckDB, LanceDB or Spark; with `shard_bytes` a folder of
                    them. ``id`` is the first column (row numbers when the store has no ids); kept columns have their
                    names, the others are called ``layer``, or ``layer:reducer`` when there are several reducers. A row
                    of one axis is a fixed-size list, a row of several axes a tensor of Arrow (``fixed_shape_tensor``),
                    which readers that do not know it see as a flattened list; a ragged row is a list of flattened
                    positions. The field's metadata has ``shape``. A column that is short of rows has nulls, and
                    flattened lists of no fixed size, since pyarrow before 26 cannot read nulls among fixed-size ones.
                    bfloat16 and float8 become float32. Needs the extra ``parquet``.
    ``npy``         A folder with ``ids.npy`` and a file for each column, named as in Parquet and percent-escaped.
    ``npz``         One file; entries are called ``layer`` or ``layer:reducer``, as by ``Activations.save``, and
                    ``#ids`` and ``#keep:name`` as in a store's own shards.
    ``safetensors`` The same, with every dtype as it is, and text as UTF-8 bytes.
    ``datasets``    A folder that ``datasets.load_from_disk`` opens, as SAELens caches activations. Names are those of
                    Parquet, but that columns of the reducer ``full`` are called like their layer beside others. Rows
                    of several axes are ``Array2D`` and so on; ragged rows of one length are ``(positions, *row)``,
                    others ``(None, *row)``. The column ``token_ids`` is the kept column of that name, or else
                    ``input_ids``, or else a layer called ``token_ids``. Missing rows and dtypes as in Parquet. Needs
                    the extra ``datasets``.
    ``h5ad``        A file that anndata and scanpy open: rows of one or more axes in ``obsm``, numbers and kept columns
                    of numbers or text in ``obs``, no ``X``. Ids are text. Names are those of Parquet, with ``%25``,
                    ``%2F`` and ``%00`` for ``%``, ``/`` and NUL. A row that a column lacks is NaN, or an empty text.
                    bfloat16 and float8 become float32. Ragged columns have no place: choose others by `keys`. Needs
                    the extra ``h5ad``.
    ==============  ==================================================================================================

    In ``npy``, ``npz`` and ``safetensors`` a ragged column is the positions of all rows one behind the other, and
    ``...#offsets`` says where each row begins and the last one ends; so is text in safetensors. ``...#rows`` says which
    rows a column has that is short of them.

    Args:
        store: the store.
        out: a path at which nothing is yet, outside the store.
        to: the format.
        keys: which columns, as for ``store[key]``; by default all. Ids and kept columns are always written.
        shard_bytes: about how many bytes of numbers a file of ``parquet`` or ``datasets`` has; by default Parquet is
            one file, and files of ``datasets`` have 500 MB.

    Raises:
        ArgumentError: an unknown format, or one that cannot hold what is in the store.
        ActivationNotFoundError: there is no such column.
        MissingExtraError: a library that the format needs is not installed.
        StoreError: there is something at that path already, it cannot be written, or the store is damaged.

    Example:
        >>> import tempfile, torch
        >>> from torch import nn
        >>> from activation_extractor import export, extract
        >>> store = extract(nn.Linear(4, 8), [torch.randn(6, 4)], "", out=tempfile.mkdtemp(), progress=False)
        >>> export(store, f"{tempfile.mkdtemp()}/out.npz", "npz").nbytes > store["", "full"].numpy().nbytes
        True
    """
    if to not in _FORMATS:
        raise ArgumentError("to", f"be one of {', '.join(_FORMATS)}", to)
    out, (write, opened_with) = check_path("out", out), _FORMATS[to]
    write = write if shard_bytes is None else _in_shards(to, shard_bytes)
    kind = "folder" if to in _FOLDERS or shard_bytes is not None else "file"
    if os.path.lexists(out):
        raise _taken(out, kind)
    if out.resolve().is_relative_to(store.path.resolve()):
        raise StoreError(out, "be outside the store", "a path inside it", "Choose another place.")
    with draft(out) as beside:
        write(Content.of(store, keys), beside)
        if not publish(beside, out):
            raise _taken(out, kind)
    files = out.iterdir() if out.is_dir() else [out]
    return Export(out, sum(file.stat().st_size for file in files), opened_with.format(str(out)))


def _in_shards(to: str, shard_bytes: int) -> Callable[[Content, Path], None]:
    """What writes a format as files of so many bytes."""
    check_size("shard_bytes", shard_bytes)
    if to not in _SHARDED:
        raise ArgumentError("shard_bytes", f"be None for {to}", shard_bytes, f"Choose {' or '.join(_SHARDED)}.")
    write = _SHARDED[to]
    return lambda content, path: write(content, path, shard_bytes)


def _taken(out: Path, kind: str) -> StoreError:
    return StoreError(out, f"be a new {kind}", "one that exists already", "Choose another path, or move it away.")


_FORMATS: dict[str, tuple[Callable[[Content, Path], None], str]] = {  # what writes it, and a line that opens it
    "parquet": (write_parquet, "import pyarrow.parquet; table = pyarrow.parquet.read_table({!r})"),
    "npy": (
        write_npy,
        "import numpy, pathlib; "
        "arrays = {{path.stem: numpy.load(path, mmap_mode='r') for path in pathlib.Path({!r}).iterdir()}}",
    ),
    "npz": (write_npz, "import numpy; arrays = numpy.load({!r})"),
    "safetensors": (write_safetensors, "import safetensors; tensors = safetensors.safe_open({!r}, 'pt')"),
    "datasets": (
        lambda content, path: write_datasets(content, path, _SHARD_BYTES),
        "import datasets; dataset = datasets.load_from_disk({!r})",
    ),
    "h5ad": (write_h5ad, "import anndata; data = anndata.read_h5ad({!r})"),
}
_FOLDERS = ("datasets", "npy")
_SHARDED: dict[str, Callable[[Content, Path, int], None]] = {
    "parquet": write_parquet_shards,
    "datasets": write_datasets,
}
