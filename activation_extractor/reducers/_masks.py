"""Which positions are real: the mask of the model's own call, or another one, fitted to a layer's activation."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

from torch import Tensor, nn

from activation_extractor._streams import current_stream
from activation_extractor.errors import ArgumentError, ArgumentTypeError, MaskError
from activation_extractor.layers._modules import ModuleTree
from activation_extractor.layers._patterns import glob
from activation_extractor.layers._signatures import positions_of, signature_of
from activation_extractor.reducers._mask_fit import MaskCheck, check_form, fit, is_additive

_DEFAULT = "attention_mask"
_DECODER = "decoder_attention_mask"
# Names under which models take what they keep between decoding steps.
_CACHE_ARGUMENTS = frozenset(
    {"past_key_values", "past_key_value", "layer_past", "past", "cache_params", "cache", "mems"}
)

# From a layer, its activation and the model's call to the layer's mask as it came; None where every position is real.
Source = Callable[[str, Tensor, "CallArguments | None"], Any]


def check_mask(mask: Any) -> None:
    """Refuse a ``mask=`` that no model could have.

    Raises:
        ArgumentTypeError: it is of another kind than ``mask=`` takes.
        MaskError: it is a tensor, but no mask ``(batch, seq)`` of zeros and ones.
    """
    if isinstance(mask, Mapping):
        for pattern, source in mask.items():
            if not isinstance(pattern, str) or not (source is None or isinstance(source, str | Tensor)):
                advice = "Write it as {'decoder.**': 'decoder_attention_mask'}."
                condition = "map layer patterns to argument names, tensors or None"
                raise ArgumentTypeError("mask", condition, {pattern: source}, advice)
    elif isinstance(mask, Tensor):
        check_form(mask)
    elif not (mask is None or isinstance(mask, str | BatchMask) or callable(mask)):
        condition = "be an argument's name, a tensor, a dict, a callable (layer, activation, mask) -> mask, or None"
        raise ArgumentTypeError("mask", condition, mask)


class Masks:
    """Where the masks of one capture come from.

    Args:
        mask: a ``mask=`` that `check_mask` accepts.
        model: the plain model, whose signature says which masks it takes.
        is_asked: whether `for_layer` will be called. If not, the signature is read only where `mask` names an argument:
            reading it takes longer than entering a block.

    Attributes:
        positions: where the model's arguments stand in a call.

    Raises:
        ArgumentError: a pattern matches no layer, or the model has no argument of that name.
    """

    def __init__(self, mask: Any, model: nn.Module, *, is_asked: bool = True) -> None:
        self._is_none, self._is_default = mask is None, isinstance(mask, str) and mask == _DEFAULT
        names_argument = isinstance(mask, Mapping) or (isinstance(mask, str) and not self._is_default)
        signature = signature_of(model) if is_asked or names_argument else None
        self.positions = positions_of(signature)
        default = partial(_attention_mask, signature is not None and _DECODER in signature.parameters)
        self._is_made_anew = callable(mask)
        if isinstance(mask, Mapping):
            self._source = _by_pattern(mask, ModuleTree(model), signature, default)
        elif self._is_made_anew:
            self._source = partial(_from_function, mask, default)
        else:
            self._source = default if self._is_default else _source(mask, signature)

    def has_none(self, call: CallArguments) -> bool:
        """Whether no layer has a mask in this call, so that `for_layer` need not be called."""
        return self._is_none or (self._is_default and call.get(_DEFAULT) is None and call.get(_DECODER) is None)

    def for_layer(self, layer: str, activation: Tensor, call: CallArguments | None) -> Tensor | None:
        """The mask for an activation ``(batch, seq, *features)``: ``(batch, seq)`` bool on its device, or None.

        `call` is the model's call that is under way; None when the layer ran outside of one.

        Raises:
            MaskError: the mask does not fit; or, unless that is left to the call's `checks`, is additive or has a row
                without a real position.
        """
        mask = self._source(layer, activation, call)
        if mask is None:
            return None
        if call is None or self._is_made_anew:
            return fit(layer, mask, activation)
        # What one stream has made another may not read yet: models with streams of their own get a mask for each.
        key = (id(mask), activation.shape[:2], activation.device, current_stream(activation.device))
        if key not in call.fitted:
            call.fitted[key] = fit(layer, mask, activation, is_cached=call.is_cached, checks=call.checks)
        return call.fitted[key]


@dataclass(eq=False)
class BatchMask:
    """A mask set anew before each call: `name` is for fingerprints, `now`, ``(batch, seq)``, for the next call."""

    name: str
    now: Tensor | None = None


class CallArguments:
    """The arguments of one call of the model, as far as masks need them.

    Nothing is bound as Python would: that costs as much as a small reduction, in every forward.

    What is still to be checked of masks on an accelerator is added to `checks`; None checks it at once.

    Attributes:
        fitted: masks that were made to fit in this call, by what they were made from.
    """

    def __init__(
        self,
        positions: Mapping[str, int],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        checks: list[MaskCheck] | None = None,
    ) -> None:
        self.checks = checks
        self.fitted: dict[Any, Tensor] = {}
        self._positions, self._args, self._kwargs = positions, args, kwargs
        self._values: dict[str, Any] = {}

    def get(self, name: str) -> Any:
        """The argument of this name, or what a dict among the arguments has under it; else None."""
        if name not in self._values:
            value = self._argument(name)
            if value is None:
                nested = (value for value in (*self._args, *self._kwargs.values()) if isinstance(value, Mapping))
                value = next((features[name] for features in nested if name in features), None)
            self._values[name] = value
        return self._values[name]

    @property
    def is_cached(self) -> bool:
        """Whether the call carries a cache of earlier positions."""
        return any(self._argument(name) is not None for name in _CACHE_ARGUMENTS)

    def _argument(self, name: str) -> Any:
        if name in self._kwargs:
            return self._kwargs[name]
        index = self._positions.get(name, len(self._args))
        return self._args[index] if index < len(self._args) else None


# -- a source for each kind of mask= ----------------------------------------------------------------------------------


def _source(mask: str | Tensor | BatchMask | None, signature: inspect.Signature | None) -> Source:
    if not isinstance(mask, str):
        return (lambda *_: mask.now) if isinstance(mask, BatchMask) else (lambda *_: mask)
    parameters = signature.parameters if signature else {}
    takes_any = signature is None or any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    # A lone argument may be a dict of features.
    if mask != _DEFAULT and mask not in parameters and not takes_any and len(parameters) != 1:
        raise ArgumentError("mask", f"name an argument of the model ({', '.join(sorted(parameters))})", mask)
    return partial(_argument, mask, mask in parameters)


def _by_pattern(
    masks: Mapping[str, str | Tensor | None], tree: ModuleTree, signature: inspect.Signature | None, default: Source
) -> Source:
    """What the first pattern that a layer matches says; the default for layers that match none."""
    by_pattern = [(pattern, glob(pattern), _source(mask, signature)) for pattern, mask in masks.items()]
    for pattern, regex, _ in by_pattern:
        if not any(map(regex.fullmatch, tree.modules)):
            raise ArgumentError("a pattern in mask", "match a layer of the model", pattern)

    @cache
    def source_of(layer: str) -> Source:
        return next((source for _, regex, source in by_pattern if regex.fullmatch(layer)), default)

    return lambda layer, activation, call: source_of(layer)(layer, activation, call)


def _attention_mask(has_decoder_mask: bool, layer: str, activation: Tensor, call: CallArguments | None) -> Any:
    """The default: the model's attention mask; a decoder beside an encoder has one of its own."""
    if call is None:
        raise _outside_call(layer, _DEFAULT)
    segments = layer.split(".")
    in_decoder = "decoder" in segments and "encoder" not in segments
    return call.get(_DECODER if in_decoder and (has_decoder_mask or call.get(_DECODER) is not None) else _DEFAULT)


def _argument(name: str, is_parameter: bool, layer: str, activation: Tensor, call: CallArguments | None) -> Any:
    if call is None:
        raise _outside_call(layer, name)
    mask = call.get(name)
    if mask is None and not is_parameter:
        advice = "Name an argument that the model is called with."
        raise MaskError(f"come from {name!r} of the model's call", "no such argument", advice, layer)
    return mask


def _from_function(
    function: Callable[..., Any], default: Source, layer: str, activation: Tensor, call: CallArguments | None
) -> Any:
    mask = None if call is None else default(layer, activation, call)
    if isinstance(mask, Tensor):
        mask = mask != 0 if mask.dim() == 2 and not bool(is_additive(mask)) else mask.clone()
    return function(layer, activation.clone(), mask)  # it may write to what it is given


def _outside_call(layer: str, name: str) -> MaskError:
    condition, got = f"come from {name!r} of the model's own call", "a layer that ran outside of such a call"
    advice = "Capture the module that is called, or pass mask=None when nothing is padding."
    return MaskError(condition, got, advice, layer)
