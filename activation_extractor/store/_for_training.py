"""Reading a store to train from it: data sets of rows, batches of tokens."""

from __future__ import annotations

import warnings
from abc import abstractmethod
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from activation_extractor._format._manifest import BATCHES_PER_UNIT, ROWS_PER_UNIT
from activation_extractor._format._unit_table import UnitTable
from activation_extractor.errors import ActivationNotFoundError, ArgumentError, StoreError
from activation_extractor.reducers._keys import EntryKey
from activation_extractor.store._batches import Batches
from activation_extractor.store._columns import Column
from activation_extractor.store._dataset import StoreDataset
from activation_extractor.store._make_batches import BLOCK_BYTES, BUFFER_BYTES, Asked, Options, make_batches
from activation_extractor.store._text_columns import TextColumn


class ForTraining(Mapping[EntryKey, Column]):
    """What a `Store` offers for training."""

    path: Path
    manifest: Mapping[str, Any]
    _is_partial: bool
    _units: UnitTable

    @property
    @abstractmethod
    def rows(self) -> int:
        """How many samples there are."""

    @property
    @abstractmethod
    def is_complete(self) -> bool:
        """Whether each unit of the data set is there."""

    @property
    @abstractmethod
    def keep(self) -> dict[str, Column | TextColumn]:
        """The kept columns, by name."""

    def dataset(self, *keys: Any, keep: str | Iterable[str] = ()) -> StoreDataset:
        """Rows of columns as a ``torch.utils.data.Dataset`` of tuples, for a ``DataLoader`` with any workers.

        Args:
            keys: which columns, as for ``store[key]``; all of them when none is named.
            keep: which kept columns, behind them.

        Raises:
            ActivationNotFoundError: there is no such column.
            StoreError: a column is short of rows, so that they would not belong together.

        Example:
            >>> import tempfile, torch
            >>> from torch import nn
            >>> from torch.utils.data import DataLoader
            >>> from activation_extractor import extract
            >>> model = nn.Sequential(nn.Linear(4, 8))
            >>> batches = [{"input": torch.randn(6, 4), "label": torch.arange(6)}]
            >>> store = extract(model, batches, "0", out=tempfile.mkdtemp(), keep="label", progress=False)
            >>> for x, label in DataLoader(store.dataset("0", keep="label"), batch_size=4):
            ...     print(tuple(x.shape), label.tolist())
            (4, 8) [0, 1, 2, 3]
            (2, 8) [4, 5]
        """
        return StoreDataset([*(self[key] for key in keys or self), *self._kept_columns(keep)], self.rows)

    def tokens(
        self,
        *keys: Any,
        batch_size: int,
        shuffle: bool = True,
        buffer_bytes: int = BUFFER_BYTES,
        block_bytes: int = BLOCK_BYTES,
        seed: int = 0,
        epochs: int | None = None,
        rank: int | None = None,
        world: int | None = None,
        drop_last: bool = True,
        device: torch.device | str | int | None = None,
        rows: bool = False,
        beside: Any = (),
        keep: str | Iterable[str] = (),
        statistics: bool = False,
    ) -> Batches:
        """Batches of single tokens in random order, as sparse autoencoders and probes are trained on them.

        A token is a position of a ragged row, or of a row ``(seq, features)``; a row ``(features,)`` is one token.
        Blocks of consecutive tokens are read in random order into a buffer, out of which random tokens are handed out:
        each token comes once in an epoch, and over all ranks and workers every token comes. The result is an endless
        iterator that can be resumed, and that a ``DataLoader`` takes with ``batch_size=None``; see `Batches`.

        Args:
            keys: which columns, as for ``store[key]``; all of them when none is named. Several must have one shape.
            batch_size: how many tokens a batch has.
            shuffle: whether tokens come in random order; otherwise as they lie in the store.
            buffer_bytes: the most memory of the buffer and of the batches that are made ahead, except that two batches
                and one token always have room.
            block_bytes: how much of a column is read at once. Smaller blocks mix better and are slower to read.
            seed: which order.
            epochs: after how many epochs the iterator ends; it is endless by default.
            rank: the number of this process among those that train together, from 0.
            world: how many these are. By default both are those of ``torch.distributed`` or of ``torchrun``.
            drop_last: whether an epoch leaves out what is left over for a smaller batch, which are other tokens in each
                epoch. Then all ranks and workers have equally many batches.
            device: where the batches are, which then travel from pinned memory beside the training.
            rows: whether the number of each token's row comes with it, by which ``store.ids`` has the row's id.
            beside: further columns that come token by token, such as token ids; each may have a shape of its own.
            keep: kept columns, of which each token gets what belongs to its row.
            statistics: whether mean, deviation and norm are summed up on the way; see `Batches.statistics`.

        Returns:
            An iterator of tensors ``(batch, features)``, of several keys ``(batch, keys, features)``, in the dtype on
            disk; where `rows`, `beside` or `keep` is given, of tuples that begin with that tensor. Text is a list.

        Raises:
            ActivationNotFoundError: there is no such column.
            ArgumentError: something that cannot be; fewer tokens than a batch has.
            StoreError: columns that do not belong together token by token, or a store that is not complete.

        Example:
            >>> import tempfile, torch
            >>> from torch import nn
            >>> from activation_extractor import extract
            >>> model = nn.Sequential(nn.Linear(4, 8))
            >>> store = extract(model, [torch.randn(6, 5, 4)], "0", out=tempfile.mkdtemp(), progress=False)
            >>> tokens = store.tokens("0", batch_size=10, seed=1)
            >>> next(tokens).shape, tokens.batches_per_epoch
            (torch.Size([10, 8]), 3)
            >>> state = tokens.state_dict()
            >>> again = store.tokens("0", batch_size=10, seed=1)
            >>> again.load_state_dict(state)
            >>> torch.equal(next(again), next(tokens))
            True
        """
        options = Options(batch_size, shuffle, buffer_bytes, block_bytes, seed, epochs, rank, world, drop_last, device)
        asked = Asked(
            True,
            tuple(map(self.__getitem__, keys or self)),
            rows,
            self._beside(beside),
            self._kept_columns(keep),
            statistics,
        )
        return make_batches(self._checked_data(), self.rows, asked, options)

    def batches(
        self,
        *keys: Any,
        batch_size: int,
        shuffle: bool = True,
        buffer_bytes: int = BUFFER_BYTES,
        block_bytes: int = BLOCK_BYTES,
        seed: int = 0,
        epochs: int | None = None,
        rank: int | None = None,
        world: int | None = None,
        drop_last: bool = True,
        device: torch.device | str | int | None = None,
        rows: bool = False,
        beside: Any = (),
        keep: str | Iterable[str] = (),
        statistics: bool = False,
    ) -> Batches:
        """Batches of whole rows in random order: pooled activations with their labels, as probes are trained on them.

        All arguments are those of `tokens`, with rows in place of tokens. Columns must not be ragged.

        Returns:
            An iterator of tensors ``(batch, *row_shape)``, as for `tokens`.

        Raises:
            ActivationNotFoundError, ArgumentError, StoreError: as for `tokens`; a ragged column.

        Example:
            >>> import tempfile, torch
            >>> from torch import nn
            >>> from activation_extractor import extract
            >>> model = nn.Sequential(nn.Linear(4, 8))
            >>> batches = [{"input": torch.randn(6, 4), "label": torch.arange(6)}]
            >>> store = extract(model, batches, "0", out=tempfile.mkdtemp(), keep="label", progress=False)
            >>> [label.sort().values.tolist() for _, label in store.batches("0", keep="label", batch_size=6, epochs=1)]
            [[0, 1, 2, 3, 4, 5]]
        """
        options = Options(batch_size, shuffle, buffer_bytes, block_bytes, seed, epochs, rank, world, drop_last, device)
        asked = Asked(
            False,
            tuple(map(self.__getitem__, keys or self)),
            rows,
            self._beside(beside),
            self._kept_columns(keep),
            statistics,
        )
        return make_batches(self._checked_data(), self.rows, asked, options)

    def _checked_data(self) -> str:
        """A checksum of all that the store holds; warns where that may not be all of its data set."""
        if not len(self):
            raise StoreError(self.path, "have a column", "none", "Extract something into it first.")
        is_of_data = any(self.manifest.get(name) is not None for name in (ROWS_PER_UNIT, BATCHES_PER_UNIT))
        if is_of_data and not self.is_complete and not self._is_partial:
            text = (
                f"The data set of {str(self.path)!r} has no end: extract is at work, was interrupted, or is of version "
                "0.1. Batches are made of what is there. Run extract again with the same arguments to complete it, or "
                "say open_store(..., partial=True)."
            )
            warnings.warn(text, stacklevel=3)
        return self._units.checksum

    def _beside(self, keys: Any) -> list[Column]:
        """Columns by their key, or kept columns by their name."""
        single = isinstance(keys, str) or (isinstance(keys, tuple) and keys in self)
        kept, columns = self.keep, []
        for key in [keys] if single else keys or ():
            column = kept[key] if isinstance(key, str) and key in kept and key not in self else self[key]
            if isinstance(column, TextColumn):
                raise ArgumentError("beside", "be columns of numbers", key, f"Text belongs to rows: keep={key!r}.")
            columns.append(column)
        return columns

    def _kept_columns(self, keep: str | Iterable[str]) -> list[Column | TextColumn]:
        kept = self.keep
        names = [keep] if isinstance(keep, str) else list(keep or ())
        for name in names:
            if name not in kept:
                known = ", ".join(map(repr, kept)) or "none"
                raise ActivationNotFoundError(name, f"A kept column must be one of {known}, got {name!r}.")
        return [kept[name] for name in names]
