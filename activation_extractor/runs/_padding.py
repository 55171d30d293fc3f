"""What is padding in the arguments of a model's call, which digests of rows leave out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from activation_extractor.layers._modules import unwrap
from activation_extractor.layers._signatures import positions_of, signature_of
from activation_extractor.reducers._own_masks import ATTENTION

_DECODER = "decoder_"


class Padding:
    """The masks of a model's calls, whose ones are real; `mask` is that argument of `extract`.

    Nothing is padding where `mask` says that every position is real, or is a mask itself.
    """

    def __init__(self, model: nn.Module, mask: Any) -> None:
        name = mask if isinstance(mask, str) else None if mask is None or isinstance(mask, Tensor) else ATTENTION
        self._name = None if name and name.endswith("key_padding_mask") else name  # its ones are padding
        self._places = positions_of(signature_of(unwrap(model)))

    def split(self, arguments: Any, pooling_mask: Any) -> list[tuple[Any, Any]]:
        """The arguments of a call, in parts that share a mask, each with its own: ``(rows, seq)``, or None.

        Positions that `pooling_mask` holds are real too.
        """
        if isinstance(arguments, tuple | list):
            place = self._places.get(self._name or "", len(arguments))
            return [(arguments, _united(arguments[place] if place < len(arguments) else None, pooling_mask))]
        if not isinstance(arguments, Mapping) or self._name is None:
            return [(arguments, None)]
        of_decoder = {name: value for name, value in arguments.items() if str(name).startswith(_DECODER)}
        if not of_decoder:
            return [(arguments, _united(arguments.get(self._name), pooling_mask))]
        others = {name: value for name, value in arguments.items() if name not in of_decoder}
        is_decoders = self._name.startswith(_DECODER)
        name, decoder = (ATTENTION, self._name) if is_decoders else (self._name, _DECODER + ATTENTION)
        masks = others.get(name), of_decoder.get(decoder)
        return [(part, _united(mask, pooling_mask)) for part, mask in zip((others, of_decoder), masks, strict=True)]


def _united(mask: Any, pooling_mask: Any) -> Any:
    if not isinstance(mask, Tensor) or not isinstance(pooling_mask, Tensor) or mask.shape != pooling_mask.shape:
        return mask
    return mask.cpu().bool() | pooling_mask.cpu().bool()
