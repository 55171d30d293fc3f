"""Columns as engines take them back: what was computed of a batch, beside columns of the batch itself."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from activation_extractor._display import dtype_name
from activation_extractor._format._stored_rows import Ragged
from activation_extractor._tensors import as_plain, numpy_has, to_numpy
from activation_extractor.errors import ArgumentError
from activation_extractor.runs._given_columns import GivenColumns, Kind, plain

_Array = np.ndarray[Any, Any]


def put_together(
    batch: GivenColumns, kind: Kind, taken: Mapping[str, Any], computed: Mapping[str, Any], *, bits: bool
) -> Any:
    """What an engine is handed back: columns of the batch that were `taken` from it, then those that were `computed`.

    A computed column is a tensor with a row for each of the batch's, or `Ragged`; with `bits`, numbers that numpy lacks
    become unsigned integers of the same bits, or else float32.

    Raises:
        ArgumentError: Arrow does not have such numbers.
    """
    if kind == "arrow":
        return _as_arrow(batch, taken, computed, bits)
    columns = {name: _as_it_came(batch, kind, column) for name, column in taken.items()}
    for name, column in computed.items():
        columns[name] = _rows(column, name, bits) if isinstance(column, Ragged) else _numbers(column, name, bits)
    if kind == "numpy":
        return columns
    import pandas as pd

    index = batch.frame.index if batch.kind == "pandas" else None
    rows = {name: list(column) if np.ndim(column) > 1 else column for name, column in columns.items()}
    return pd.DataFrame(rows, index=index)


def _as_it_came(batch: GivenColumns, kind: Kind, column: Any) -> Any:
    if batch.kind == kind:
        return column
    values = plain(column)
    if isinstance(values, Tensor):
        return to_numpy(values)
    return values if isinstance(values, np.ndarray) else _as_objects(values)


def _as_objects(rows: Any) -> _Array:
    """An array whose elements are rows of any kind."""
    array = np.empty(len(rows), object)
    for place, row in enumerate(rows):
        array[place] = row
    return array


def _numbers(tensor: Tensor, name: str, bits: bool) -> _Array:
    if not bits or numpy_has(tensor.dtype) or tensor.dtype == torch.complex32:
        return to_numpy(tensor, name)
    array: _Array = as_plain(tensor, name).contiguous().view({1: torch.uint8, 2: torch.uint16}[tensor.itemsize]).numpy()
    return array


def _rows(column: Ragged, name: str, bits: bool) -> _Array:
    values = _numbers(column.values, name, bits)
    return _as_objects(np.split(values, column.lengths.cumsum(0)[:-1].numpy()))


def _as_arrow(batch: GivenColumns, taken: Mapping[str, Any], computed: Mapping[str, Any], bits: bool) -> Any:
    import pyarrow as pa

    # The data sets of Hugging Face know no tensors of Arrow.
    has_tensors = batch.kind != "arrow" or b"huggingface" not in (batch.frame.schema.metadata or {})
    fields, arrays = [], []
    for name, column in taken.items():
        array = column if batch.kind == "arrow" else _as_array(pa, column, has_tensors)
        arrays.append(array)
        fields.append(pa.field(name, array.type))
    for name, column in computed.items():
        values = column.values if isinstance(column, Ragged) else column
        numbers = _numbers(values, name, bits)
        if numbers.dtype.kind == "c" or 0 in numbers.shape[1:]:
            what, got = f"the column {name!r} of a table", (dtype_name(values.dtype), numbers.shape[1:])
            raise ArgumentError(what, "hold real numbers, one at least in a row", got, "Pass to='numpy'.")
        array = _as_array(pa, numbers, has_tensors and not isinstance(column, Ragged))
        if isinstance(column, Ragged):
            ends = np.concatenate([[0], column.lengths.cumsum(0).numpy()])
            array = pa.LargeListArray.from_arrays(pa.array(ends, pa.int64()), array)
        about = {"shape": json.dumps(list(numbers.shape[1:])), "dtype": dtype_name(values.dtype)}
        arrays.append(array)
        fields.append(pa.field(name, array.type, metadata=about))
    return pa.table(arrays, schema=pa.schema(fields))


def _as_array(pa: Any, column: Any, has_tensors: bool) -> Any:
    """A column as an array of Arrow: a tensor a row where rows have axes, or lists of a fixed size."""
    values = plain(column)
    values = to_numpy(values) if isinstance(values, Tensor) else values
    if not isinstance(values, np.ndarray):
        return pa.array(values)
    shape, array = values.shape[1:], pa.array(np.ascontiguousarray(values).reshape(-1))
    if not shape:
        return array
    if has_tensors and array.type != pa.bool_():  # of which Arrow has no tensors
        kind = pa.fixed_shape_tensor(array.type, shape)
        lists = pa.FixedSizeListArray.from_arrays(array, math.prod(shape))
        return pa.ExtensionArray.from_storage(kind, lists.cast(kind.storage_type))
    for size in reversed(shape):
        array = pa.FixedSizeListArray.from_arrays(array, size)
    return array
