"""Which positions are real: the mask that a model's own call was given, fitted to a layer's activation."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from activation_extractor._streams import current_stream
from activation_extractor.errors import ArgumentError, ArgumentTypeError, MaskError
from activation_extractor.layers._modules import ModuleTree
from activation_extractor.layers._patterns import glob
from activation_extractor.layers._signatures import positions_of, signature_of
from activation_extractor.reducers._mask_fit import MaskCheck, check_form, fit, is_additive

MaskPolicy = Any
_DEFAULT = "attention_mask"
_DECODER = "decoder_attention_mask"
_AUTOMATIC = ""  # either of them, by where the layer is
# Names under which models take what they keep between decoding steps.
_CACHE_ARGUMENTS = frozenset(
    {"past_key_values", "past_key_value", "layer_past", "past", "cache_params", "cache", "mems"}
)


class BatchMask:
    """A mask that is told anew before each call of the model.

    Attributes:
        name: what it is called, for a run's fingerprint.
        now: the mask of the next call, ``(batch, seq)``.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.now: Tensor | None = None


class CallArguments:
    """What one call of the model was given, as far as masks need it.

    Nothing is bound as Python would: that costs as much as a small reduction, in every forward.

    Args:
        positions: where the model's arguments stand, see `positions_of`.
        args: positional arguments.
        kwargs: keyword arguments.
        checks: where to put what is still to be checked of masks on an accelerator; None checks it at once.
    """

    def __init__(
        self,
        positions: Mapping[str, int],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        checks: list[MaskCheck] | None = None,
    ) -> None:
        self.checks = checks
        self._positions, self._args, self._kwargs = positions, args, kwargs
        self._found: dict[str, Any] = {}
        self.fitted: dict[Any, Tensor] = {}  # masks already checked in this call, by what they were made from

    def get(self, name: str) -> Any:
        """The argument of this name, also from inside a dict of features that is itself an argument."""
        if name not in self._found:
            self._found[name] = self._find(name)
        return self._found[name]

    def has(self, name: str) -> bool:
        """Whether there is such an argument and it is not None."""
        return self.get(name) is not None

    def _find(self, name: str) -> Any:
        found = self._given(name)
        if found is not None:
            return found
        nested = (value for value in (*self._args, *self._kwargs.values()) if isinstance(value, Mapping))
        return next((value[name] for value in nested if name in value), None)

    def _given(self, name: str) -> Any:
        if name in self._kwargs:
            return self._kwargs[name]
        index = self._positions.get(name, len(self._args))
        return self._args[index] if index < len(self._args) else None

    @property
    def is_cached(self) -> bool:
        """Whether the call carries a cache of earlier positions."""
        return any(self._given(name) is not None for name in _CACHE_ARGUMENTS)


class Masks:
    """The mask policy of a capture: finds a layer's mask, checks it, and makes it fit.

    Args:
        policy: what ``mask=`` was given.
        model: the plain model, whose signature tells which masks it takes.
        is_asked: whether `find` will be called at all. Where it will not, the signature is read only if the policy
            names an argument: reading it takes longer than entering a block.

    Attributes:
        positions: where the model's arguments stand in a call.
    """

    def __init__(self, policy: MaskPolicy, model: nn.Module, *, is_asked: bool = True) -> None:
        self._policy = policy
        may_name = isinstance(policy, Mapping) or (isinstance(policy, str) and policy != _DEFAULT)
        signature = signature_of(model) if is_asked or may_name else None
        self.positions = positions_of(signature)
        self._known_sources: dict[str, str | Tensor | BatchMask | None] = {}
        self._names = frozenset(signature.parameters if signature else ())
        self._takes_any = signature is None or _takes_any(signature)
        self._by_pattern: list[tuple[re.Pattern[str], str | Tensor | None]] = []
        if isinstance(policy, Mapping):
            tree = ModuleTree(model)
            self._by_pattern = [(_matching(pattern, tree), source) for pattern, source in policy.items()]
        for source in self._sources():
            self._check_name(source)

    def has_none(self, call: CallArguments) -> bool:
        """Whether no layer has a mask in this call: `find` need not be asked."""
        if isinstance(self._policy, str):
            return self._policy == _DEFAULT and not (call.has(_DEFAULT) or call.has(_DECODER))
        return self._policy is None

    def find(self, layer: str, activation: Tensor, call: CallArguments | None) -> Tensor | None:
        """The mask for an activation ``(batch, seq, *features)``: ``(batch, seq)`` bool on its device, or None.

        Args:
            layer: the layer's plain name.
            activation: its value, sequence axis second.
            call: the model's call that is under way; None when the layer ran outside of one.

        Raises:
            MaskError: the mask does not fit; or, unless that is left to the call's `checks`, is additive or has a row
                without a real position.
        """
        if layer not in self._known_sources:
            self._known_sources[layer] = self._source(layer)
        source = self._known_sources[layer]
        if callable(self._policy):
            mask = self._policy(layer, activation, self._given(layer, call))
            return None if mask is None else fit(layer, mask, activation)
        if isinstance(source, BatchMask):
            source = source.now
        elif isinstance(source, str):
            source = self._argument(layer, source, call)
        return None if source is None else _cached(layer, source, activation, call)

    def _source(self, layer: str) -> str | Tensor | BatchMask | None:
        """Where the layer's mask comes from: an argument's name, the mask itself, or nowhere."""
        for pattern, source in self._by_pattern:
            if pattern.fullmatch(layer):
                return source
        if self._policy is None or isinstance(self._policy, Tensor | BatchMask):
            given: Tensor | BatchMask | None = self._policy
            return given
        return self._policy if isinstance(self._policy, str) and self._policy != _DEFAULT else _AUTOMATIC

    def _given(self, layer: str, call: CallArguments | None) -> Any:
        """The call's own mask as a callable policy is handed it: bool where it says yes or no, else as it is."""
        mask = None if call is None else call.get(self._default(layer, call))
        return mask != 0 if isinstance(mask, Tensor) and mask.dim() == 2 and not bool(is_additive(mask)) else mask

    def _argument(self, layer: str, name: str, call: CallArguments | None) -> Any:
        if call is None:
            raise MaskError(
                f"come from {name or _DEFAULT!r} of the model's own call",
                "a layer that ran outside of one",
                "Capture the module that is called, or say mask=None when nothing is padding.",
                layer,
            )
        if name == _AUTOMATIC:
            return call.get(self._default(layer, call))
        if name not in self._names and not call.has(name):
            advice = "Name an argument that the model is called with."
            raise MaskError(f"come from {name!r} of the model's call", "no such argument", advice, layer)
        return call.get(name)

    def _default(self, layer: str, call: CallArguments) -> str:
        """The mask of a layer when the user names none: a decoder beside an encoder has one of its own."""
        segments = layer.split(".")
        in_decoder = "decoder" in segments and "encoder" not in segments
        return _DECODER if in_decoder and (_DECODER in self._names or call.has(_DECODER)) else _DEFAULT

    def _sources(self) -> list[Any]:
        return [source for _, source in self._by_pattern] if self._by_pattern else [self._policy]

    def _check_name(self, source: Any) -> None:
        """An argument name other than the default one has to be an argument of the model, if that can be known."""
        takes_dict = self._takes_any or len(self._names) == 1  # a lone argument may be a dict of features
        if isinstance(source, str) and source != _DEFAULT and not takes_dict and source not in self._names:
            known = ", ".join(sorted(self._names))
            raise ArgumentError("mask", f"name an argument of the model ({known})", source)


def _matching(pattern: str, tree: ModuleTree) -> re.Pattern[str]:
    compiled = glob(pattern)
    if not any(map(compiled.fullmatch, tree.modules)):
        raise ArgumentError("a pattern in mask", "match a layer of the model", pattern)
    return compiled


def check_policy(mask: MaskPolicy) -> None:
    """Refuse what can be no mask policy on any model."""
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


def _takes_any(signature: inspect.Signature) -> bool:
    return any(p.kind is inspect.Parameter.VAR_KEYWORD for p in signature.parameters.values())


def _cached(layer: str, mask: Any, activation: Tensor, call: CallArguments | None) -> Tensor:
    """`fit`, done once in a call for all layers of one shape."""
    if call is None:
        return fit(layer, mask, activation)
    # What one stream has made another may not read yet: models with streams of their own get a mask for each.
    key = (id(mask), activation.shape[:2], activation.device, current_stream(activation.device))
    if key not in call.fitted:
        call.fitted[key] = fit(layer, mask, activation, is_cached=call.is_cached, checks=call.checks)
    return call.fitted[key]
