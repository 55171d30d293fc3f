"""Columns as arrays: a folder of npy files, an npz file, or a safetensors file.

Columns are read and written a block at a time. A ragged column is the positions of all rows one behind the other, with
``...#offsets`` beside it; one that is short of rows has ``...#rows`` beside it.
"""

from __future__ import annotations

import zipfile
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.lib import format as npy
from torch import Tensor

from activation_extractor._files import sync, sync_folder
from activation_extractor._format._entry_names import IDS, OFFSETS, ROWS, entry_name, escape, keep_entry
from activation_extractor._format._headers import bytes_of
from activation_extractor._format._safetensors import arranged, check_dtype
from activation_extractor._format._stored_rows import as_bytes, offsets
from activation_extractor._tensors import to_numpy
from activation_extractor.errors import ArgumentError
from activation_extractor.store._columns import BLOCK_BYTES, Column
from activation_extractor.store._export_columns import Content

_Array = np.ndarray[Any, Any]
_Source = Any  # a column, an index tensor, or a sequence of text


def write_npy(content: Content, folder: Path) -> None:
    """Write a folder with a file for each column, named as in a table and percent-escaped, and ``ids.npy``."""
    folder.mkdir()
    named = {escape(name): source for name, source in content.named({"ids"}, content.only_reducer).items()}
    for entry, array in [("ids", _ids(content)), *_with_indices(content, named)]:
        with open(folder / f"{entry}.npy", "xb") as file:
            _write_array(file, entry, array)
            sync(file)
    sync_folder(folder)


def write_npz(content: Content, path: Path) -> None:
    """Write an npz file with an entry for each column, named as in a shard."""
    with open(path, "xb") as file:
        with zipfile.ZipFile(file, "w", allowZip64=True) as archive:
            for name, source in _entries(content).items():
                with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                    _write_array(member, name, source)
        sync(file)


def write_safetensors(content: Content, path: Path) -> None:
    """Write a safetensors file with an entry for each column, named as in a shard."""
    sources: dict[str, _Source] = {}
    for name, source in _entries(content).items():
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


def _ids(content: Content) -> _Source:
    return content.ids if content.id_type == "str" else torch.tensor(content.ids, dtype=torch.int64)


def _is_text(source: _Source) -> bool:
    return not hasattr(source, "dtype")


def _with_indices(content: Content, columns: Mapping[str, _Source]) -> Iterator[tuple[str, _Source]]:
    """The columns; behind a ragged one its offsets, and behind one that is short of rows the rows that it has."""
    for name, column in columns.items():
        yield name, column
        if not _is_text(column) and column.is_ragged:
            yield name + OFFSETS, offsets(column.lengths())
        if len(column) < len(content.ids):
            yield name + ROWS, column.rows


def _entries(content: Content) -> dict[str, _Source]:
    """Everything by the names that a shard has for it, but for the reducer where all columns have the same."""
    is_short = content.only_reducer is not None
    columns = {
        entry_name(layer, None if is_short else reducer): column for (layer, reducer), column in content.columns.items()
    }
    kept = {keep_entry(name): column for name, column in content.kept.items()}
    return {IDS: _ids(content), **dict(_with_indices(content, {**columns, **kept}))}


def _shape(source: Column | Tensor) -> tuple[int, ...]:
    if isinstance(source, Tensor):
        return tuple(source.shape)
    return (int(source.lengths().sum()) if source.is_ragged else len(source), *source.row_shape)


def _blocks(source: Column | Tensor) -> Iterator[Tensor]:
    return iter([source]) if isinstance(source, Tensor) else source.blocks(flat=True)


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
