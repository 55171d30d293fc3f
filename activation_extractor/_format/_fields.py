"""Fields: what the columns of a store are, as its manifest lists them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from activation_extractor._display import dtype_name
from activation_extractor._format._entry_names import entry_name, keep_entry
from activation_extractor._format._headers import check_shape
from activation_extractor._format._safetensors import STORED_DTYPES

_DTYPES = {dtype_name(dtype): dtype for dtype in (*STORED_DTYPES, torch.complex128)}


@dataclass(frozen=True)
class Field:
    """What a column of a store is."""

    key: tuple[str, str] | str  # the layer and reducer; the name alone, where the column is a kept one
    dtype: torch.dtype  # on disk
    row_shape: tuple[int, ...]  # of a row; of a position, where the column is ragged
    is_ragged: bool  # whether rows differ in their number of positions; each is ``(positions, *row_shape)``
    converted_from: str | None = None  # the name of the dtype that was computed, where another is stored

    @cached_property
    def entry(self) -> str:
        """The name of the column's entry in a shard."""
        return keep_entry(self.key) if isinstance(self.key, str) else entry_name(*self.key)

    def __str__(self) -> str:
        dtype = self.converted_from or dtype_name(self.dtype)
        return f"{dtype} {self.row_shape}{' ragged' * self.is_ragged}"

    def is_of(self, rows: Tensor, *, is_ragged: bool) -> bool:
        """Whether these rows of its column are stored as they are: plain ones, of what the field says."""
        return (
            type(rows) is Tensor
            and rows.dtype is self.dtype
            and self.converted_from is None
            and is_ragged is self.is_ragged
            and rows.layout is torch.strided
            and not (rows.is_nested or rows.is_meta or rows.requires_grad or rows.is_neg() or rows.is_conj())
            and rows.shape[1:] == self.row_shape
        )

    def to_json(self) -> dict[str, Any]:
        """The field as a manifest lists it."""
        key = {"name": self.key} if isinstance(self.key, str) else {"layer": self.key[0], "reducer": self.key[1]}
        dtype = dtype_name(self.dtype)
        described = {**key, "dtype": dtype, "row_shape": list(self.row_shape), "ragged": self.is_ragged}
        return described | ({"converted_from": self.converted_from} if self.converted_from else {})

    @classmethod
    def from_json(cls, content: Any, *, is_kept: bool) -> Field:
        """The field that a manifest lists, each member checked.

        Raises:
            LookupError, TypeError or ValueError: a member is missing, of another type, or out of range.
        """
        key: Any = content["name"] if is_kept else (content["layer"], content["reducer"])
        dtype, shape, is_ragged = _DTYPES[content["dtype"]], content["row_shape"], content["ragged"]
        converted_from = content.get("converted_from")
        has_names = all(isinstance(name, str) for name in ([key] if is_kept else key))
        if not (has_names and isinstance(converted_from, str | None) and isinstance(is_ragged, bool)):
            raise TypeError("a member of another type")
        if math.prod(max(size, 1) for size in check_shape(shape)) >= 2**58:
            raise ValueError("a row of more values than 64 bits can count")
        if is_kept and is_ragged and (dtype != torch.uint8 or shape):
            raise ValueError("a ragged kept column that is not text")
        return cls(key, dtype, tuple(shape), is_ragged, converted_from)
