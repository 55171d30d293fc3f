"""`Columns`: columns of a batch in, activations out, for engines that map batches."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Mapping
from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor, nn

from activation_extractor._arguments import check_flag
from activation_extractor._display import dtype_name, one_line
from activation_extractor._format._stored_rows import Ragged, RowId
from activation_extractor.activations._recorded_values import Calls
from activation_extractor.errors import ActivationError, ArgumentError, ArgumentTypeError, add_note
from activation_extractor.reducers._sequence_axis import SequenceAxes
from activation_extractor.runs._column_worker import ColumnWorker, Recording, model_of
from activation_extractor.runs._factories import find_object, is_factory_name
from activation_extractor.runs._given_columns import GivenColumns, Kind, as_tensor, plain, take_apart
from activation_extractor.runs._returned_columns import put_together

ID = "id"
_KINDS = get_args(Kind)
_PROCESS = os.getpid()  # that imported this


class Columns:
    """A function from columns to activations, for Ray Data, Hugging Face `datasets`, Dask, Daft and their kin.

    It is called with a batch of rows: a dict of arrays or lists, an Arrow table, or a pandas frame. It runs the model
    on it, in ``eval()`` and without gradients, and returns columns of the same rows and kind: the ids as ``id``, the
    kept columns, and a column for each layer and reducer, called ``layer``, or ``layer:reducer`` where there are
    several reducers. Arrays are ``(rows, *shape)``; in a table they are tensors of Arrow (``fixed_shape_tensor``), in a
    frame an array a row. A ragged column has an array, or a list, a row.

    It is pickled without the model, which each worker builds on its first batch, once: also where the engine sends the
    same `Columns` with each task, or calls it from several threads, whose forwards take turns. A batch that does not
    fit into memory is halved until it does. Placement, retries and the number of workers are the engine's.

    Args:
        model: ``"package.module:factory"``, a function without arguments that returns the model, or the model and what
            `prepare` is; the function itself, if the engine can pickle it; or a model, which travels with its weights.
        layers: any selection that `capture` takes; by default the model's repeated blocks.
        reduce: what to keep of an activation, as for `capture`.
        columns: what the model, or `prepare`, is given: a column's name, whose values are the model's first argument;
            names of columns, which are keyword arguments; or a dict from arguments to columns. By default all columns
            but those of ids and `keep`.
        prepare: makes the model's arguments of the columns, as ``"package.module:function"`` or a function. It is given
            a dict: numbers of one shape are arrays, text a list of strings, rows of several shapes a list of arrays. It
            returns a mapping (keyword arguments), a tuple (positional ones) or a tensor.
        ids: the column of row ids, strings or integers; None where the engine keeps the rows beside what is returned.
        keep: columns to hand back as they came.
        pooling_mask: which of the arguments is the mask of the positions that reducers use, as for `extract`.
        weights: which of them has the weights of positions for ``reduce="weighted_mean"``, as for `extract`.
        device: move the model there.
        to: what to return, ``"numpy"`` (a dict), ``"arrow"`` or ``"pandas"``; by default what came.
        bits: hand out bfloat16 and float8, which neither numpy nor Arrow has, as unsigned integers of the same bits,
            which ``torch.from_numpy(column).view(torch.bfloat16)`` reads; by default as float32.
        mask: as for `capture`.
        sequence_axis: as for `capture`.
        calls: as for `capture`.
        stop_early: as for `capture`.

    Raises:
        ArgumentError: an argument is not usable. On the first batch: the model cannot be built. On each: a column is
            missing, or holds text or rows of several shapes where there is no `prepare`; an id is missing.

    Example:
        >>> import numpy as np
        >>> from torch import nn
        >>> from activation_extractor.runs import Columns
        >>> def build():
        ...     return nn.Sequential(nn.Linear(4, 8), nn.ReLU())
        >>> columns = Columns(build, "1", columns="x")
        >>> columns({"id": np.array(["a", "b"]), "x": np.ones((2, 4), np.float32)})["1"].shape
        (2, 8)
    """

    def __init__(
        self,
        model: str | Callable[[], Any] | nn.Module,
        layers: Any = None,
        *,
        reduce: Any = None,
        columns: str | Iterable[str] | Mapping[str, str] | None = None,
        prepare: str | Callable[[dict[str, Any]], Any] | None = None,
        ids: str | None = ID,
        keep: str | Iterable[str] = (),
        pooling_mask: str | None = None,
        weights: str | None = None,
        device: Any = None,
        to: Kind | None = None,
        bits: bool = False,
        mask: Any = "attention_mask",
        sequence_axis: SequenceAxes = None,
        calls: Calls = "last",
        stop_early: bool = False,
    ) -> None:
        _check_named("model", model, "be 'package.module:factory', a function that returns the model, or a model")
        if prepare is not None:
            _check_named("prepare", prepare, "be 'package.module:function' or a function")
        if ids is not None and not isinstance(ids, str):
            raise ArgumentTypeError("ids", "name a column, or be None", ids)
        if to is not None and to not in _KINDS:
            raise ArgumentError("to", f"be one of {', '.join(map(repr, _KINDS))}", to)
        check_flag("bits", bits)
        self._model, self._prepare, self._device = model, prepare, device
        self._ids, self._keep, self._to, self._bits = ids, _names("keep", keep), to, bits
        self._is_positional = isinstance(columns, str)
        if isinstance(columns, Mapping):
            _names("columns", columns.values())
        elif columns is not None:
            columns = {name: name for name in _names("columns", columns)}
        self._columns = columns
        how = {"mask": mask, "sequence_axis": sequence_axis, "calls": calls, "stop_early": stop_early}
        self._recording = Recording(layers, reduce, weights, pooling_mask, how)
        self._start()

    def __call__(self, batch: Any) -> Any:
        """The ids, kept columns and activations of a batch of rows, as a batch of the same kind.

        Raises:
            ArgumentError: see the class; or a column's name comes twice in what is returned.
            StepError: a layer has another number of rows than the batch.
        """
        given = take_apart(batch)
        ids: list[RowId] = list(range(given.rows)) if self._ids is None else given.ids(self._ids)
        taken = {} if self._ids is None else {ID: given.columns[self._ids]}
        for name in self._keep:
            if name in taken and name != self._ids:
                raise ArgumentError("keep", "leave the name 'id' to the ids", name, "Rename that column.")
            taken[name] = given.column("keep", name)
        if not given.rows:
            return put_together(given, self._to or given.kind, taken, self._empty, bits=self._bits)
        worker = self._loaded()
        arguments = self._arguments(given, worker.prepare)
        try:
            computed = worker.run(arguments, ids)
        except Exception as error:
            add_note(error, f"The model was called with {_described(arguments)}.")
            raise
        for name, column in computed.items():
            if name in taken:
                raise ArgumentError("keep", "have other names than the layers and 'id'", name, "Rename that column.")
            if name not in self._empty:
                self._empty[name] = _without_rows(column)
        return put_together(given, self._to or given.kind, taken, computed, bits=self._bits)

    def __getstate__(self) -> dict[str, Any]:
        """Everything but what a process holds: the model and what was seen of batches."""
        return {name: value for name, value in vars(self).items() if name not in ("_worker", "_lock", "_empty")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._start()

    def __repr__(self) -> str:
        layers = "" if self._recording.layers is None else f", {self._recording.layers!r}"
        return f"Columns({self._model if isinstance(self._model, str) else type(self._model).__name__!r}{layers})"

    def _start(self) -> None:
        self._worker: ColumnWorker | None = None
        self._empty: dict[str, Tensor | Ragged] = {}  # what was computed so far, without its rows
        self._lock = threading.Lock()

    def _loaded(self) -> ColumnWorker:
        if os.getpid() != _PROCESS:  # forked: OpenMP, whose threads are the parent's, would wait for them for ever
            torch.set_num_threads(1)
        with self._lock:
            if self._worker is None:
                model, prepare = model_of(self._model, self._device)
                if self._prepare is not None:
                    name = self._prepare
                    prepare = find_object("prepare", name) if isinstance(name, str) else name
                    if not callable(prepare):
                        raise ArgumentError("prepare", "name a function", name, f"It is a {type(prepare).__name__}.")
                is_ours = model is not self._model
                self._worker = ColumnWorker(model, prepare, self._recording, self._device, is_ours=is_ours)
            return self._worker

    def _given(self, batch: GivenColumns, has_prepare: bool) -> dict[str, Any]:
        """The columns that the model, or what prepares its arguments, is given, by the names of arguments."""
        if self._columns is None:
            others = (self._ids, *self._keep)
            columns = {name: column for name, column in batch.columns.items() if name not in others}
        else:
            columns = {name: batch.column("columns", column) for name, column in self._columns.items()}
        # Python's own floats become what torch makes of them, where nobody asks for their double precision.
        floats = np.float64 if has_prepare else np.dtype(dtype_name(torch.get_default_dtype()))
        return {name: plain(column, floats) for name, column in columns.items()}

    def _arguments(self, batch: GivenColumns, prepare: Any) -> Any:
        """What the model is called with."""
        given = self._given(batch, prepare is not None)
        if prepare is None:
            arguments = {name: as_tensor(name, column) for name, column in given.items()}
            return tuple(arguments.values()) if self._is_positional else arguments
        try:
            arguments = _tokens(prepare, given) if hasattr(prepare, "model_max_length") else prepare(given)
        except ActivationError:
            raise
        except Exception as error:
            name, advice = self._prepare or "what the factory returned", f"It raised {one_line(error)}."
            raise ArgumentError("prepare", "make the model's arguments of the columns", name, advice) from error
        if isinstance(arguments, Mapping):
            return {name: _as_argument(name, value) for name, value in arguments.items()}
        if isinstance(arguments, tuple | list):
            return tuple(
                _as_argument(f"{place} of what prepare= returned", value) for place, value in enumerate(arguments)
            )
        return arguments


def _as_argument(name: str, value: Any) -> Any:
    is_numbers = isinstance(value, np.ndarray) and value.dtype.kind in "biufc"
    return as_tensor(name, value) if is_numbers else value


def _tokens(tokenizer: Any, given: Mapping[str, Any]) -> Any:
    """What a tokenizer of transformers makes of the only column of text."""
    texts = [name for name, column in given.items() if isinstance(column, list) and isinstance(column[0], str)]
    if len(texts) != 1 or len(given) != 1:
        advice = "columns= says which one is meant."
        raise ArgumentError("the columns", "be one of text where a tokenizer prepares them", list(given), advice)
    return tokenizer(given[texts[0]], padding=True, return_tensors="pt")


def _check_named(argument: str, value: Any, condition: str) -> None:
    if not isinstance(value, str) and not callable(value):
        raise ArgumentTypeError(argument, condition, value)
    if isinstance(value, str) and not is_factory_name(value):
        raise ArgumentError(argument, condition, value)


def _names(argument: str, names: Any) -> list[str]:
    listed = [names] if isinstance(names, str) else list(names) if isinstance(names, Iterable) else [None]
    if not all(isinstance(name, str) for name in listed):
        raise ArgumentTypeError(argument, "name columns", names)
    return list(dict.fromkeys(listed))


def _described(arguments: Any) -> str:
    """Arguments of a model as an error shows them: names, dtypes and shapes."""
    if isinstance(arguments, Mapping):
        return ", ".join(f"{name}={_described(value)}" for name, value in arguments.items())
    if isinstance(arguments, tuple | list):
        return ", ".join(map(_described, arguments))
    is_tensor = isinstance(arguments, Tensor)
    return f"{dtype_name(arguments.dtype)} {tuple(arguments.shape)}" if is_tensor else type(arguments).__name__


def _without_rows(column: Tensor | Ragged) -> Tensor | Ragged:
    if isinstance(column, Ragged):
        return Ragged(column.values[:0].clone(), column.lengths[:0].clone())
    return column[:0].clone()
