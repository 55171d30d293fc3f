"""Columns as engines hand them over: dicts of arrays, Arrow tables, pandas' frames; and tensors made of them."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from activation_extractor._display import examples
from activation_extractor.errors import ArgumentError, ArgumentTypeError
from activation_extractor.sinks._step import check_ids

Kind = Literal["numpy", "arrow", "pandas"]
_NUMBERS = (bool, int, float, complex, np.generic, list, tuple)
_BATCHED = "Use map_batches, or map(batched=True), which hand over many rows at once."
_PREPARE = "Pass prepare=, which is called with the columns and returns what the model takes"


@dataclass(frozen=True)
class GivenColumns:
    """A batch of an engine: its columns by name, as they came, of so many rows; `frame` is the batch itself."""

    kind: Kind
    columns: Mapping[str, Any]
    rows: int
    frame: Any

    def column(self, argument: str, name: str) -> Any:
        """A column as it came; an ArgumentError where there is none."""
        if name not in self.columns:
            advice = "ids=None leaves ids out, where the engine keeps the rows beside what is returned."
            raise ArgumentError(
                f"the columns of {argument}=", f"hold {name!r}", list(self.columns), advice if argument == "ids" else ""
            )
        return self.columns[name]

    def ids(self, name: str) -> list[int | str]:
        """The row ids in a column, which has one for each row.

        Raises:
            ArgumentError: there is no such column, or a row has none.
            ArgumentTypeError: they are neither strings nor integers.
        """
        values = plain(self.column("ids", name))
        ids = values.tolist() if isinstance(values, np.ndarray | Tensor) else list(values)
        missing = next((row for row, row_id in enumerate(ids) if row_id is None or row_id != row_id), None)
        if missing is not None:
            raise ArgumentError(f"the column {name!r}", "hold an id in each row", f"{ids[missing]} in row {missing}")
        return check_ids(ids) or []


def take_apart(batch: Any) -> GivenColumns:
    """A batch of an engine, by its columns.

    Raises:
        ArgumentTypeError: it is of no known kind, or of a single row.
        ArgumentError: columns differ in their number of rows.
    """
    pandas, arrow = sys.modules.get("pandas"), sys.modules.get("pyarrow")
    if pandas is not None and isinstance(batch, pandas.DataFrame):
        return GivenColumns("pandas", {str(name): batch[name] for name in batch.columns}, len(batch), batch)
    if isinstance(batch, Mapping):
        return GivenColumns("numpy", dict(batch.items()), _count_rows(batch), batch)
    if arrow is not None and isinstance(batch, arrow.RecordBatch):
        batch = arrow.Table.from_batches([batch])
    elif hasattr(batch, "__arrow_c_stream__"):  # a table of Arrow, of polars, of Daft
        import pyarrow as pa

        batch = batch if isinstance(batch, pa.Table) else pa.table(batch)
    else:
        kinds = "be a dict of columns, an Arrow table or a pandas frame"
        raise ArgumentTypeError("a batch", kinds, type(batch).__name__, _BATCHED)
    return GivenColumns("arrow", dict(zip(batch.column_names, batch.columns, strict=True)), batch.num_rows, batch)


def _count_rows(batch: Mapping[str, Any]) -> int:
    counts: dict[str, int] = {}
    for name, values in batch.items():
        if isinstance(values, str | bytes) or not hasattr(values, "__len__") or getattr(values, "ndim", 1) == 0:
            raise ArgumentTypeError(f"the column {name!r}", "hold many rows", values, _BATCHED)
        counts[name] = len(values)
    if len({*counts.values()}) > 1:
        raise ArgumentError("a batch", "have as many rows in each column", counts)
    return next(iter(counts.values()), 0)


def plain(values: Any, python_floats: Any = np.float64) -> Any:
    """A column as an array ``(rows, *shape)`` of numbers, where its rows are numbers of one shape; else as a list.

    The list has text as it is, rows of several shapes as arrays, and anything else as it came. Tensors stay tensors.
    Numbers that were Python's floats get the dtype `python_floats`.
    """
    if isinstance(values, Tensor):
        return values
    if hasattr(values, "to_arrow"):  # a series of Daft or polars
        values = values.to_arrow()
    if hasattr(values, "null_count") and hasattr(values, "to_pylist"):
        values = _of_arrow(values)
    elif hasattr(values, "to_numpy"):  # a series of pandas
        values = _of_series(values)
    if isinstance(values, np.ndarray) and values.dtype.kind in "biufc":
        return values if values.dtype.isnative else values.astype(values.dtype.newbyteorder("="))
    rows = values.tolist() if isinstance(values, np.ndarray) and values.dtype.kind == "U" else list(values)
    return _of_rows(rows, python_floats)


def _of_rows(rows: list[Any], python_floats: Any) -> Any:
    if all(isinstance(row, str) for row in rows):
        return rows
    if all(isinstance(row, Tensor) for row in rows):
        return torch.stack(rows) if len({(row.shape, row.dtype) for row in rows}) == 1 else rows
    if any(isinstance(row, np.ndarray) for row in rows):
        arrays = [plain(row, python_floats) if isinstance(row, np.ndarray) else row for row in rows]
        is_alike = all(isinstance(row, np.ndarray) for row in arrays) and len({row.shape for row in arrays}) == 1
        return np.stack(arrays) if is_alike else arrays
    if not all(isinstance(row, _NUMBERS) for row in rows):  # images, say, of which numpy makes arrays if they are alike
        return rows
    try:
        array = np.array(rows)
    except (ValueError, OverflowError):  # of several shapes, or integers of more than 64 bits
        is_list = all(isinstance(row, list | tuple) for row in rows)
        return [plain(row, python_floats) for row in rows] if is_list else rows
    if array.dtype.kind not in "biufc":
        return rows
    is_python = array.dtype == np.float64 and not any(isinstance(row, np.floating) for row in rows)
    return array.astype(python_floats) if is_python else array


def _of_series(series: Any) -> Any:
    """A series of pandas; a list with None for what is missing among integers, booleans and text."""
    if hasattr(series.dtype, "pyarrow_dtype"):
        import pyarrow as pa

        return _of_arrow(pa.chunked_array([pa.array(series.array)]))
    if isinstance(series.dtype, np.dtype):
        return series.to_numpy()
    missing = series.isna()
    if missing.any():
        return [None if is_missing else value for value, is_missing in zip(series, missing, strict=True)]
    is_text = getattr(series.dtype, "name", "").startswith(("string", "str", "category"))
    return series.tolist() if is_text else series.to_numpy(getattr(series.dtype, "numpy_dtype", None))


def _of_arrow(values: Any) -> Any:
    """A column of Arrow; a list with None for what is null, in a row too."""
    import pyarrow as pa

    if isinstance(values, pa.ChunkedArray):
        values = values.combine_chunks() if values.num_chunks != 1 else values.chunk(0)
        if isinstance(values, pa.ChunkedArray):  # which older releases return for extension types
            values = pa.concat_arrays(values.chunks)
    if pa.types.is_dictionary(values.type):
        values = values.dictionary_decode()
    if _has_nulls(pa, values):
        return values.to_pylist()
    if isinstance(values.type, pa.FixedShapeTensorType):
        return values.to_numpy_ndarray()
    if pa.types.is_fixed_size_list(values.type):
        inner = _of_arrow(values.flatten())
        if isinstance(inner, np.ndarray) and inner.dtype.kind in "biufc":
            return inner.reshape(len(values), values.type.list_size, *inner.shape[1:])
    return values.to_numpy(zero_copy_only=False)


def _has_nulls(pa: Any, values: Any) -> bool:
    if values.null_count:
        return True
    kinds = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)
    return any(is_kind(values.type) for is_kind in kinds) and _has_nulls(pa, values.flatten())


def as_tensor(name: str, column: Any) -> Tensor:
    """A column that `plain` made, as a tensor; of arrays that may be written to, it shares the memory.

    Raises:
        ArgumentError: it holds something else than numbers of one shape.
    """
    what = f"the column {name!r}"
    if isinstance(column, Tensor):
        return column
    if isinstance(column, np.ndarray):
        try:  # engines hand out arrays that nobody may write to, which torch has not
            is_usable = column.flags.writeable and all(stride >= 0 for stride in column.strides)
            return torch.from_numpy(column if is_usable else column.copy())
        except TypeError as error:
            raise ArgumentError(what, "have a dtype that torch has", str(column.dtype)) from error
    if all(isinstance(row, str) for row in column):
        advice = f"{_PREPARE} (tokens, say), or leave the column out with columns=."
        raise ArgumentError(what, "hold numbers where there is no prepare=", column[0], advice)
    shapes = list(dict.fromkeys(_shapes(column)))
    if None not in shapes:
        advice = f"{_PREPARE}: it may pad them."
        raise ArgumentError(what, "hold rows of one shape where there is no prepare=", examples(shapes), advice)
    other = next(row for row, shape in zip(column, _shapes(column), strict=True) if shape is None)
    advice = f"{_PREPARE}, or leave the column out with columns=."
    raise ArgumentError(what, "hold numbers in each row where there is no prepare=", other, advice)


def _shapes(rows: Sequence[Any]) -> Iterable[tuple[int, ...] | None]:
    """The shape of each row that holds numbers; None for another."""
    for row in rows:
        is_numbers = isinstance(row, Tensor) or (isinstance(row, np.ndarray) and row.dtype.kind in "biufc")
        yield tuple(row.shape) if is_numbers else None
