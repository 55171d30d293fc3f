"""The calls that are under way, of the model and of modules in it, as far as masks need their arguments."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from activation_extractor.layers._caches import CACHE_ARGUMENTS, filled
from activation_extractor.reducers._causal_masks import real_in_causal
from activation_extractor.reducers._mask_fit import LAST, MaskCheck

_WHOLE = (torch.int64, torch.int32)
PADDING = "key_padding_mask"  # how the names of torch's masks end, in which True is padding
_LEAST_BIAS = -1e3  # what torch adds to the scores of padding is below

# Parts of names of arguments that are no input of their own, but belong to another one, or are another stack's.
_AUXILIARY = (
    "mask",
    "bias",
    "position",
    "label",
    "past",
    "cache",
    "encoder_hidden_states",
    "memory",
    "tgt",
    "decoder_",
)
_BATCH_FIRST = ("input_ids", "inputs_embeds", "attention_mask", "pixel_values", "input_values", "input_features")
# Parts of the names of arguments whose first axis need not be the batch.
_NO_ROWS = ("mask", "bias", "position", "past", "cache")


class CallArguments:
    """The arguments of one call, of the model or of a module in it.

    Nothing is bound as Python would: that costs as much as a small reduction, in every forward.

    What is still to be checked of masks on an accelerator is added to `checks`; None checks it at once.

    Args:
        positions: where the arguments stand in a call.
        layer: the plain name of the module that is called; "" for the model.
        outer: the call in which this one is.

    Attributes:
        filled: how many positions a cache of fixed size held when the call began; None where it has no such cache.
        fitted: masks that were made to fit in this call, with what they were made from.
        found: the masks that layers may have in this call, by what decides on them.
        has_ended: whether the call is over.
    """

    def __init__(
        self,
        positions: Mapping[str, int],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        checks: list[MaskCheck] | None = None,
        *,
        layer: str = "",
        outer: CallArguments | None = None,
    ) -> None:
        self.checks, self.layer, self.outer, self.has_ended = checks, layer, outer, False
        self.fitted: dict[Any, tuple[Any, Tensor]] = {}
        self.found: dict[Any, list[Any]] = {}
        self._positions, self._args, self._kwargs = positions, args, kwargs
        self._values: dict[str, Any] = {}
        self._masks: dict[str, Any] = {}
        # Each forward comes by here, most of them without a cache.
        has_cache = not CACHE_ARGUMENTS.isdisjoint(kwargs) or (args and not CACHE_ARGUMENTS.isdisjoint(positions))
        self.filled = _filled(self.cache) if has_cache else None

    def get(self, name: str) -> Any:
        """The argument of this name, or what a dict among the arguments has under it; else None."""
        if name not in self._values:
            value = self._argument(name)
            if value is None:
                value = next((features[name] for features in self._nested if name in features), None)
            self._values[name] = value
        return self._values[name]

    def mask(self, name: str) -> Any:
        """The mask of this name, in which what is not 0 is real; torch's padding masks are turned round.

        The causal one of a model's call with a cache of fixed size is made into that of the call's own positions.
        """
        if name not in self._masks:
            mask = self.get(name)
            if self.outer is None and self.filled is not None and not (isinstance(mask, Tensor) and mask.dim() == 2):
                real = real_in_causal(mask, int(self.filled))
                mask = mask if real is None else real
            self._masks[name] = _real(mask) if name.endswith(PADDING) and isinstance(mask, Tensor) else mask
        return self._masks[name]

    @cached_property
    def _nested(self) -> list[Mapping[str, Any]]:
        return [value for value in (*self._args, *self._kwargs.values()) if isinstance(value, Mapping)]

    def may_have(self, name: str) -> bool:
        """Whether `get` may find something."""
        return name in self._kwargs or name in self._positions or bool(self._nested)

    def takes(self, name: str) -> bool:
        """Whether the module has such an argument, or was called with it."""
        return name in self._positions or self.get(name) is not None

    def has_any(self, names: frozenset[str]) -> bool:
        """Whether an argument of one of these names is given and is not None."""
        if not self._nested:
            names = (names & self._kwargs.keys()) | (names & self._positions.keys() if self._args else frozenset())
        return any(self.get(name) is not None for name in names)

    @property
    def is_cached(self) -> bool:
        """Whether the call carries a cache of earlier positions."""
        return self.cache is not None

    @cached_property
    def cache(self) -> Any:
        """What the model keeps between decoding steps; None where the call has none."""
        names = CACHE_ARGUMENTS & (self._kwargs.keys() | self._positions.keys() if self._args else self._kwargs.keys())
        return next((cache for cache in map(self._argument, names) if cache is not None), None)

    @property
    def chain(self) -> Iterator[CallArguments]:
        """This call and those in which it is, outwards."""
        call: CallArguments | None = self
        while call is not None:
            yield call
            call = call.outer

    def begins_at(self, mask: Any) -> int | None:
        """The column of a longer mask at which the positions of the call begin, where they go on from a cache.

        Negative where the last columns are theirs; None where they go on from none: a cache that the model makes in
        the call that is given the mask holds nothing yet.
        """
        calls = [*self.chain]
        given = max((index for index, call in enumerate(calls) if call._has_found(mask)), default=len(calls) - 1)
        cached = next((call for call in reversed(calls[given:]) if call.is_cached), None)
        if cached is None:
            return None
        return LAST if cached.filled is None else int(cached.filled)

    def _has_found(self, mask: Any) -> bool:
        return any(mask is found for found in self._masks.values())

    @property
    def outermost(self) -> CallArguments:
        """The outermost of the calls in which this one is; itself, if it is in none."""
        return self if self.outer is None else self.outer.outermost

    def named(self) -> Iterator[tuple[str, Tensor]]:
        """The tensors among the arguments, and in dicts among them; positional ones without a known name have "" ."""
        names = {index: name for name, index in self._positions.items()}
        arguments = [(names.get(index, ""), value) for index, value in enumerate(self._args)]
        for name, value in [*arguments, *self._kwargs.items()]:
            members = value.items() if isinstance(value, Mapping) else [(name, value)]
            if "mask" in name and isinstance(value, Mapping):  # one for each kind of attention
                members = [(name, mask) for mask in value.values()]
            yield from ((str(key), member) for key, member in members if isinstance(member, Tensor))

    @property
    def tokens(self) -> dict[int | str, Tensor]:
        """The arguments that are whole numbers, ``(batch, seq)``, by position or name."""
        arguments: list[tuple[int | str, Any]] = [*enumerate(self._args), *self._kwargs.items()]
        tensors = [named for named in arguments if type(named[1]) is Tensor and named[1].dtype in _WHOLE]
        return {key: tensor for key, tensor in tensors if tensor.dim() == 2 and not tensor.is_meta}

    def inputs(self) -> list[str]:
        """The names of what the call takes as data: a kind of input each, text as token ids being one of them."""
        named = {id(value): (name, value) for name, value in self.named()}  # one that is given twice counts once
        data = [(name, value) for name, value in named.values() if not any(part in name for part in _AUXILIARY)]
        dense = [name for name, value in data if (value.dim() >= 3 and value.is_floating_point()) or value.dim() >= 4]
        sounds = [name for name, value in data if name == "input_values" and value.dim() == 2]
        tokens = [name for name, value in data if value.dim() == 2 and value.dtype in _WHOLE]
        return tokens[:1] + sounds + dense

    def rows(self, *, may_be_second: bool = False) -> set[int]:
        """How many rows the batch may have, where the tensors agree; with `may_be_second` on either of two axes."""
        tensors = [value for name, value in self.named() if not any(part in name for part in _NO_ROWS)]
        tensors = [value for value in tensors if value.dim() > 1 and not value.is_nested]
        counts = [{value.shape[axis] for value in tensors} for axis in range(1 + may_be_second)]
        counts = [several - {1} or several for several in counts]  # one row is for all
        return {rows for several in counts for rows in several if len(several) == 1}

    @cached_property
    def batch(self) -> int | None:
        """The rows of the batch, where arguments that have the batch first whatever the model say it."""
        values = (self.get(name) for name in _BATCH_FIRST if self.may_have(name))
        counts = {value.shape[0] for value in values if isinstance(value, Tensor) and value.dim() > 1}
        return counts.pop() if len(counts) == 1 else None

    def _argument(self, name: str) -> Any:
        if name in self._kwargs:
            return self._kwargs[name]
        index = self._positions.get(name, len(self._args))
        return self._args[index] if index < len(self._args) else None


def _filled(cache: Any) -> int | Tensor | None:
    """What `filled` gives, a copy: the cache counts in place, and to read it at once makes an accelerator wait."""
    length = filled(cache)
    return length.clone() if isinstance(length, Tensor) else length


def _real(padding: Tensor) -> Tensor:
    """Which positions are real, from one of torch's padding masks: bool, or what is added to attention scores."""
    return padding > _LEAST_BIAS if padding.dtype.is_floating_point else padding == 0
