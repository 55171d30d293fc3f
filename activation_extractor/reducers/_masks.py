"""Which positions are real: the mask of the model's own call, or another one, fitted to a layer's activation."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from functools import cache, partial
from typing import Any

from torch import Tensor, nn

from activation_extractor._private_torch import has_forward
from activation_extractor._streams import current_stream
from activation_extractor._tensors import sequence_shape
from activation_extractor.errors import ArgumentError, MaskError
from activation_extractor.layers._modules import ModuleTree
from activation_extractor.layers._patterns import Patterns, glob
from activation_extractor.layers._selections import Target
from activation_extractor.layers._signatures import positions_of, signature_of
from activation_extractor.reducers._calls import CallArguments
from activation_extractor.reducers._given_masks import BatchMask as BatchMask
from activation_extractor.reducers._mask_fit import fit, fits, is_additive
from activation_extractor.reducers._own_masks import (
    ATTENDED,
    ATTENTION,
    DEFAULT_NAMES,
    Role,
    doubt,
    doubtful_names,
    is_encoders,
    own_masks,
    role_of,
    takes_no_mask,
)
from activation_extractor.reducers._shortening import Shortening
from activation_extractor.reducers._token_masks import TokenMask

# From a target, its activation and the call in which it runs to the masks that it may have, the likeliest first; none
# where every position is real.
Source = Callable[[Target, Tensor, "CallArguments | None"], list[Any]]


# By a layer's name: its module, and where the arguments stand in its calls.
Watched = dict[str, tuple[nn.Module, dict[str, int]]]


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
        self._is_none, self._is_default = mask is None, isinstance(mask, str) and mask == ATTENTION
        names_argument = isinstance(mask, Mapping) or (isinstance(mask, str) and not self._is_default)
        signature = signature_of(model) if is_asked or names_argument else None
        self.positions = positions_of(signature)
        self._takes_none = takes_no_mask(signature)
        self._doubtful = doubtful_names(self.positions) if self._is_default else frozenset()
        self._asked = DEFAULT_NAMES | self._doubtful
        self._is_made_anew = callable(mask)
        self._names = _names_in(mask) if is_asked else frozenset()
        self._roles: dict[str, Role] = {}
        self._shortening = Shortening(model)
        sources = mask.values() if isinstance(mask, Mapping) else [mask]
        self._leaves_tokens_out = any(isinstance(source, TokenMask) for source in sources)
        self._is_of_windows = isinstance(mask, BatchMask) and mask.is_of_windows
        if isinstance(mask, Mapping):
            self._source = _by_pattern(mask, ModuleTree(model), signature, self._default, self._without)
        elif self._is_made_anew:
            self._source = partial(_from_function, mask, self._default)
        elif isinstance(mask, TokenMask):
            self._source = partial(self._without, mask)
        else:
            self._source = self._default if self._is_default else _source(mask, signature)

    def has_none(self, call: CallArguments) -> bool:
        """Whether no layer has a mask in this call of the model, so that `for_layer` need not be called."""
        return self._is_none or (self._is_default and not call.has_any(self._asked))

    def for_layer(self, target: Target, activation: Tensor, call: CallArguments | None) -> Tensor | None:
        """The mask for an activation ``(batch, seq, *features)``: ``(batch, seq)`` bool on its device, or None.

        `call` is the call that is under way in which the layer runs, of a module of those that `watched` gives or of
        the model; None when the layer ran outside of one.

        Raises:
            MaskError: the mask does not fit, or is another part's; or, unless that is left to the call's `checks`, is
                additive or has a row without a real position.
        """
        masks = self._source(target, activation, call)
        if not masks and self._doubtful and call is not None:
            self._doubt(target.layer, activation, call.outermost)
        if not masks or masks[0] is None or (activation.is_nested and self._is_default):
            return None  # a nested tensor holds no padding
        if call is None or self._is_made_anew:
            return fit(target.layer, masks[0], activation)
        # What one stream has made another may not read yet: models with streams of their own get a mask for each.
        key = (*map(id, masks), sequence_shape(activation), activation.device, current_stream(activation.device))
        fitted = call.outermost.fitted
        if key not in fitted:
            mask = next((mask for mask in masks if fits(mask, activation)), None)
            if mask is None and (made := self._shortened(target, masks, activation, call)) is not None:
                return fit(target.layer, made, activation)  # other layers of this shape may have another one
            mask, begins_at = (mask, None) if mask is not None else self._likeliest(target, masks, activation, call)
            made = fit(target.layer, mask, activation, begins_at=begins_at, checks=call.checks)
            fitted[key] = masks, made  # while the masks live, no other tensors have their ids
        return fitted[key][1]

    def _doubt(self, layer: str, activation: Tensor, call: CallArguments) -> None:
        """Ask for the sense of a mask that the call may have; what may be none is warned of once."""
        if warning := doubt(layer, self._doubtful, activation, call):
            self._doubtful = frozenset()
            warnings.warn(warning, stacklevel=2)

    def _likeliest(
        self, target: Target, masks: list[Any], activation: Tensor, call: CallArguments
    ) -> tuple[Any, int | None]:
        """The first mask that fits, else the first one; and where the activation begins in it, if it goes on."""
        may_go_on = self._goes_on(target, call)
        begins = [call.begins_at(mask) if may_go_on else None for mask in masks]
        several = zip(masks, begins, strict=True)
        found = (each for each in several if fits(each[0], activation, begins_at=each[1]))
        return next(found, (masks[0], begins[0]))

    def _goes_on(self, target: Target, call: CallArguments) -> bool:
        """Whether a layer's positions may come after those that a cache holds: an encoder's never do."""
        return not is_encoders(self._role(target), call.outermost)

    def is_given(self, call: CallArguments) -> bool:
        """Whether a module in the model is called with what may be a mask."""
        masks = (call.get(name) for name in self._names if call.may_have(name))
        return any(isinstance(mask, Tensor) and mask.dim() == 2 for mask in masks)

    def watched(self, model: nn.Module, targets: Iterable[Target]) -> Watched:
        """The modules around layers whose calls may say which positions are real, and where their arguments stand.

        A layer that is no block of a stack counts itself.
        """
        if not self._names:
            return {}
        tree = ModuleTree(model)
        found: dict[str, tuple[nn.Module, dict[str, int]] | None] = {}
        for target in targets:
            segments = target.layer.split(".")
            role = role_of(target)
            is_own = role.is_keys or not any(segment.isdigit() for segment in segments)
            for depth in range(1, len(segments) + is_own):
                if (layer := ".".join(segments[:depth])) and layer not in found:
                    names = self._names | ATTENDED if role.projects and depth == len(segments) - 1 else self._names
                    found[layer] = _watch(tree.find(layer), names)
        return {layer: watch for layer, watch in found.items() if watch is not None}

    def _without(self, tokens: TokenMask, target: Target, activation: Tensor, call: CallArguments | None) -> list[Any]:
        """The mask of the call itself, without some tokens."""
        return tokens.masks(self._default(target, activation, call), self._role(target), target, call)

    def _role(self, target: Target) -> Role:
        role = self._roles.get(target.name)
        if role is None:
            role = self._roles[target.name] = role_of(target)
        return role

    def _shortened(self, target: Target, masks: list[Any], activation: Tensor, call: CallArguments) -> Tensor | None:
        """The first of these masks that can be shortened with the sequence as the model does before a layer."""
        if activation.is_nested or self._leaves_tokens_out or self._is_of_windows or not self._shortening.is_possible:
            return None
        if self._goes_on(target, call) and any(call.begins_at(mask) is not None for mask in masks):
            return None  # a longer mask is of earlier positions too
        for mask in masks:
            of = (one.layer for one in call.chain if any(value is mask for _, value in one.named()))
            made = self._shortening.mask(target.layer, mask, next(of, ""), sequence_shape(activation))
            if made is not None:
                return made
        return None

    def _default(self, target: Target, _: Tensor, call: CallArguments | None) -> list[Any]:
        """The mask of the call itself."""
        if call is None and self._takes_none:
            return []
        if call is None:
            raise _outside_call(target.layer, ATTENTION)
        role = self._role(target)
        if role not in call.found:
            call.found[role] = own_masks(target, role, call)
        return call.found[role]


def _watch(found: tuple[str, nn.Module] | None, names: frozenset[str]) -> tuple[nn.Module, dict[str, int]] | None:
    """A module and where its arguments stand, if it takes one of these names."""
    signature = signature_of(found[1]) if found is not None and has_forward(found[1]) else None
    if found is None or signature is None or names.isdisjoint(signature.parameters):
        return None
    return found[1], positions_of(signature)


# -- a source for each kind of mask= ----------------------------------------------------------------------------------


def _names_in(mask: Any) -> frozenset[str]:
    """The names of arguments that may hold the masks of a ``mask=``."""
    if isinstance(mask, Mapping):
        return DEFAULT_NAMES.union(*map(_names_in, mask.values()))
    if isinstance(mask, TokenMask):
        return DEFAULT_NAMES | mask.names
    if isinstance(mask, str) and mask != ATTENTION:
        return frozenset({mask})
    return DEFAULT_NAMES if isinstance(mask, str) or callable(mask) else frozenset()


def _source(mask: str | Tensor | BatchMask | None, signature: inspect.Signature | None) -> Source:
    if not isinstance(mask, str):
        return (lambda *_: [mask.now]) if isinstance(mask, BatchMask) else (lambda *_: [mask])
    parameters = signature.parameters if signature else {}
    takes_any = signature is None or any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    # A lone argument may be a dict of features.
    if mask != ATTENTION and mask not in parameters and not takes_any and len(parameters) != 1:
        raise ArgumentError("mask", f"name an argument of the model ({', '.join(sorted(parameters))})", mask)
    return partial(_argument, mask, mask in parameters)


def _by_pattern(
    masks: Mapping[str, str | Tensor | TokenMask | None],
    tree: ModuleTree,
    signature: inspect.Signature | None,
    default: Source,
    without: Callable[..., list[Any]],
) -> Source:
    """What the first pattern that a layer matches says; the default for layers that match none."""
    patterns = Patterns(masks)
    sources: list[Source] = [
        partial(without, mask) if isinstance(mask, TokenMask) else _source(mask, signature) for mask in masks.values()
    ]
    for pattern in masks:
        if pattern not in tree.modules and not any(map(glob(pattern).fullmatch, tree.modules)):
            raise ArgumentError("a pattern in mask", "match a layer of the model", pattern)

    @cache
    def source_of(layer: str) -> Source:
        place = patterns.first(layer)
        return default if place is None else sources[place]

    return lambda target, activation, call: source_of(target.layer)(target, activation, call)


def _argument(
    name: str, is_parameter: bool, target: Target, activation: Tensor, call: CallArguments | None
) -> list[Any]:
    if call is None:
        raise _outside_call(target.layer, name)
    *inside, outermost = call.chain
    mask = outermost.mask(name)
    if mask is None and not is_parameter and not any(one.takes(name) for one in inside):
        advice = "Name an argument that the model is called with."
        raise MaskError(f"come from {name!r} of the model's call", "no such argument", advice, target.layer)
    return [mask for mask in (mask, *(one.mask(name) for one in inside)) if mask is not None]


def _from_function(
    function: Callable[..., Any], default: Source, target: Target, activation: Tensor, call: CallArguments | None
) -> list[Any]:
    masks: list[Any] = []
    if call is not None:
        with suppress(MaskError):  # of another part of the model: for this one the function is asked
            masks = default(target, activation, call)
    found = (it for it in masks if fits(it, activation, begins_at=None if call is None else call.begins_at(it)))
    mask = next(found, next(iter(masks), None))
    if isinstance(mask, Tensor):
        mask = mask != 0 if mask.dim() == 2 and not bool(is_additive(mask)) else mask.clone()
    return [function(target.layer, activation.clone(), mask)]  # it may write to what it is given


def _outside_call(layer: str, name: str) -> MaskError:
    condition = f"come from {name!r} of the model's own call, or of a module's around the layer"
    advice = "Capture the module that is called, or pass the mask itself as mask=; None only if nothing is padding."
    return MaskError(condition, "a layer that ran outside of such a call", advice, layer)
