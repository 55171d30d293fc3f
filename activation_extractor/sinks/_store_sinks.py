"""Sinks that write a store, one class for each format."""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping
from typing import Any, ClassVar, final

import torch

from activation_extractor._arguments import check_flag, check_size
from activation_extractor._creation import check_place
from activation_extractor._display import dtype_name
from activation_extractor._format._codecs import NPY, NPZ, SAFETENSORS, Codec
from activation_extractor._format._manifest import has_manifest, read_manifest, store_name
from activation_extractor._format._reader import Reader
from activation_extractor._format._shards import shard_path, unit_name
from activation_extractor.errors import ArgumentTypeError, StoreError
from activation_extractor.sinks._resume import holds_store
from activation_extractor.sinks._sinks import Sink
from activation_extractor.sinks._step import Step
from activation_extractor.sinks._store_writer import QUEUE_BYTES, StoreWriter
from activation_extractor.sinks._unit_policy import UNIT_BYTES, UnitPolicy


class StoreSink(Sink):
    """Writes a store: a folder of shards that `open_store` reads, and numpy or safetensors themselves.

    `SafetensorsSink`, `NpySink` and `NpzSink` are stores of these formats. Steps are gathered, on the CPU, into units
    of whole steps, which a thread of its own writes while the model goes on. A unit becomes a shard that appears
    complete or not at all and is never rewritten. The last unit is written when the block is left, also when that is
    by an exception. What cannot be written raises at the next step and when the block is left.

    Attributes:
        path: the folder.
        rows: how many rows were written to it.
        nbytes: how many bytes of columns they had.

    Args:
        path: a new or empty folder; made when the first step is written. A place in a bucket, ``s3://bucket/name``, is
            for `SafetensorsSink` alone.
        unit_bytes: from how many bytes on a unit is written; also from 4,096 rows on.
        rows_per_unit: write a unit from this many rows on instead.
        queue_bytes: how many bytes units may hold, those that wait to be written and the current one. The next step
            waits while there are more, but for one unit that is written while the next one is gathered.
        append: add to the store in the folder, if it is of the same model, layers and reducers.
        dtype: store floating point numbers of activations as ``torch.float16``, ``torch.bfloat16`` or
            ``torch.float32``, rounded on their device; None stores them as they were computed. A finite value that
            becomes infinite is an error. Integers, bools, complex numbers and kept columns stay as they are.

    Raises:
        StoreError: the folder is not empty, or with ``append=True`` holds something else than a store of this format.
        ArgumentError: a size that is not positive, or a dtype that is not one of these, or that the format lacks.
    """

    codec: ClassVar[Codec]
    reads_later = True

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        unit_bytes: int = UNIT_BYTES,
        rows_per_unit: int | None = None,
        queue_bytes: int = QUEUE_BYTES,
        append: bool = False,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_size("unit_bytes", unit_bytes)
        check_size("queue_bytes", queue_bytes)
        if rows_per_unit is not None:
            check_size("rows_per_unit", rows_per_unit)
        self.path = check_place("path", path)
        check_flag("append", append)
        codec = self.codec.storing(dtype)
        holds_store(self.path, may_join=append)
        self._appends = append
        self._writer = StoreWriter(self.path, codec, queue_bytes=queue_bytes, shares_store=append)
        self._policy, self._unit, self._units = UnitPolicy(unit_bytes, rows_per_unit), self._writer.new_unit(), 0
        self._new_units: list[str] = []  # whose ids are in no file of digests
        self._about: Mapping[str, Any] | None = None
        self._stored_as = {"dtype": dtype_name(dtype)} if dtype else {}  # a part of the fingerprint
        self._lock = threading.RLock()

    @property
    def rows(self) -> int:
        """How many rows were written to it."""
        return self._writer.rows

    @property
    def nbytes(self) -> int:
        """How many bytes of columns they had."""
        return self._writer.nbytes

    def begin(self, about: Mapping[str, Any]) -> None:
        """Compare what is captured with what the store holds.

        Raises:
            OtherRunError: the store that is added to holds something else.
            StoreError: two captures that differ write to this sink, or `extract` wrote the store that is added to.
        """
        about = {**about, **self._stored_as}
        with self._lock:
            if self._about is None:
                self._writer.begin(about)
                if self._appends and has_manifest(self.path):  # also one that was begun after this sink was made
                    self._resume(about)
            elif self._about != about:
                advice = "Give each capture a sink and a folder of its own."
                raise StoreError(self.path, "be written by captures of the same layers and options", "others", advice)
            self._about = about

    def write(self, step: Step) -> None:
        """Add the step to the current unit; hand the unit over to be written when it is full.

        Raises:
            StoreError: the folder cannot be made, an id was seen before, a column changed its dtype or row shape, or
                the disk refused an earlier unit.
            ArgumentError: a dtype that the format lacks.
            StoredDtypeError: a finite value is too large for the dtype that is stored.
        """
        with self._lock:
            if self._about is None:
                self.begin({})
            self._writer.add(step, self._unit)
            if self._policy.is_full(self._unit):
                self._end_unit()

    def close(self) -> None:
        """Write the current unit, if it holds anything, and wait until all units are on the disk.

        Raises:
            StoreError: the disk refused a unit.
        """
        with self._lock:
            try:
                if self._unit.rows:
                    self._end_unit()
            finally:
                self._writer.finish()
            if self._new_units and self._writer.keep_ids(self._new_units):
                self._new_units = []

    def _resume(self, about: Mapping[str, Any]) -> None:
        if read_manifest(self.path).unit_size is not None:
            advice = "Call extract again to go on with it, or choose another folder."
            raise StoreError(self.path, "be a store that with-blocks wrote", "one that extract wrote", advice)
        self._writer.resume()
        reader = Reader(self.codec, store_name(about))
        self._writer.find_ids(lambda unit: reader.ids(str(shard_path(self.path, unit, self.codec))))

    def _end_unit(self) -> None:
        unit, self._unit = self._unit, self._writer.new_unit()
        name = unit_name(self._units, self._writer.name)
        self._writer.commit(unit, name)
        self._new_units.append(name)
        self._units += 1


@final
class SafetensorsSink(StoreSink):
    """Writes a store of safetensors files; every dtype stays as it is. See `StoreSink` for the arguments.

    Example:
        >>> import tempfile, torch
        >>> from torch import nn
        >>> from activation_extractor import SafetensorsSink, capture, open_store
        >>> model, folder = nn.Sequential(nn.Linear(4, 8)), tempfile.mkdtemp()
        >>> for _ in range(2):
        ...     with capture(model, "0", sink=SafetensorsSink(folder, append=True)):
        ...         _ = model(torch.randn(3, 4))
        >>> open_store(folder)["0"].shape
        (6, 8)
    """

    codec = SAFETENSORS


@final
class NpySink(StoreSink):
    """Writes a store whose shards are folders of npy files; bfloat16 and float8 become float32, as the manifest says.

    See `StoreSink` for the arguments.
    """

    codec = NPY


@final
class NpzSink(StoreSink):
    """Writes a store of uncompressed npz files; bfloat16 and float8 become float32, as the manifest says.

    See `StoreSink` for the arguments.
    """

    codec = NPZ


def open_sink(sink: Sink | str | os.PathLike[str] | None) -> Sink | None:
    """The sink that ``sink=`` means: a `Sink` as it is, a `SafetensorsSink` for a path, None for None.

    Raises:
        ArgumentTypeError: it is neither a sink nor a path.
        StoreError: the folder at the path is not empty.
    """
    if sink is None or isinstance(sink, Sink):
        return sink
    if isinstance(sink, str | os.PathLike):
        return SafetensorsSink(sink)
    raise ArgumentTypeError("sink", "be a Sink or a folder's path", sink)
