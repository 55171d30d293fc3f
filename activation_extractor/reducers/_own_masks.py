"""The mask that a layer has by default: that of the call in which it runs, which says whose positions it is about.

A model's call tells its masks by their names. In a model with one kind of input a mask of the model's own call is for
all layers, except that decoders, and the keys and values of cross-attention, have one of their own. In a model with
several kinds of input it is only for layers in modules that are called with it.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from activation_extractor._tensors import sequence_shape
from activation_extractor.errors import MaskError
from activation_extractor.layers._selections import Target
from activation_extractor.reducers._calls import PADDING, CallArguments
from activation_extractor.reducers._mask_fit import fits, is_additive

ATTENTION = "attention_mask"
_DECODER, _ENCODER = "decoder_attention_mask", "encoder_attention_mask"
_SOURCE, _TARGET, _MEMORY = "src_key_padding_mask", "tgt_key_padding_mask", "memory_key_padding_mask"
_KEYS = "key_padding_mask"
DEFAULT_NAMES = frozenset({ATTENTION, _DECODER, _ENCODER, _SOURCE, _TARGET, _MEMORY, _KEYS})

_ENCODER_WORDS = ("encoder", "enc", "src", "source")
_SIDE = re.compile(r"(?:^|_)(encoder|enc|src|source|decoder|dec|tgt|target)(?:$|_)")
_CROSS = re.compile(r"cross|enc_?dec|encoder_decoder|(encoder|enc|src|memory|context)_att(n|ention)|(^|\.)attn2(\.|$)")
_KEY_OR_VALUE = re.compile(
    r"((w|to|c|in|linear|fc)_?)?(k|v|kv|keys?|values?|key_value)(_?(proj|projection|lin|linear))?|c_attn"
)
# Arguments under which cross-attention is given the states of an encoder.
_ENCODED = frozenset({"key_value_states", "encoder_hidden_states", "memory", "context"})
ATTENDED = _ENCODED | {"key"}
# Names of masks of padding whose sense is not known, and of what may be one or hide positions from the model.
_OF_PADDING = re.compile(r"(^|_)pad(ding)?_masks?$")
_OF_SOMETHING = re.compile(r"((inputs?|tokens?|valid|seq|sequence)_)?masks?")
# Masks that belong to what a module attends to, and not to its own positions.
_OTHERS = ("inputs_", "encoder_", "memory_", "cross_", "head_")


class Role(NamedTuple):
    """What decides which masks a layer may have in a call: layers of one role have the same.

    Attributes:
        is_encoded: whether its positions are those of an encoder that is attended to, as of keys and values.
        projects: whether it is the keys or values that its parent computes, of itself or of an encoder.
        is_keys: whether they are those of the keys of an attention module's own call.
        is_encoders: whether it is the encoder's part of what a model returns.
        sides: the segments of its name that say encoder or decoder, with their numbers.
    """

    is_encoded: bool
    projects: bool
    is_keys: bool
    is_encoders: bool
    sides: tuple[tuple[int, str], ...]


def role_of(target: Target) -> Role:
    """The role of what is recorded of a layer."""
    segments, select = target.layer.split("."), target.select
    projects = bool(_KEY_OR_VALUE.fullmatch(segments[-1].lower()))
    is_cross = projects and bool(_CROSS.search(".".join(segments[:-1]).lower()))
    is_input = target.side == "input"
    is_keys = is_input and isinstance(target.module, nn.MultiheadAttention) and select in ("key", "value", 1, 2)
    is_encoded = is_cross or (is_input and isinstance(select, str) and select in _ENCODED)
    is_encoders = isinstance(select, str) and select.startswith("encoder_")
    sides = [(index, side[1]) for index, segment in enumerate(segments) if (side := _SIDE.search(segment.lower()))]
    return Role(is_encoded, projects, is_keys, is_encoders, tuple(sides))


def is_encoders(role: Role, call: CallArguments) -> bool:
    """Whether a layer has the positions of an encoder, which never go on from a cache, in the model's call."""
    side = next((side for _, side in role.sides), None)
    return role.is_encoded or role.is_encoders or (side in _ENCODER_WORDS and call.takes(_DECODER))


def takes_no_mask(signature: inspect.Signature | None) -> bool:
    """Whether a model is known to be given no masks: a lone argument may be a dict that has one."""
    parameters = {} if signature is None else signature.parameters
    is_open = any(
        parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL) for parameter in parameters.values()
    )
    return len(parameters) > 1 and not is_open and not any("mask" in name for name in parameters)


def doubtful_names(names: Iterable[str]) -> frozenset[str]:
    """Those of a model's arguments that may say what is padding, in a sense that is not known."""
    found = {name for name in names if _OF_PADDING.search(name) or _OF_SOMETHING.fullmatch(name)}
    return frozenset(found - DEFAULT_NAMES)


def doubt(layer: str, names: frozenset[str], activation: Tensor, call: CallArguments) -> str | None:
    """What to warn of where a layer has no mask, but the call has an argument that may be one.

    Raises:
        MaskError: its name says that it is about padding.
    """
    for name in sorted(names):
        mask = call.get(name)
        if not isinstance(mask, Tensor) or mask.dim() != 2 or mask.shape[0] != sequence_shape(activation)[0]:
            continue
        if _OF_PADDING.search(name):
            got, is_real = f"{name!r} of the model's call, in which ones may be padding or real", "ones are real"
            advice = f"Pass mask={name!r} if {is_real}, mask={name} == 0 if they are padding, or mask=None."
            if name.endswith(PADDING):
                got, advice = (
                    f"{name!r} of the model's call",
                    f"Pass mask={name!r} if it is this layer's, or mask=None.",
                )
            raise MaskError("be one whose sense is known", got, advice, layer)
        if fits(mask, activation) and not mask.is_floating_point():
            return (
                f"The model is called with {name!r}, which may say what is padding, and layer {layer!r} is reduced "
                f"over all positions. Pass mask={name!r} if what is not 0 in it is real, or mask=None."
            )
    return None


def own_masks(target: Target, role: Role, call: CallArguments) -> list[Any]:
    """The masks that a layer may have in a call, the likeliest first; none where every position is real.

    Raises:
        MaskError: the model's mask is of another part of it than the layer's.
    """
    if role.is_keys:
        return [mask for mask in [call.mask(_KEYS)] if call.layer == target.layer and mask is not None]
    role = role_in(target, role, call)
    *inside, outermost = call.chain
    name = next((name for name in _names(role, outermost) if outermost.mask(name) is not None), None)
    inner = [mask for one in inside for mask in _inner_masks(role, one, refuses=name is None)]
    if name is None:
        return inner
    mask, inputs = outermost.mask(name), outermost.inputs()
    if role.is_encoded or inner:
        return [*inner, mask]
    if len(inputs) > 1 and not any(len(one.inputs()) <= 1 and _has_mask(one) for one in inside):
        around = next(one.layer for one in call.chain if len(one.inputs()) > 1)
        part = ".".join(target.layer.split(".")[: len(around.split(".")) + 1 if around else 1])
        got = f"{name!r} of a model that takes {' and '.join(inputs)}"
        raise _not_of_part(target.layer, got, part, name)
    lacking = next((one.layer for one in reversed(inside) if _lacks(name, one)), None)
    if lacking is None:
        return [mask]
    if isinstance(mask, Tensor) and bool((mask != 0).all()):
        return []  # where nothing is padding, models leave their mask out
    raise _not_of_part(target.layer, f"{name!r}, without which {lacking!r} was called", lacking, name)


def role_in(target: Target, role: Role, call: CallArguments) -> Role:
    """The role of what is recorded of a layer in a call: of projections, whether they are of an encoder's states."""
    if role.projects and call.layer == target.layer.rpartition(".")[0] and _attends_elsewhere(call):
        return role._replace(is_encoded=True)
    return role


def is_of_decoder(role: Role, call: CallArguments) -> bool:
    """Whether the positions of a role are those of a decoder, in a call that is also given those of an encoder."""
    return _names(role, call) == [_DECODER]


def _attends_elsewhere(call: CallArguments) -> bool:
    """Whether an attention module is given the states of an encoder, or other keys than queries."""
    if any(call.get(name) is not None for name in _ENCODED):
        return True
    return call.get("key") is not None and call.get("key") is not call.get("query")


def _names(role: Role, call: CallArguments) -> list[str]:
    """The names that the mask for a role may have in a call; what is called encoder or decoder lies in the module."""
    depth = len(call.layer.split(".")) if call.layer else 0
    side = next((side for index, side in role.sides if index >= depth), None)
    has_two = call.takes(_DECODER)
    if role.is_encoded:
        return [_ENCODER, _MEMORY, *([ATTENTION] if has_two else [_SOURCE] if call.takes(_TARGET) else [])]
    is_of_encoder = role.is_encoders or side in _ENCODER_WORDS
    if has_two and not is_of_encoder:
        return [_DECODER]
    if call.takes(_TARGET) and not is_of_encoder and (side is not None or not call.takes(ATTENTION)):
        return [_TARGET]
    is_of_itself = call.get("query") is call.get("key")  # else the mask is that of other positions
    return [ATTENTION, _SOURCE, *([_KEYS] if is_of_itself else [])]


def _inner_masks(role: Role, call: CallArguments, *, refuses: bool) -> list[Tensor]:
    """What a module in the model was called with, if it is a mask ``(batch, seq)`` of its own positions.

    Raises:
        MaskError: a square one may say which positions see which; only with `refuses`, else it is left out.
    """
    if (not role.is_encoded and _CROSS.search(call.layer.lower())) or len(call.inputs()) > 1:
        return []
    masks = []
    for name in _names(role, call):
        mask = call.mask(name)
        if not isinstance(mask, Tensor) or mask.dim() != 2:
            continue
        if name.endswith(_KEYS) or _is_of_positions(mask, call):
            masks.append(mask)
        elif refuses and mask.shape[0] == mask.shape[1] and not bool(is_additive(mask)) and _fits_input(mask, call):
            got = f"a square {name!r} of {call.layer!r} that may say which positions see which"
            advice = "Pass mask=None if nothing is padding, or the mask itself as mask=."
            raise MaskError("say which positions are real", got, advice, call.layer)
    return masks


def _is_of_positions(mask: Tensor, call: CallArguments) -> bool:
    """Whether a mask says which positions are real, rather than what to add to scores, or which position sees which."""
    if not _fits_input(mask, call):
        return False
    if mask.dtype.is_floating_point and bool(is_additive(mask) | (mask == 0).all()):
        return False
    is_square = mask.shape[0] == mask.shape[1]
    return not is_square or not torch.equal(mask != 0, (mask != 0).tril())


def _fits_input(mask: Tensor, call: CallArguments) -> bool:
    first = next((value for _, value in call.named() if value is not mask and value.dim() >= 2), None)
    if first is None or mask.shape == first.shape[:2]:
        return True
    return call.is_cached and mask.shape[0] == first.shape[0]


def _has_mask(call: CallArguments) -> bool:
    """Whether a module was called with a mask of its own positions, of whatever form."""
    return any("mask" in name and not name.startswith(_OTHERS) for name, _ in call.named())


def _lacks(name: str, call: CallArguments) -> bool:
    """Whether a module that takes a mask of this name, and is no block of a stack, was called without any."""
    is_block = re.search(r"(^|\.)\d", call.layer) or _CROSS.search(call.layer.lower())
    return not is_block and call.takes(name) and not _has_mask(call)


def _not_of_part(layer: str, got: str, part: str, name: str) -> MaskError:
    pattern = part if layer == part else f"{part}.**"
    advice = (
        f"Pass mask={{{pattern!r}: None}} if nothing in it is padding, or mask={{{pattern!r}: {name!r}}} if it is its."
    )
    return MaskError("be one that its part of the model is called with", got, advice, layer)
