"""What makes batches of texts: rows of similar length, as a tokenizer's tokens."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any

from activation_extractor._display import plural
from activation_extractor.cli._encoder import EXAMPLES, Encoder, Tally
from activation_extractor.cli._texts import Texts, TokenRow
from activation_extractor.cli.inputs import Row
from activation_extractor.errors import ActivationError, ArgumentError
from activation_extractor.runs import Window, length_batches, windows


class TokenEncoder(Encoder):
    """Tokenizes texts, and batches rows of similar length.

    A row that is too long is cut, refused on ``long="error"``, or on ``long="windows"`` several windows, each `stride`
    tokens after the one before.

    Raises:
        ArgumentError: a size is not positive.
    """

    has_tokens = True
    rows_at_once = 1024

    def __init__(
        self,
        texts: Texts,
        batch_size: int | None,
        max_tokens: int | None,
        long: str = "cut",
        stride: int | None = None,
    ) -> None:
        length_batches([], batch_size=batch_size, max_tokens=max_tokens)  # refuses wrong sizes before the model runs
        self._texts, self._batch_size, self._max_tokens, self._long = texts, batch_size, max_tokens, long
        self.makes_pooling_mask, self.has_windows, self._stride = texts.makes_pooling_mask, long == "windows", stride
        self.pads = batch_size != 1 and not texts.why_equal_lengths
        self.batch_rows = batch_size or self.rows_at_once

    def prepare(self, rows: Sequence[Row]) -> list[list[Any] | ActivationError]:
        """For each row its tokens, or why it has none."""
        try:
            tokenized = self._texts.tokenize([row.value for row in rows], [row.place for row in rows])
        except ArgumentError as error:
            if len(rows) > 1:
                return [made for row in rows for made in self.prepare([row])]
            return [error]
        return [
            self._check(row, tokens) or (self._windows(tokens) if self.has_windows else [tokens])
            for row, tokens in zip(rows, tokenized, strict=True)
        ]

    def batch(self, pieces: Sequence[TokenRow]) -> dict[str, Any]:
        """What the model is called with."""
        return self._texts.batch(pieces)

    def start_decoder(self, token: int) -> None:
        """Give the model's decoder a token to begin with, for each row."""
        self._texts.decoder_start = token

    def length(self, piece: TokenRow) -> int:
        """How many tokens a piece has, special ones too."""
        return piece.length

    def plan(self, pieces: Sequence[TokenRow]) -> list[list[int]]:
        """Which pieces are batched together: those of similar length, longest first."""
        lengths = [piece.length for piece in pieces]
        window_rows = max(1, len(lengths))
        batches = length_batches(
            lengths, batch_size=self._batch_size, max_tokens=self._max_tokens, window_rows=window_rows
        )
        if not self._texts.why_equal_lengths:
            return batches
        return [list(equal) for batch in batches for _, equal in groupby(batch, key=lengths.__getitem__)]

    def count(self, texts: Sequence[str], pieces: Sequence[Sequence[TokenRow]]) -> Tally:
        """What is seen of some rows."""
        tally = Tally(len(texts))
        for text, row_pieces in zip(texts, pieces, strict=True):
            unknown = row_pieces[0].unknown
            tally.characters += len(text)
            tally.positions += sum(map(self._counted, row_pieces))
            tally.cut += row_pieces[0].is_cut
            tally.windowed += len(row_pieces) > 1
            if unknown:
                tally.unknown += unknown
                tally.unknown_rows += 1
                tally.lost += row_pieces[0].is_lost
                if len(tally.examples) < EXAMPLES:
                    tally.examples.append(text)
        return tally

    def notes(self, tally: Tally, first: str) -> list[str]:
        """Sentences for a user; `first` is what comes before the number of rows that were counted."""
        notes, of = [], f"of {first}{plural(tally.rows, 'row')}"
        if self._texts.why_equal_lengths:
            notes.append(f"Only rows of one length share a batch: {self._texts.why_equal_lengths}.")
        if tally.windowed:
            what = f"{tally.windowed:,} {of} have more than {self._texts.limit} tokens"
            notes.append(f"{what} and are run in overlapping windows.")
        if tally.cut:
            notes.append(f"{tally.cut:,} {of} have more than {self._texts.limit} tokens and are cut.")
        if tally.unknown:
            what = f"{plural(tally.unknown, 'character')} in {tally.unknown_rows:,} {of}"
            lost = f" {plural(tally.lost, 'row')} of them hold nothing else." if tally.lost else ""
            offer = " --upper reads them in upper case." if self._texts.known_in_upper_case(tally.examples) else ""
            notes.append(f"The tokenizer does not know {what}: {self._texts.stand_in} stands for them.{lost}{offer}")
        return notes

    def _check(self, row: Row, tokens: TokenRow) -> ArgumentError | None:
        """Why a row cannot be used, if so."""
        what = f"the text of {row.place}"
        if not self._counted(tokens):
            return ArgumentError(what, "hold a token that counts", row.value, "Remove that row.")
        if tokens.is_cut and self._long == "error":
            condition = f"have at most {self._texts.limit} tokens"
            return ArgumentError(what, condition, row.value, "Shorten it, or pass --long windows or --long cut.")
        return None

    def _counted(self, tokens: TokenRow) -> int:
        return tokens.counted(skips_special_tokens=self._texts.skips_special_tokens)

    def _windows(self, tokens: TokenRow) -> list[Any]:
        """The windows of a row, each between the special tokens that the row begins and ends with."""
        length = tokens.length
        before = next((place for place, mark in enumerate(tokens.special) if not mark), length)
        after = next((place for place, mark in enumerate(reversed(tokens.special)) if not mark), 0)
        if length <= self._texts.limit:
            return [tokens]
        size = self._texts.limit - before - after
        if size < 1:
            special = f"{before + after} special ones"
            raise ArgumentError("window", "have room for a token of the text", self._texts.limit, f"It has {special}.")
        return [
            _window(tokens, window, before, after)
            for window in windows([length - before - after], size=size, stride=self._stride)
        ]


def _window(tokens: TokenRow, window: Window, before: int, after: int) -> TokenRow:
    end = tokens.length - after

    def cut(values: Any) -> Any:
        if not isinstance(values, list) or len(values) != tokens.length:
            return values  # of the row
        return values[:before] + values[before + window.start : before + window.stop] + values[end:]

    return tokens._replace(
        entries={name: cut(values) for name, values in tokens.entries.items()},
        special=cut(tokens.special),
        owned=window.owns(before=before, after=after),
        number=window.number,
        windows=window.count,
    )
