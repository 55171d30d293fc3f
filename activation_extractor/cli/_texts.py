"""Texts as the tokens that a model is called with."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from inspect import signature
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from activation_extractor._display import one_line
from activation_extractor.cli._forward_arguments import first_argument, is_taken, takes
from activation_extractor.cli._token_limits import counts_positions, token_limit
from activation_extractor.errors import ArgumentError

POOLING_MASK = "pooling_mask"  # the entry of a batch that says which positions count

_IDS, _MASK, _SPECIAL = "input_ids", "attention_mask", "special_tokens_mask"
_AFFIXES = re.compile(r"^##|</w>$|[▁Ġ\s]")  # what vocabularies add to the letters of a word
_RARE = "\U0001f9ec"  # no vocabulary has it, unless it has all bytes


Marks = list[int]


class TokenRow(NamedTuple):
    """A row of text, tokenized: what the tokenizer returned for it, a value for each token."""

    entries: dict[str, Any]
    special: Marks  # 1 for each token that is a special one, else 0
    is_cut: bool
    unknown: int  # characters that the tokenizer does not know
    is_lost: bool  # whether it knows no other
    owned: slice = slice(None)  # of a row in windows: the tokens that count in this one
    number: int = 0  # of the window in its row
    windows: int = 1  # how many the row has

    @property
    def length(self) -> int:
        return len(self.special)

    def counted(self, *, skips_special_tokens: bool) -> int:
        """How many tokens count."""
        owned = self.special[self.owned]
        return owned.count(0) if skips_special_tokens else len(owned)


class Texts:
    """Tokenizes texts for a model, cut to what it can take unless `cuts` is False, and makes batches of them.

    Whatever the tokenizer returns and the model's forward takes is in a batch.

    Attributes:
        limit: how many tokens a row may have.
        skips_special_tokens: whether only the others count.
        why_equal_lengths: why the rows of a batch must have one length; empty where they need not. Padding would change
            what the model computes.
        makes_pooling_mask: whether batches say which positions count; else the attention mask does.
        decoder_start: the token that a decoder is given, which then has one position for each row; None gives it none.

    Raises:
        ArgumentError: `max_length`, or `window` in its place, is more than the model takes.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        *,
        max_length: int | None = None,
        window: int | None = None,
        skip_special_tokens: bool = False,
        upper: bool = False,
        cuts: bool = True,
    ) -> None:
        self.limit = token_limit(model, tokenizer, window or max_length, "window" if window else "max_length")
        self._cuts = cuts
        self.skips_special_tokens, self._upper = skip_special_tokens, upper
        self._model, self._tokenizer = model, tokenizer
        if tokenizer.pad_token is None and tokenizer.eos_token is not None:
            tokenizer.pad_token = tokenizer.eos_token  # the mask leaves it out
        self.decoder_start: int | None = None
        config = getattr(model, "config", None)
        # Such a decoder is given the text, moved by one: as many positions are real.
        self._shifts = getattr(config, "is_encoder_decoder", False) and is_taken(model, "decoder_attention_mask")
        self._takes: dict[str, bool] = {}
        asked = {"return_special_tokens_mask": True, "return_attention_mask": True, "verbose": False}
        self._asked = {name: value for name, value in asked.items() if takes(signature(tokenizer), name)}
        is_masked = self._is_taken(_MASK)
        is_shifted = tokenizer.padding_side == "left" and counts_positions(model)
        reasons = {
            "the model takes no attention_mask": not is_masked,
            "the tokenizer has no token for padding": tokenizer.pad_token is None,
            "the tokenizer pads on the left, which would move the positions that the model has learned": is_shifted,
        }
        self.why_equal_lengths = next((reason for reason, is_so in reasons.items() if is_so), "")
        self.makes_pooling_mask = skip_special_tokens or not is_masked or not cuts
        names = ("bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id")
        self._unknown_id = getattr(tokenizer, "unk_token_id", None)
        self._special_ids = {getattr(tokenizer, name, None) for name in names} - {None, self._unknown_id}
        self._drops_unknown = self._unknown_id is None and self._drops(_RARE)

    def tokenize(self, texts: Sequence[str], places: Sequence[str] = ()) -> list[TokenRow]:
        """Rows of tokens; those that are longer than the limit are cut. Errors name the places of texts.

        Raises:
            ArgumentError: the tokenizer does not take a text.
        """
        if self._upper:
            texts = [text.upper() for text in texts]
        places = places or ["a row"] * len(texts)
        rows = self._call(texts, places)
        unknown = [self._find_unknown(text, *row) for text, row in zip(texts, rows, strict=True)]
        long = [index for index, (row, _) in enumerate(rows) if self._cuts and len(row[_IDS]) > self.limit]
        if long:
            longs = [[values[index] for index in long] for values in (texts, places)]
            for index, row in zip(long, self._call(*longs, truncation=True, max_length=self.limit), strict=True):
                rows[index] = row
                if len(row[0][_IDS]) > self.limit:
                    condition = f"cut {places[index]} to {self.limit} tokens"
                    raise ArgumentError("the tokenizer", condition, f"{len(row[0][_IDS])} of them", "Shorten the text.")
        are_cut = set(long)
        return [
            TokenRow(row, self._special(row, marks), index in are_cut, *unknown[index])
            for index, (row, marks) in enumerate(rows)
        ]

    def batch(self, rows: Sequence[TokenRow]) -> dict[str, Any]:
        """What the model is called with for these rows, padded; ``(batch, seq)``."""
        lists: dict[str, list[Any]] = {name: [row.entries[name] for row in rows] for name in rows[0].entries}
        lists[_SPECIAL] = [row.special for row in rows]
        pads = self._tokenizer.pad_token is not None
        padded = dict(self._tokenizer.pad(lists, padding=pads, return_attention_mask=True))
        width = len(padded[_MASK][0])
        tensors = {name: torch.tensor([self._padded(value, width) for value in padded[name]]) for name in padded}
        special = tensors.pop(_SPECIAL)
        batch = {name: value for name, value in tensors.items() if self._is_taken(name)}
        if not self._is_taken(_IDS):
            batch[first_argument(self._model)] = tensors[_IDS]
        if self.makes_pooling_mask:
            counts = tensors[_MASK].bool()
            for row, piece in enumerate(rows):
                if piece.windows > 1:
                    real = counts[row].nonzero().squeeze(1)
                    counts[row] = False
                    counts[row, real[piece.owned]] = True
            batch[POOLING_MASK] = counts & (special == 0) if self.skips_special_tokens else counts
        if self.decoder_start is not None:
            batch["decoder_input_ids"] = torch.full((len(rows), 1), self.decoder_start)
        elif self._shifts:
            batch["decoder_attention_mask"] = tensors[_MASK]
        return batch

    def known_in_upper_case(self, texts: Sequence[str]) -> bool:
        """Whether more of these texts would be known to the tokenizer in upper case."""
        if self._upper:
            return False
        now, upper = (sum(row.unknown for row in self.tokenize(some)) for some in (texts, [t.upper() for t in texts]))
        return upper < now

    @property
    def stand_in(self) -> str:
        """What stands for characters that the tokenizer does not know."""
        return "nothing" if self._unknown_id is None else repr(self._tokenizer.unk_token)

    def _call(self, texts: Sequence[str], places: Sequence[str], **options: Any) -> list[tuple[dict[str, Any], Marks]]:
        """For each text what the tokenizer returns, and its marks of special tokens."""
        try:
            made = self._tokenizer(list(texts), **self._asked, **options)
        except Exception as error:  # of every kind: each tokenizer has its own
            if len(texts) > 1:
                return [row for text in zip(texts, places, strict=True) for row in self._call(*zip(text), **options)]
            what = f"It raised {one_line(error)}."
            raise ArgumentError(
                f"the text of {places[0]}", "be one that the tokenizer takes", texts[0], what
            ) from error
        columns = {name: made[name] for name in made}
        marks = columns.pop(_SPECIAL, None) or [[0] * len(row) for row in columns[_IDS]]
        return [({name: column[row] for name, column in columns.items()}, marks[row]) for row in range(len(texts))]

    def _drops(self, text: str) -> bool:
        """Whether the tokenizer makes no token of a text, not even one for what it does not know."""
        try:
            ((row, marks),) = self._call([text], [""])
        except ArgumentError:
            return False
        return all(self._special(row, marks))

    def _special(self, row: Mapping[str, Any], marks: Marks) -> Marks:
        """Which tokens are special: those that the tokenizer added, and its BOS, EOS, CLS and SEP wherever they are."""
        return [int(mark or token in self._special_ids) for token, mark in zip(row[_IDS], marks, strict=True)]

    def _find_unknown(self, text: str, row: Mapping[str, Any], marks: Marks) -> tuple[int, bool]:
        """How many characters of a text the tokenizer does not know, and whether it knows no other.

        Those of ``[UNK]``, where the text says so, are known.
        """
        if not self._drops_unknown and self._unknown_id not in row[_IDS]:
            return 0, False
        ids = [token for token, mark in zip(row[_IDS], marks, strict=True) if not mark]
        written = text.count(self._tokenizer.unk_token) if self._unknown_id is not None else 0
        count = ids.count(self._unknown_id) - written
        if count <= 0 and not self._drops_unknown:
            return 0, False
        tokens = self._tokenizer.convert_ids_to_tokens([token for token in ids if token != self._unknown_id])
        known = sum(len(_AFFIXES.sub("", token)) for token in tokens) + written * len(self._tokenizer.unk_token or "")
        return max(count, len("".join(text.split())) - known, 0), not known

    def _padded(self, values: Any, width: int) -> Any:
        """Values for each token of a row, with zeros where its tokens are padded, which not every tokenizer adds."""
        missing = width - len(values) if isinstance(values, list) else 0
        if missing <= 0:
            return values
        zeros = [np.zeros_like(values[0]).tolist() if values else 0] * missing
        return zeros + values if self._tokenizer.padding_side == "left" else values + zeros

    def _is_taken(self, name: str) -> bool:
        if name not in self._takes:
            self._takes[name] = is_taken(self._model, name)
        return self._takes[name]
