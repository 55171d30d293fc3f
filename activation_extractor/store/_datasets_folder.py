"""Columns as a folder that ``datasets.load_from_disk`` opens, a batch of rows at a time.

It is laid out as ``Dataset.save_to_disk`` does: ``data-00000-of-00002.arrow``, streams of Arrow, beside
``dataset_info.json`` (the features) and ``state.json`` (the files). SAELens reads its caches of activations in this
form: a column of the hook's name, ``Array2D((context, d))``, and ``token_ids``.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Sequence
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch

from activation_extractor._files import sync, sync_folder
from activation_extractor._tensors import to_numpy
from activation_extractor.errors import ArgumentError, MissingExtraError
from activation_extractor.store._columns import Column
from activation_extractor.store._export_columns import Content, TableColumn, shard_files
from activation_extractor.store._rows_on_disk import bounds

_ID, _TOKEN_IDS, _INPUT_IDS, _FULL = "id", "token_ids", "input_ids", "full"
_BATCH_BYTES = 1 << 22  # of a batch of Arrow's; a few copies of one are in memory at a time
_MOST_AXES = 5  # Array5D is the last

_Array = np.ndarray[Any, Any]


def write_datasets(content: Content, folder: Path, shard_bytes: int) -> None:
    """Write a new folder, synced, whose files have about so many bytes of numbers.

    Raises:
        ArgumentError: numbers, or rows of more axes, that the format does not have.
        MissingExtraError: datasets is not installed.
        StoreError: a shard is damaged or gone.
        OSError: the folder cannot be written.
    """
    if find_spec("datasets") is None:
        raise MissingExtraError("Exporting to datasets", "datasets", "datasets")
    import datasets
    import pyarrow as pa

    rows = len(content.ids)
    columns = [_Column(datasets, pa, TableColumn(name, column, rows)) for name, column in _named(content).items()]
    id_type = "string" if content.id_type == "str" else "int64"
    features = datasets.Features({_ID: datasets.Value(id_type), **{one.table.name: one.feature for one in columns}})
    ids, sizes = pa.array(content.ids, id_type), np.zeros(rows, dtype=np.int64)
    for column in columns:
        column.table.add_bytes(sizes, column.itemsize)
    groups = list(bounds(np.maximum(sizes, 1 << 8), min(_BATCH_BYTES, shard_bytes)))
    folder.mkdir()
    files, schema = shard_files(groups, sizes, shard_bytes, "arrow"), features.arrow_schema
    for name, batches in files:
        with open(folder / name, "xb") as file:
            with pa.ipc.new_stream(file, schema) as stream:
                for start, stop in batches:
                    arrays = [ids[start:stop], *(column.array(start, stop) for column in columns)]
                    stream.write_batch(pa.record_batch(arrays, schema=schema))
            sync(file)
    _describe(folder, asdict(datasets.DatasetInfo(features=features)), [name for name, _ in files])
    sync_folder(folder)


def _named(content: Content) -> dict[str, Any]:
    """The columns as SAELens names them."""
    reducers = {reducer for _, reducer in content.columns}
    named = content.named({_ID, ""}, _FULL if _FULL in reducers else content.only_reducer)
    if _TOKEN_IDS not in named:
        layer = next((f"{layer}:{reducer}" for layer, reducer in content.columns if layer == _TOKEN_IDS), None)
        source = _INPUT_IDS if _INPUT_IDS in content.kept else layer
        named = {_TOKEN_IDS if name == source else name: column for name, column in named.items()}
    return named


def _describe(folder: Path, info: dict[str, Any], names: Sequence[str]) -> None:
    """Write the two files that say what the others hold."""
    state: dict[str, Any] = {
        "_data_files": [{"filename": name} for name in names],
        "_fingerprint": secrets.token_hex(8),  # what `datasets` names by that it computes from these rows
        "_format_columns": None,
        "_format_kwargs": {},
        "_format_type": None,
        "_output_all_columns": False,
        "_split": None,
    }
    for name, content in (("dataset_info.json", info), ("state.json", state)):
        with open(folder / name, "xb") as file:
            file.write(json.dumps(content, indent=2).encode())
            sync(file)


class _Column:
    """A column of a data set: its feature, and its rows as arrays of Arrow."""

    def __init__(self, datasets: Any, pa: Any, table: TableColumn) -> None:
        self.table, self._pa, self.itemsize = table, pa, 1
        if "\0" in table.name:  # where `datasets` ends it
            raise ArgumentError(
                "the name of a data set's column", "be without NUL", table.name, "Export to npz instead."
            )
        if table.is_text:
            self.feature = datasets.Value("string")
            return
        source: Column = table.source
        self._dtype = _arrow_name(table.name, source)
        self.itemsize = np.dtype(self._dtype).itemsize
        shape: tuple[int | None, ...] = source.row_shape
        if source.is_ragged:
            lengths = torch.unique(source.lengths())
            shape = (int(lengths[0]) if len(lengths) == 1 and len(source) and not table.is_short else None, *shape)
        if len(shape) > _MOST_AXES:
            condition = f"have at most {_MOST_AXES} axes in a row"
            raise ArgumentError(f"column {table.name!r} of a data set", condition, shape, "Export to npz instead.")
        self._shape = shape
        value = datasets.Value(self._dtype)
        if len(shape) > 1:
            self.feature = getattr(datasets, f"Array{len(shape)}D")(shape, self._dtype)
        elif shape:
            has_length = shape[0] is not None and not table.is_short
            self.feature = datasets.Sequence(value, length=shape[0] if has_length else -1)
        else:
            self.feature = value

    def array(self, start: int, stop: int) -> Any:
        """The rows `start` to `stop` of the table, null where the column has none."""
        pa, table = self._pa, self.table
        if table.is_text:
            return pa.array(table.texts(start, stop), pa.string())
        source, (rows, has_row) = table.source, table.take(start, stop)
        lengths = np.zeros(len(has_row), dtype=np.int64)
        if source.is_ragged:
            lengths[has_row] = list(map(len, rows))
            rows = torch.cat([torch.empty((0, *source.row_shape), dtype=source.dtype), *rows])
        values = to_numpy(rows)
        if not self._shape:
            spread = np.zeros(len(has_row), values.dtype)
            spread[has_row] = values
            return pa.array(spread, mask=~has_row)
        numbers = pa.array(values.reshape(-1))
        if len(self._shape) == 1 and self._shape[0] is not None and not table.is_short:
            return pa.FixedSizeListArray.from_arrays(numbers, self._shape[0])
        inner = source.row_shape if source.is_ragged else source.row_shape[1:]
        for size in reversed(inner):
            numbers = pa.ListArray.from_arrays(np.arange(0, len(numbers) + 1, size, dtype=np.int32), numbers)
        if not source.is_ragged:
            lengths[has_row] = source.row_shape[0]
        starts = np.concatenate([[0], lengths.cumsum()]).astype(np.int32)
        lists = pa.ListArray.from_arrays(pa.array(starts), numbers, mask=pa.array(~has_row))
        return lists if len(self._shape) == 1 else pa.ExtensionArray.from_storage(self.feature(), lists)


def _arrow_name(name: str, column: Column) -> str:
    """What `datasets` calls the type of a column's numbers."""
    what, advice = f"column {name!r} of a data set", "Export to npz instead."
    if column.dtype.is_complex:
        raise ArgumentError(what, "hold real numbers", column.dtype, advice)
    if 0 in column.row_shape:
        raise ArgumentError(what, "have at least one number in a row", column.row_shape, advice)
    return str(to_numpy(torch.empty(0, dtype=column.dtype)).dtype)
