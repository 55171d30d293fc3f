"""Rows of a data set as batches for a model, through its tokenizer or processor."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property, partial
from heapq import nlargest
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from activation_extractor.cli.inputs import Kind, Source
from activation_extractor.cli.inputs._images import open_image
from activation_extractor.errors import ArgumentError
from activation_extractor.layers._modules import unwrap
from activation_extractor.layers._signatures import signature_of
from activation_extractor.runs import length_batches
from activation_extractor.runs._length_batches import WINDOW_ROWS

IDS, ORDER, POOLING_MASK = "id", "row", "pooling_mask"  # entries of batches beside what a model is called with
_TOKENIZED_AT_ONCE = 1000
_UNLIMITED = 10**9  # a tokenizer without a limit has a `model_max_length` beyond this

Encode = Callable[[Sequence[int]], dict[str, Any]]


class Feed:
    """Batches of a data set, the same each time that they are gone through.

    `make_plan` returns the row numbers of each batch, for a `window_rows`; `encode` makes what the model is called with
    from the numbers of rows.

    Attributes:
        lengths: how many positions each row has that count; None where that is not known.
        notes: what a user should know, a sentence each.
        window_rows: rows are sorted by length within windows of so many, which have to be held until they are in order;
            set it before the first batch is asked for.
    """

    def __init__(
        self,
        source: Source,
        make_plan: Callable[[int], list[list[int]]],
        encode: Encode,
        *,
        lengths: Sequence[int] | None = None,
        notes: Sequence[str] = (),
    ) -> None:
        taken = [name for name in (IDS, ORDER, POOLING_MASK) if name in source.kept]
        if taken:
            raise ArgumentError("a kept column", "have another name than what batches hold", taken[0], "Rename it.")
        self.lengths, self.notes, self.window_rows = lengths, tuple(notes), WINDOW_ROWS
        self._source, self._rows = source, list(source)
        self._make_plan, self._encode = make_plan, encode

    @cached_property
    def _plan(self) -> list[list[int]]:
        return self._make_plan(self.window_rows)

    @cached_property
    def _is_sorted(self) -> bool:
        """Whether batches have the rows in another order than the data set."""
        return [row for batch in self._plan for row in batch] != list(range(len(self._rows)))

    @property
    def options(self) -> dict[str, Any]:
        """The arguments of `extract` that name entries of these batches."""
        ids = {"ids": IDS} if self._source.has_ids else {}
        order = {"order": ORDER} if self._is_sorted else {}
        return {**ids, **order, "keep": list(self._source.kept)}

    def __len__(self) -> int:
        return len(self._plan)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for numbers in self._plan:
            entries = self._source.entries([self._rows[row] for row in numbers])
            if self._source.has_ids:
                entries[IDS] = [self._rows[row].id for row in numbers]
            if self._is_sorted:
                entries[ORDER] = numbers
            arguments = self._encode(numbers)
            twice = sorted(entries.keys() & arguments.keys())
            if twice:
                raise ArgumentError("a kept column", "have another name than what the model is given", twice[0])
            yield {**arguments, **entries}

    def example(self) -> dict[str, Any]:
        """The two longest rows, or the first two, as what the model is called with, and their pooling mask."""
        lengths = self.lengths or [0] * len(self._rows)
        return self._encode(nlargest(2, range(len(lengths)), key=lengths.__getitem__))


def make_feed(
    source: Source,
    model: nn.Module,
    prepare: Any,
    *,
    batch_size: int | None = None,
    max_tokens: int | None = None,
    max_length: int | None = None,
    skip_special_tokens: bool = False,
) -> Feed:
    """Batches of a data set for a model.

    Text goes through a tokenizer, is cut to what the model can take, and is sorted by length within windows. Images and
    arrays keep their order. Floating point inputs are given in the model's dtype.

    `prepare` is that of `Loaded`. A batch has 32 rows at most where neither `batch_size` nor `max_tokens` is given. A
    text may have `max_length` tokens, special ones too; by default as many as the model can take. On
    `skip_special_tokens` the pooling mask leaves special tokens out.

    Raises:
        ArgumentError: the rows are not of a kind that the model can be given, or an option is not for them.
    """
    if batch_size is None and max_tokens is None:
        batch_size = 32
    make_batches = partial(length_batches, batch_size=batch_size, max_tokens=max_tokens)
    make_batches([])  # refuses wrong sizes before the model runs
    dtype = next((weight.dtype for weight in model.parameters() if weight.dtype.is_floating_point), None)
    values = [row.value for row in source]
    if source.kind == "text" and _is_tokenizer(prepare):
        texts = _Texts(values, model, prepare, max_length, skip_special_tokens)
        plan, encode = partial(make_batches, texts.lengths), partial(_cast, dtype, texts.encode)
        return Feed(source, lambda rows: plan(window_rows=rows), encode, lengths=texts.counted, notes=texts.notes)
    for name, value in (("max_tokens", max_tokens), ("max_length", max_length)):
        if value is not None:
            raise ArgumentError(name, "be left out where rows have no tokens", value, "Use batch_size=.")
    if skip_special_tokens:
        raise ArgumentError("skip_special_tokens", "be left out where rows have no tokens", True)
    encode = partial(_cast, dtype, _encoder(source.kind, values, model, prepare))
    in_order = length_batches([0] * len(values), batch_size=batch_size, window_rows=len(values))
    return Feed(source, lambda window_rows: in_order, encode)


def _is_tokenizer(prepare: Any) -> bool:
    """Whether this is a tokenizer of transformers, decided by what is used of it."""
    return hasattr(prepare, "pad") and hasattr(prepare, "model_max_length")


def _is_processor(prepare: Any) -> bool:
    """Whether this is something else of transformers that prepares inputs: images, sound."""
    return hasattr(prepare, "model_input_names") and not _is_tokenizer(prepare)


class _Texts:
    """Texts, tokenized once."""

    def __init__(
        self, values: list[str], model: nn.Module, tokenizer: Any, max_length: int | None, skip_special_tokens: bool
    ) -> None:
        if tokenizer.pad_token is None:
            if tokenizer.eos_token is None:
                raise ArgumentError("the tokenizer", "have a token for padding", None, "Set tokenizer.pad_token.")
            tokenizer.pad_token = tokenizer.eos_token  # the mask leaves it out
        self._tokenizer, self._skips = tokenizer, skip_special_tokens
        self._tokens: list[np.ndarray[Any, Any]] = []
        self._special: list[np.ndarray[Any, Any]] = []
        limit, cut = _limit(model, tokenizer, max_length), 0
        for start in range(0, len(values), _TOKENIZED_AT_ONCE):
            cut += self._add(values[start : start + _TOKENIZED_AT_ONCE], limit)
        self.lengths = [len(tokens) for tokens in self._tokens]
        self.counted = [int((~special).sum()) for special in self._special] if skip_special_tokens else self.lengths
        empty = next((row for row, count in enumerate(self.counted) if not count), None)
        if empty is not None:
            raise ArgumentError(f"row {empty}", "hold a token that counts", values[empty], "Remove that row.")
        self.notes = [f"{cut} of {len(values)} rows have more than {limit} tokens and are cut."] if cut else []

    def encode(self, numbers: Sequence[int]) -> dict[str, Any]:
        """Padded tokens of these rows, with their masks; ``(batch, seq)``."""
        rows: dict[str, list[Any]] = {"input_ids": [self._tokens[row].tolist() for row in numbers]}
        if self._skips:
            rows["special_tokens_mask"] = [self._special[row].astype(int).tolist() for row in numbers]
        padded = self._tokenizer.pad(rows, padding=True, return_tensors="pt")
        batch = {name: padded[name] for name in ("input_ids", "attention_mask")}
        if self._skips:
            batch[POOLING_MASK] = 1 - padded["special_tokens_mask"]  # where padding counts as special
        return batch

    def _add(self, texts: list[str], limit: int) -> int:
        """Tokenize some texts, and those that are too long once more, cut; returns how many these are."""
        tokens, special = self._call(texts)
        long = [index for index, row in enumerate(tokens) if len(row) > limit]
        if long:
            again = self._call([texts[index] for index in long], truncation=True, max_length=limit)
            for index, *cut in zip(long, *again, strict=True):
                tokens[index], special[index] = cut
        self._tokens += [np.array(row, dtype=np.int32) for row in tokens]
        self._special += [np.array(row, dtype=bool) for row in special]
        return len(long)

    def _call(self, texts: list[str], **options: Any) -> tuple[list[list[int]], list[list[int]]]:
        made = self._tokenizer(texts, return_special_tokens_mask=True, verbose=False, **options)
        return list(made["input_ids"]), list(made["special_tokens_mask"])


def _limit(model: nn.Module, tokenizer: Any, max_length: int | None) -> int:
    """How many tokens the model takes, or fewer where fewer are asked for."""
    limits = [tokenizer.model_max_length, getattr(getattr(model, "config", None), "max_position_embeddings", None)]
    most = min((limit for limit in limits if isinstance(limit, int) and 0 < limit < _UNLIMITED), default=_UNLIMITED)
    if max_length is not None and not 0 < max_length <= most:
        raise ArgumentError("max_length", f"be from 1 to the {most} tokens that the model takes", max_length)
    return max_length or most


def _encoder(kind: Kind, values: list[Any], model: nn.Module, prepare: Any) -> Encode:
    """What makes a batch of rows that have no tokens."""
    if kind == "text":
        if prepare is None or _is_processor(prepare):
            advice = "Let the factory return (model, tokenizer), or (model, callable)."
            raise ArgumentError("the model", "come with a tokenizer for text", type(unwrap(model)).__name__, advice)
        return lambda numbers: _checked(prepare([values[row] for row in numbers]), model)
    options: dict[str, Any] = {"return_tensors": "pt"} if _is_processor(prepare) else {}
    if kind == "image":
        if prepare is None or _is_tokenizer(prepare):
            advice = "Let the factory return (model, image processor), or (model, callable)."
            raise ArgumentError("the model", "come with an image processor", type(unwrap(model)).__name__, advice)
        return lambda numbers: _checked(prepare([_pixels(values[row]) for row in numbers], **options), model)
    if prepare is not None and not _is_tokenizer(prepare):
        if options and hasattr(prepare, "sampling_rate"):
            options |= {"padding": True, "sampling_rate": prepare.sampling_rate}
        return lambda numbers: _checked(prepare([np.array(values[row]) for row in numbers], **options), model)
    return lambda numbers: {_first_argument(model): torch.from_numpy(np.array([values[row] for row in numbers]))}


def _pixels(path: Path) -> Any:
    with open_image(path) as image:
        try:
            return image.convert("RGB")
        except (OSError, ValueError, SyntaxError) as error:
            raise ArgumentError("an image", "be whole", str(path), f"{error}. Remove or repair it.") from error


def _checked(made: Any, model: nn.Module) -> dict[str, Any]:
    """What a callable made of rows, as keyword arguments."""
    if isinstance(made, Tensor):
        return {_first_argument(model): made}
    if not isinstance(made, Mapping):
        raise ArgumentError("what the callable beside the model returns", "be a mapping or a tensor", made)
    return dict(made)


def _first_argument(model: nn.Module) -> str:
    """The name of the argument that a model takes first; what transformers calls its main input."""
    signature = signature_of(unwrap(model))
    name = getattr(model, "main_input_name", None) or next(iter(signature.parameters if signature else ()), None)
    if not isinstance(name, str):
        raise ArgumentError("the model", "take an argument", type(unwrap(model)).__name__)
    return name


def _cast(dtype: torch.dtype | None, encode: Encode, numbers: Sequence[int]) -> dict[str, Any]:
    """A batch whose floating point inputs have the model's dtype."""
    return {
        name: value.to(dtype) if isinstance(value, Tensor) and value.dtype.is_floating_point else value
        for name, value in encode(numbers).items()
    }
