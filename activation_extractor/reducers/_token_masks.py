"""Leaving tokens out by their ids: a mask that says which positions count, made from a model's own mask and ids."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from activation_extractor.errors import ArgumentError, ArgumentTypeError, MaskError
from activation_extractor.layers._selections import Target
from activation_extractor.reducers._calls import CallArguments
from activation_extractor.reducers._mask_fit import own_columns
from activation_extractor.reducers._own_masks import Role, is_of_decoder, role_in

IDS, DECODER_IDS = "input_ids", "decoder_input_ids"


@dataclass(frozen=True)
class TokenMask:
    """Leaves tokens out, beside padding.

    Attributes:
        tokens: their ids.
        argument: the argument of a call that holds token ids; None for ``input_ids`` or ``decoder_input_ids``.
    """

    tokens: tuple[int, ...]
    argument: str | None = None

    @property
    def names(self) -> frozenset[str]:
        """The names of arguments that may hold token ids."""
        return frozenset({IDS, DECODER_IDS} if self.argument is None else {self.argument})

    def masks(self, masks: list[Any], role: Role, target: Target, call: CallArguments | None) -> list[Any]:
        """The masks that a layer may have in a call, `masks`, without these tokens.

        Raises:
            MaskError: the call holds no token ids that are the layer's, or a mask of other positions than these.
        """
        if call is None:
            raise self._without_ids(target, "a layer that ran outside of such a call")
        key = (self, role)
        if key not in call.found:
            ids = self._ids(target, role_in(target, role, call), call)
            is_left_out = torch.isin(ids, torch.tensor(self.tokens, device=ids.device, dtype=ids.dtype))
            call.found[key] = [_without(target, mask, is_left_out, call) for mask in masks or [None]]
        return call.found[key]

    def _ids(self, target: Target, role: Role, call: CallArguments) -> Tensor:
        outermost = call.outermost
        if role.is_keys or (role.is_encoded and self.argument is None and not outermost.takes(DECODER_IDS)):
            raise self._without_ids(target, "keys or values of other positions than the call's own")
        for one in [outermost] if role.is_encoded else call.chain:
            name = self.argument or (DECODER_IDS if is_of_decoder(role, one) else IDS)
            ids = one.get(name)
            if not isinstance(ids, Tensor) or ids.dim() != 2 or ids.dtype.is_floating_point:
                continue
            if one is outermost and len(inputs := one.inputs()) > 1:
                raise self._without_ids(target, f"a model that takes {' and '.join(inputs)}")
            return ids
        raise self._without_ids(target, "a call without them")

    def _without_ids(self, target: Target, got: str) -> MaskError:
        name = repr(self.argument or IDS)
        advice = (
            "Name the argument that holds them, without_tokens(..., argument=), or pass another mask= for the layer."
        )
        return MaskError(f"leave tokens out by the ids in {name} of the call", got, advice, target.layer)


def without_tokens(tokens: Any, *, argument: str | None = None) -> TokenMask:
    """For ``mask=``: padding as ever, and without these tokens, BOS, EOS, CLS and SEP for example.

    So ``reduce="mean"`` is the mean over the tokens of the text, and ``"last"`` the last one before EOS. The tokens are
    found in ``input_ids`` of the call in which a layer runs; of a decoder, in ``decoder_input_ids``.

    Args:
        tokens: ids, or a tokenizer of transformers: all of its special tokens, but those for what is unknown or masked.
        argument: the argument of the model's call with the token ids, where it is another one.

    Raises:
        ArgumentTypeError: neither ids nor a tokenizer.
        ArgumentError: no ids.

    Example:
        >>> import torch
        >>> from activation_extractor import capture, without_tokens
        >>> from activation_extractor.examples import minilm
        >>> model, tokenizer = minilm()
        >>> batch = tokenizer(["And there was light"], return_tensors="pt")
        >>> with capture(model, "encoder.layer.3", reduce="last", mask=without_tokens(tokenizer)) as acts:
        ...     _ = model(**batch)
        >>> with capture(model, "encoder.layer.3") as whole:
        ...     _ = model(**batch)
        >>> torch.equal(acts["encoder.layer.3"], whole["encoder.layer.3"][:, -2])  # "light", before [SEP]
        True
    """
    if argument is not None and not isinstance(argument, str):
        raise ArgumentTypeError("argument", "name an argument of the model", argument)
    if isinstance(special := getattr(tokens, "all_special_ids", None), list):
        own = {name: getattr(tokens, f"{name}_token_id", None) for name in ("bos", "eos", "cls", "sep", "pad")}
        of_text = {getattr(tokens, f"{name}_token_id", None) for name in ("unk", "mask")}  # GPT-2 has one for all
        ids = [*({*special} - of_text), *(token for token in own.values() if token is not None)]
    else:
        listed = tokens.tolist() if isinstance(tokens, Tensor | np.ndarray) else tokens
        ids = list(listed) if isinstance(listed, Iterable) and not isinstance(listed, str | bytes) else [listed]
    if not all(isinstance(token, int | np.integer) and not isinstance(token, bool) for token in ids):
        raise ArgumentTypeError("what is given to without_tokens", "be token ids or a tokenizer", tokens)
    if not ids:
        raise ArgumentError("what is given to without_tokens", "hold at least one token id", tokens)
    return TokenMask(tuple(sorted({int(token) for token in ids})), argument)


def _without(target: Target, mask: Any, is_left_out: Tensor, call: CallArguments) -> Any:
    """A mask, with 0 where a token is left out; what is additive stays so, to be refused."""
    if mask is None:
        return ~is_left_out
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        return mask  # which is refused where it is to fit
    mask = own_columns(mask, is_left_out.shape[1], call.begins_at(mask))
    if mask.shape != is_left_out.shape:
        advice = "Pass the mask of the positions that count as mask=."
        got = f"shape {tuple(mask.shape)}"
        raise MaskError(f"have the shape of the token ids, {tuple(is_left_out.shape)}", got, advice, target.layer)
    return torch.where(is_left_out.to(mask.device), 0, mask)
