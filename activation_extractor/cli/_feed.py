"""Rows of a data set as batches for a model: read, prepared, sorted and batched piece by piece."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from heapq import nlargest
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from activation_extractor._arguments import check_size
from activation_extractor.cli._encoder import Encoder, Tally
from activation_extractor.cli._sound_encoder import SoundEncoder
from activation_extractor.cli._texts import POOLING_MASK, Texts
from activation_extractor.cli._token_encoder import TokenEncoder
from activation_extractor.cli._value_encoder import is_tokenizer, value_encoder
from activation_extractor.cli.inputs import BadRows, Row, Source
from activation_extractor.errors import ArgumentError
from activation_extractor.runs._length_batches import WINDOW_ROWS

IDS, ORDER, WINDOWS = "id", "row", "window"  # entries of batches beside what a model is called with

_SAMPLE_ROWS = 1024
_SAMPLE_TOKENS, _WINDOW_TOKENS = 2**20, 2**22  # few rows may be long; characters count as tokens do


Item = TypeVar("Item")


class Prepared(NamedTuple):
    """A row, and what its encoder made of it: pieces, of which several make a batch."""

    row: Row
    pieces: list[Any]


class Feed:
    """Batches of a data set, the same each time that they are gone through; a window of its rows is held at a time.

    Attributes:
        total_rows: how many rows the source has.
        window_rows: texts are sorted by length within windows of so many; set it before the first batch is asked for.
        current: the rows of the latest batch: id (or number, where rows have none), row and piece.
    """

    def __init__(
        self, source: Source, encoder: Encoder, *, dtype: torch.dtype | None = None, bad_rows: BadRows | None = None
    ) -> None:
        taken = [name for name in (IDS, ORDER, WINDOWS, POOLING_MASK) if name in source.kept]
        if taken:
            raise ArgumentError("a kept column", "have another name than what batches hold", taken[0], "Rename it.")
        self.total_rows, self.window_rows = source.rows, WINDOW_ROWS
        self._source, self._encoder, self._dtype, self._bad_rows = source, encoder, dtype, bad_rows or BadRows()
        self.current: list[tuple[str | int, Row, Any]] = []
        self._left_out: set[str] = set()
        prepared = self._prepare(source)
        self._sample = self._take(prepared, _SAMPLE_ROWS if encoder.has_tokens else 2, _SAMPLE_TOKENS)
        self._is_sampled_whole = next(prepared, None) is None
        if not self._sample:
            advice = "The file of --skip-bad-rows says what is wrong with each of them."
            raise ArgumentError("input", "hold a row that can be run", source.name, advice)
        self._tally = self._sampled = self._counted(self._sample)

    @property
    def options(self) -> dict[str, Any]:
        """The arguments of `extract` that name entries of these batches."""
        entries = {
            "ids": IDS if self._source.has_ids else None,
            "order": ORDER if self._encoder.has_tokens and not self._encoder.has_windows else None,
            "group": WINDOWS if self._encoder.has_windows else None,
            "pooling_mask": POOLING_MASK if self._encoder.makes_pooling_mask else None,
        }
        return {name: entry for name, entry in entries.items() if entry} | {"keep": list(self._source.kept)}

    def start_decoder(self, token: int) -> None:
        """Give the model's decoder a token to begin with, for each row of text."""
        self._encoder.start_decoder(token)

    @property
    def positions(self) -> int | None:
        """How many positions all rows have that count, about; None where that is not known."""
        if not self._encoder.has_tokens:
            return None
        read = self._sampled.characters if self._is_sampled_whole else self._source.characters or 0
        return round(self._sampled.positions * read / max(1, self._sampled.characters))

    @property
    def notes(self) -> list[str]:
        """What a user should know of the rows before they are run, a sentence each; of the first ones if many."""
        first = "" if self._is_sampled_whole else "the first "
        return self._encoder.notes(self._sampled, first)

    @property
    def last_notes(self) -> list[str]:
        """What a user should know once all rows were run, where `notes` was not about all of them."""
        return [] if self._is_sampled_whole else self._encoder.notes(self._tally, "")

    def __iter__(self) -> Iterator[dict[str, Any]]:
        self._tally, place = Tally(), 0
        prepared = self._prepare(self._source)
        window_rows = self.window_rows if self._encoder.has_tokens else self._encoder.batch_rows
        while window := self._take(prepared, window_rows, _WINDOW_TOKENS):
            self._tally.add(self._counted(window))
            pieces = [(place + number, piece) for number, row in enumerate(window) for piece in row.pieces]
            for numbers in self._encoder.plan([piece for _, piece in pieces]):
                places = [pieces[number][0] for number in numbers]
                rows = [window[row - place].row for row in places]
                yield self._batch(rows, places, [pieces[number][1] for number in numbers])
            place += len(window)

    def example(self) -> dict[str, Any]:
        """The two longest rows that are known, or the first two, as what the model is called with."""
        return self.batch_of(nlargest(2, self._known(), key=self._encoder.length))

    @property
    def lengths(self) -> tuple[int, int]:
        """The tokens of the shortest and of the longest row that is known; 0 where rows have none."""
        lengths = [self._encoder.length(piece) for piece in self._known()]
        return min(lengths), max(lengths)

    @property
    def pads(self) -> bool:
        """Whether rows of several lengths are in a batch."""
        return self._encoder.pads

    def extremes(self) -> tuple[Any, Any]:
        """The pieces of the shortest and of the longest row that is known."""
        pieces = self._known()
        return min(pieces, key=self._encoder.length), max(pieces, key=self._encoder.length)

    def batch_of(self, pieces: Sequence[Any]) -> dict[str, Any]:
        """Pieces as what the model is called with."""
        return self._cast(self._encoder.batch(pieces))

    def leave_out(self, place: str) -> None:
        """Leave a row out of batches from now on."""
        self._left_out.add(place)

    def _known(self) -> list[Any]:
        """The pieces of the first rows and, of texts, of the longest ones."""
        longest = list(self._prepare(self._source.longest)) if self._encoder.has_tokens else []
        rows = {prepared.row.place: prepared for prepared in [*longest, *self._sample]}
        return [piece for prepared in rows.values() for piece in prepared.pieces]

    def _prepare(self, rows: Iterable[Row]) -> Iterator[Prepared]:
        """The rows that the encoder takes; others are reported."""
        rows = iter(rows)
        while some := take(rows, self._encoder.rows_at_once, _size, _WINDOW_TOKENS):
            for row, made in zip(some, self._encoder.prepare(some), strict=True):
                if row.place in self._left_out:
                    continue
                if isinstance(made, Exception):
                    self._bad_rows.report(row.place, row.id, made)
                else:
                    yield Prepared(row, made)

    def _batch(self, rows: list[Row], places: list[int], pieces: list[Any]) -> dict[str, Any]:
        entries = self._source.entries(rows)
        if self._source.has_ids:
            entries[IDS] = [row.id for row in rows]
        if self._encoder.has_windows:
            numbered = zip(places, pieces, strict=True)
            entries[WINDOWS] = [(place, piece.number, piece.windows) for place, piece in numbered]
        elif self._encoder.has_tokens:
            entries[ORDER] = places
        self.current = list(zip(entries.get(IDS, places), rows, pieces, strict=True))
        arguments = self._cast(self._encoder.batch(pieces))
        twice = sorted(entries.keys() & arguments.keys())
        if twice:
            raise ArgumentError("a kept column", "have another name than what the model is given", twice[0])
        return {**arguments, **entries}

    def _cast(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """Arguments whose floating point tensors have the model's dtype."""
        return {
            name: value.to(self._dtype) if isinstance(value, Tensor) and value.dtype.is_floating_point else value
            for name, value in arguments.items()
        }

    def _counted(self, prepared: list[Prepared]) -> Tally:
        return self._encoder.count([row.value for row, _ in prepared], [pieces for _, pieces in prepared])

    def _take(self, prepared: Iterator[Prepared], rows: int, tokens: int) -> list[Prepared]:
        return take(prepared, rows, lambda row: sum(map(self._encoder.length, row.pieces)), tokens)


def take(items: Iterator[Item], most: int, size: Callable[[Item], int], most_size: int) -> list[Item]:
    """The next items: so many, or fewer once their sizes come to `most_size`."""
    taken, total = list[Item](), 0
    for item in items:
        taken.append(item)
        total += size(item)
        if len(taken) == most or total >= most_size:
            break
    return taken


def _size(row: Row) -> int:
    return len(row.value) if isinstance(row.value, str) else 0


def make_feed(
    source: Source,
    model: nn.Module,
    prepare: Any,
    *,
    batch_size: int | None = None,
    max_tokens: int | None = None,
    max_length: int | None = None,
    skip_special_tokens: bool = False,
    upper: bool = False,
    long: str = "cut",
    window: int | None = None,
    stride: int | None = None,
    bad_rows: BadRows | None = None,
) -> Feed:
    """Batches of a data set for a model.

    Text goes through a tokenizer, is cut to what the model can take, and is sorted by length within windows. Images and
    arrays keep their order. Floating point inputs are given in the model's dtype.

    `prepare` is that of `Loaded`. A batch has 32 rows at most where neither `batch_size` nor `max_tokens` is given. A
    text may have `max_length` tokens, special ones too; by default as many as the model can take. On
    `skip_special_tokens` the pooling mask leaves special tokens out; on `upper` text is read in upper case. A text that
    is too long is cut, on ``long="error"`` reported, on ``long="windows"`` run in overlapping windows of `window`
    tokens, special ones too, each of which begins `stride` tokens after the one before.

    Raises:
        ArgumentError: the rows are not of a kind that the model can be given, or an option is not for them; or one of
            the first rows, or of the longest, cannot be used.
    """
    for_tokens = {
        "max_tokens": max_tokens,
        "max_length": max_length,
        "skip_special_tokens": skip_special_tokens or None,
        "upper": upper or None,
        "long": None if long == "cut" else long,
        "window": window,
        "stride": stride,
    }
    if long != "windows" and (window or stride):
        name = "window" if window else "stride"
        raise ArgumentError(name, "be left out without --long windows", window or stride)
    if window is not None and max_length is not None:
        raise ArgumentError("max_length", "be left out with --window", max_length)
    if batch_size is None and max_tokens is None:
        batch_size = 32
    encoder: Encoder
    if source.kind == "text" and is_tokenizer(prepare):
        texts = Texts(
            model,
            prepare,
            max_length=max_length,
            window=window,
            skip_special_tokens=skip_special_tokens,
            upper=upper,
            cuts=long != "windows",
        )
        encoder = TokenEncoder(texts, batch_size, max_tokens, long, stride)
    else:
        for name, value in for_tokens.items():
            if value is not None:
                advice = "Use batch_size=." if name == "max_tokens" else ""
                raise ArgumentError(name, "be left out where rows have no tokens", value, advice)
        check_size("batch_size", batch_size)
        make = partial(value_encoder, source.kind) if source.kind != "audio" else SoundEncoder
        encoder = make(model, prepare, batch_size or 1)
    dtype = next((weight.dtype for weight in model.parameters() if weight.dtype.is_floating_point), None)
    return Feed(source, encoder, dtype=dtype, bad_rows=bad_rows)
