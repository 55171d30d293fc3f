"""Columns as an h5ad file, which anndata and scanpy open, a block at a time.

The layout is that of anndata's "on-disk format" in HDF5: each group and array says by ``encoding-type`` what it is.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch

from activation_extractor._files import sync
from activation_extractor._format._stored_rows import RowId
from activation_extractor._tensors import to_numpy
from activation_extractor.errors import ArgumentError, MissingExtraError
from activation_extractor.store._columns import BLOCK_BYTES
from activation_extractor.store._export_columns import Content, TableColumn
from activation_extractor.store._rows_on_disk import bounds

_INDEX = "_index"
_ESCAPED = {"%": "%25", "/": "%2F", "\0": "%00"}  # HDF5 takes / for a group in a group, and ends names at NUL
_TEXTS = 1 << 12  # strings that are written at once


def write_h5ad(content: Content, path: Path) -> None:
    """Write a file at a free path, synced.

    Raises:
        ArgumentError: a ragged column, or numbers that the format does not have.
        MissingExtraError: h5py is not installed.
        StoreError: a shard is damaged or gone.
        OSError: the file cannot be written.
    """
    if find_spec("h5py") is None:
        raise MissingExtraError("Exporting to h5ad", "h5ad", "h5py")
    import h5py

    rows = len(content.ids)
    named = content.named({_INDEX, "", "."}, content.only_reducer)
    columns = [TableColumn(_name(name), column, rows) for name, column in named.items()]
    for column in columns:
        _check(column)
    try:
        with h5py.File(path, "x") as file:
            _write(file, content.ids, columns)
    except (OSError, RuntimeError) as error:  # h5py raises a RuntimeError where the file cannot be closed
        failed = re.search(r"errno = (\d+)", str(error))
        if failed is None:
            raise
        raise OSError(int(failed[1]), os.strerror(int(failed[1]))) from error
    with open(path, "rb+") as written:
        sync(written)


def _write(file: Any, ids: Sequence[RowId], columns: Sequence[TableColumn]) -> None:
    in_obs = [column for column in columns if column.is_text or not column.source.row_shape]
    _encode(file, "anndata", "0.1.0")
    obs = _frame(file, "obs", [column.name for column in in_obs])
    _write_texts(obs, _INDEX, [str(row_id) for row_id in ids])
    _write_texts(_frame(file, "var", []), _INDEX, [])
    for name in ("layers", "obsm", "obsp", "uns", "varm", "varp"):
        _encode(file.create_group(name), "dict", "0.1.0")
    for column in columns:
        group = obs if column in in_obs else file["obsm"]
        if column.is_text:
            _write_texts(group, column.name, column)
        else:
            _write_numbers(group, column)


def _name(name: str) -> str:
    return "".join(_ESCAPED.get(letter, letter) for letter in name)


def _check(column: TableColumn) -> None:
    """Refuse a column that has no place in such a file."""
    if column.is_text:
        return
    source, what = column.source, f"column {column.name!r} of an h5ad file"
    advice = "Choose other columns by keys, or export to npz."
    if source.is_ragged:
        raise ArgumentError(what, "have rows of one shape", source.shape, advice)
    if source.dtype.is_complex:
        raise ArgumentError(what, "hold real numbers", source.dtype, advice)
    if column.is_short and not source.dtype.is_floating_point:
        raise ArgumentError(what, "have all rows, or hold numbers that can be NaN", source.dtype, advice)


def _encode(group: Any, kind: str, version: str) -> Any:
    group.attrs["encoding-type"], group.attrs["encoding-version"] = kind, version
    return group


def _frame(file: Any, name: str, columns: Sequence[str]) -> Any:
    """A table, of which the index and the columns are still to be written."""
    frame = _encode(file.create_group(name), "dataframe", "0.2.0")
    order = np.array(columns, dtype=object) if columns else np.array([], dtype=np.float64)  # as anndata has it
    frame.attrs["_index"], frame.attrs["column-order"] = _INDEX, order
    return frame


def _write_numbers(group: Any, column: TableColumn) -> None:
    source, rows = column.source, column.rows
    dtype = to_numpy(torch.empty(0, dtype=source.dtype)).dtype
    data = _encode(group.create_dataset(column.name, (rows, *source.row_shape), dtype), "array", "0.2.0")
    sizes = np.zeros(rows, dtype=np.int64)
    column.add_bytes(sizes, dtype.itemsize)
    for start, stop in bounds(sizes, BLOCK_BYTES):
        values, has_row = column.take(start, stop)
        block = to_numpy(values)
        if not has_row.all():
            block = np.full((stop - start, *source.row_shape), np.nan, dtype)
            block[has_row] = to_numpy(values)
        data[start:stop] = block


def _write_texts(group: Any, name: str, texts: TableColumn | Sequence[str]) -> None:
    import h5py

    rows = len(texts) if not isinstance(texts, TableColumn) else texts.rows
    data = _encode(group.create_dataset(name, (rows,), h5py.string_dtype()), "string-array", "0.2.0")
    for start in range(0, rows, _TEXTS):
        stop = min(start + _TEXTS, rows)
        block = texts.texts(start, stop) if isinstance(texts, TableColumn) else texts[start:stop]
        nul = next((text for text in block if text and "\0" in text), None)
        if nul is not None:
            advice = "HDF5 ends a text there; export to safetensors."
            raise ArgumentError(f"text in {name!r}", "be without NUL in an h5ad file", nul, advice)
        data[start:stop] = [text or "" for text in block]
