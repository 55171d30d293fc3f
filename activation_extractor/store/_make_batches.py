"""From the arguments of `Store.tokens` and `Store.batches` to the iterator: what is read, and in which order."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import distributed

from activation_extractor._arguments import check_flag, check_size
from activation_extractor.errors import ArgumentError, StoreError
from activation_extractor.store._batches import Batches, Plan
from activation_extractor.store._columns import Column
from activation_extractor.store._text_columns import TextColumn
from activation_extractor.store._token_buffer import buffered_tokens
from activation_extractor.store._token_order import MOST_BUFFERED
from activation_extractor.store._token_units import Field, RowField, Source, StackedField, Units, scan

BUFFER_BYTES = 256 * 2**20
BLOCK_BYTES = 64 * 2**10
_AT_ONCE_BYTES = 2**18  # what is read before it is put into the buffer: it stays in a processor's cache
_REMOTE_BYTES = 2**21  # the same in a bucket: many requests at a time
_AHEAD_BYTES = 8 * 2**20  # of batches that are made ahead, where one is less
_LEAST_AHEAD, _MOST_AHEAD = 1, 64


@dataclass(frozen=True)
class Asked:
    """What a batch is made of: tokens (or rows) of columns, and what comes beside them."""

    are_tokens: bool
    columns: Sequence[Column]
    rows: bool
    beside: Sequence[Column]
    keep: Sequence[Column | TextColumn]
    statistics: bool


@dataclass(frozen=True)
class Options:
    """The arguments about order and size; see `Store.tokens`."""

    batch_size: int
    shuffle: bool
    buffer_bytes: int
    block_bytes: int
    seed: int
    epochs: int | None
    rank: int | None
    world: int | None
    drop_last: bool
    device: torch.device | str | int | None

    def check(self) -> None:
        """Refuse what cannot be."""
        for name in ("batch_size", "buffer_bytes", "block_bytes"):
            check_size(name, getattr(self, name))
        for name in ("shuffle", "drop_last"):
            check_flag(name, getattr(self, name))
        if self.epochs is not None:
            check_size("epochs", self.epochs)
        if not isinstance(self.seed, int) or isinstance(self.seed, bool):
            raise ArgumentError("seed", "be an integer", self.seed)

    def place(self) -> torch.device | None:
        """The device of the batches; None for the CPU."""
        try:
            return None if self.device is None else torch.device(self.device)
        except (RuntimeError, TypeError) as error:
            raise ArgumentError("device", "be a device that torch knows", self.device) from error

    def share(self) -> tuple[int, int]:
        """The rank and the number of ranks: as given, or what ``torch.distributed`` or ``torchrun`` says."""
        rank, world = self.rank, self.world
        if rank is None and world is None:
            if distributed.is_available() and distributed.is_initialized():
                return distributed.get_rank(), distributed.get_world_size()
            said = [os.environ.get(name, "") for name in ("RANK", "WORLD_SIZE")]
            rank, world = map(int, said) if all(map(str.isdecimal, said)) else (0, 1)
        check_size("world", world)
        if not isinstance(rank, int) or isinstance(rank, bool) or not 0 <= rank < (world or 1):
            raise ArgumentError("rank", f"be a number from 0 to {(world or 1) - 1}, below world", rank)
        return rank, world or 1


def make_batches(data: str, rows: int, asked: Asked, options: Options) -> Batches:
    """The iterator over a store of so many rows; `data` is a checksum of all that it holds."""
    options.check()
    for name in ("rows", "statistics"):
        check_flag(name, getattr(asked, name))
    units, fields = _fields(asked, rows)
    (rank, world), tokens = options.share(), len(units)
    if tokens // world < options.batch_size and (options.drop_last or not tokens):
        condition = f"be at most the number of tokens of each of {world} ranks, {tokens // world}"
        raise ArgumentError("batch_size", condition, options.batch_size, "Or pass drop_last=False.")
    nbytes = sum(field.nbytes for field in fields)
    batch_bytes = nbytes * options.batch_size
    ahead = min(max(_LEAST_AHEAD, _AHEAD_BYTES // batch_bytes), _MOST_AHEAD)
    room = max(options.buffer_bytes - (ahead + 2) * batch_bytes, options.buffer_bytes // 2)
    buffered = min(buffered_tokens(room, nbytes), MOST_BUFFERED)
    block = max(1, options.block_bytes // units.nbytes)
    at_once = min(_REMOTE_BYTES, max(options.buffer_bytes // 8, _AT_ONCE_BYTES)) if units.is_remote else _AT_ONCE_BYTES
    source = Source(fields, min(block * max(1, at_once // (block * nbytes)), buffered))
    plan = Plan(
        keys=tuple(str(column.name) for column in asked.columns),
        tokens=tokens,
        batch_size=options.batch_size,
        shuffle=options.shuffle,
        seed=options.seed,
        block=block,
        most_buffered=buffered,
        drop_last=options.drop_last,
        world=world,
        data=data,
        rank=rank,
        epochs=options.epochs,
        ahead=ahead,
        device=options.place(),
    )
    return Batches(source, plan, has_statistics=asked.statistics, first_feature_axis=1 + (len(asked.columns) > 1))


def _fields(asked: Asked, rows: int) -> tuple[Units, list[Field]]:
    """The units of the first column, and all that is read for each of them."""
    first, *others = asked.columns
    units = Units(first, are_tokens=asked.are_tokens)
    stacked, beside = (
        [Units(column, asked.are_tokens, units) for column in columns] for columns in (others, asked.beside)
    )
    scan([units, *stacked, *beside], rows)
    for other in stacked:
        if (other.shape, other.column.dtype) != (units.shape, first.dtype):
            advice = f"Ask for it with beside={other.column.name!r}, which makes it a tensor of its own."
            got = f"{other.shape} {other.column.dtype}"
            raise StoreError(repr(other.column), f"be {units.shape} {first.dtype} like the first column", got, advice)
    for column in asked.keep:
        if len(column) != rows:
            advice = "Leave it out, or extract into a store of its own."
            raise StoreError(repr(column), f"have all {rows} rows of its store", f"{len(column)}", advice)
    by_row: list[Column | TextColumn | None] = [*([None] if asked.rows else []), *asked.keep]
    fields = [RowField(units, column) for column in by_row]
    alone = [StackedField([other]) for other in beside]
    return units, [StackedField([units, *stacked]), *fields[: asked.rows], *alone, *fields[asked.rows :]]
