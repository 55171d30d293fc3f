"""What a with-block hands out: a read-only mapping of what the layers computed."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from activation_extractor import _display
from activation_extractor._tensors import IN_FILE, as_plain, to_numpy
from activation_extractor.activations._copied_results import CopiedResults
from activation_extractor.activations._open_block import OpenBlock
from activation_extractor.activations._results import Results
from activation_extractor.activations._saved import saved_entry, write_saved
from activation_extractor.activations._steps import Steps
from activation_extractor.errors import ActivationNotFoundError, OverwrittenError, StepError
from activation_extractor.reducers._keys import EntryKey, entry_keys, pair_of, pairs_of, resolve_key
from activation_extractor.sinks._step import check_ids, check_keep

_HEADER = ("layer", "reducer", "shape", "dtype", "device", "note")


class Activations(Mapping[Any, Tensor]):
    """The activations of a block, by layer and reducer.

    ``acts[layer, reducer]`` always works; ``acts[layer]`` is short for the only reducer. Iteration gives names when
    there is one reducer, ``(name, reducer)`` pairs otherwise, in the order in which values came: a layer comes behind
    those inside of it, gradients come from the last layer to the first.

    A value is a tensor on the device where it was made (or on ``to=``), outside any graph unless ``detach=False``, and
    an ordinary tensor also when the model ran under ``inference_mode``. It owns its memory unless ``copy=False``;
    reading it again gives the same tensor. With ``calls="all"`` it is a list, ``list[Tensor]``, of the calls' tensors:
    a type checker, which cannot know that, takes every value for a tensor.

    The results stay after the block, until `clear`. With a sink they are those of the latest step, as copies. A copy
    (``copy``, ``pickle``) holds the values that there are when it is made, outside any graph, and records nothing.
    """

    def __init__(self, block: OpenBlock) -> None:
        self._results: Results | CopiedResults = block.results
        self._steps: Steps | None = block.steps

    def __deepcopy__(self, memo: dict[int, Any]) -> Activations:
        values = {pair: self._results.hand_out(pair) for pair in self.pairs}  # torch copies no nested tensor deeply
        copies = {
            pair: [call.clone() for call in value] if isinstance(value, list) else value.clone()
            for pair, value in values.items()
        }
        return _copied(CopiedResults(copies, self._results))

    def __reduce__(self) -> Any:
        values = {pair: self._results.hand_out(pair) for pair in self.pairs}
        return _copied, (CopiedResults(values, self._results),)

    def __getitem__(self, key: EntryKey) -> Tensor:
        """The value of a layer.

        Args:
            key: a recorded name, or the name and the reducer.

        Raises:
            ActivationNotFoundError: nothing was recorded under that name, or the key must name one of several reducers.
            OverwrittenError: it was recorded with ``copy=False`` and written to since.
        """
        pair = key if isinstance(key, tuple) and len(key) == 2 else (key, self._results.only_reducer)
        try:  # as a pair that has a value: to list all names takes longer the more there are
            value: Any = self._results.hand_out(pair)
        except (KeyError, TypeError):
            value = None
        return self._found(key) if value is None else value  # type: ignore[no-any-return]

    def __contains__(self, key: object) -> bool:
        pair = pair_of(key, self._results.reducers)
        return pair is not None and self._results.has(pair)

    def __iter__(self) -> Iterator[EntryKey]:
        keys = entry_keys(self._results.names, self._results.reducers)
        if self._results.only_reducer:
            return iter(keys)
        return (key for key in keys if isinstance(key, tuple) and self._results.has(key))

    def __len__(self) -> int:
        return len(self._results.names) if self._results.only_reducer else sum(1 for _ in self)

    def __repr__(self) -> str:
        return _display.table(*self._table(), header=_HEADER)

    def _repr_html_(self) -> str:
        return _display.html_table(*self._table(), header=_HEADER)

    @property
    def names(self) -> list[str]:
        """The recorded names, in the order in which the layers ran."""
        return self._results.names

    @property
    def reducers(self) -> list[str]:
        """The reducers' names."""
        return self._results.reducers

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """The name and reducer of each value, also where iteration gives names alone."""
        return pairs_of(self, self.reducers)

    @property
    def nbytes(self) -> int:
        """Bytes of memory that the values keep alive; memory that several of them share counts once."""
        return self._results.nbytes

    def step(self, *, ids: Any = None, keep: Any = None) -> AbstractContextManager[None]:
        """Group the forwards inside this block into one step of the sink.

        The step reaches the sink when the block ends well, and not at all when it raises. On an accelerator it is to
        end on the stream that its forwards ran on, or on one that has waited for that.

        Args:
            ids: the rows' ids, all strings or all integers.
            keep: further columns to store beside the activations, by name: tensors, arrays or lists of numbers with
                one row for each sample.

        Raises:
            StepError: there is no sink, another step is under way, or the rows differ in number.
            LayerNotRunError: a requested layer did not run in the step.
        """
        if self._steps is None:
            raise StepError("begin inside the with-block", "one of a copy of its activations", "Use the block's own.")
        return self._steps.group(check_ids(ids), check_keep(keep))

    def numpy(self) -> dict[Any, np.ndarray[Any, Any] | list[np.ndarray[Any, Any]]]:
        """The values as arrays on the CPU, by the same keys; bfloat16 and float8, which numpy lacks, as float32.

        An array shares its tensor's memory where that is possible; of a sparse tensor it is the whole.

        Raises:
            TensorKindError: a value has no plain numbers, such as a nested tensor; it says what makes some of it.
        """
        values: Any = self.items()
        arrays: dict[Any, Any] = {}
        for key, value in values:
            layer = key[0] if isinstance(key, tuple) else key
            is_list = isinstance(value, list)
            arrays[key] = [to_numpy(call, layer) for call in value] if is_list else to_numpy(value, layer)
        return arrays

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the values to one file, which appears whole or not at all and replaces one that is there.

        Args:
            path: ``.safetensors`` keeps every dtype; ``.npz`` holds bfloat16 and float8 as float32. Entries are named
                ``layer``, or ``layer:reducer`` with several reducers, and ``...#k`` for the k-th of several calls;
                ``%``, ``:``, ``#`` and path separators in layer names are percent-escaped. They stand in the file's
                metadata, under ``order``, in the order of iteration.

        Raises:
            ArgumentError: another suffix.
            StoreError: the file cannot be written.
            TensorKindError: as for `numpy`.
        """
        write_saved(Path(path), dict(self._named_tensors()))

    def clear(self) -> None:
        """Let go of the values and their memory."""
        self._results.clear()

    def _found(self, key: Any) -> Any:
        pair = resolve_key(key, self._results.names, self._results.reducers)
        if not self._results.has(pair):  # the forward failed after another reducer had given its value
            text = f"Nothing is recorded under {pair!r}: the forward failed before reducer {pair[1]!r} gave a value."
            raise ActivationNotFoundError(key, text)
        return self._results.hand_out(pair)

    def _table(self) -> tuple[str, list[tuple[str, ...]]]:
        rows = []
        for key, (name, reducer) in zip(self, self.pairs, strict=True):
            try:
                note = ", ".join(self._notes(name))
                rows += [(*row, note) for row in _display.describe(key, self[key])]
            except Exception as error:  # a value that cannot be read, which is no reason to show none
                what = "overwritten" if isinstance(error, OverwrittenError) else type(error).__name__
                rows.append((name, reducer if isinstance(key, tuple) else "", what, "", "", ""))
        try:
            nbytes = self.nbytes
        except Exception:  # of a class of tensors that answers nothing
            nbytes = 0
        return _display.total("Activations", len(rows), nbytes), rows

    def _notes(self, name: str) -> Iterator[str]:
        if (count := self._results.picked_of.get(name, 1)) > 1:
            yield f"first of {count} tensors"
        if name in self._results.parts:
            yield self._results.parts[name]

    def _named_tensors(self) -> Iterator[tuple[str, Tensor]]:
        values: Any = self.items()
        for key, value in values:
            pair = key if isinstance(key, tuple) else (key, None)
            if isinstance(value, list):
                calls = enumerate(value)
                yield from ((saved_entry(pair, call), as_plain(tensor, pair[0], IN_FILE)) for call, tensor in calls)
            else:
                yield saved_entry(pair), as_plain(value, pair[0], IN_FILE)


def _copied(results: CopiedResults) -> Activations:
    acts = Activations.__new__(Activations)
    acts._results, acts._steps = results, None
    return acts
