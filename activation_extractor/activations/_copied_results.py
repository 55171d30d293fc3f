"""The values of a copy of activations: of one that was pickled, or made by the module ``copy``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from activation_extractor._tensors import kept_bytes
from activation_extractor.activations._recorded_values import Key


class CopiedResults:
    """What `Results` hands out, apart from any block: as it was when the copy was made, outside any graph.

    Attributes:
        reducers, only_reducer, picked_of, parts: as of `Results`.
    """

    def __init__(self, values: Mapping[Key, Any], original: Any) -> None:
        self._values = {
            key: [call.detach() for call in value] if isinstance(value, list) else value.detach()
            for key, value in values.items()
        }
        self.reducers, self.only_reducer = list(original.reducers), original.only_reducer
        self.picked_of, self.parts = dict(original.picked_of), dict(original.parts)

    @property
    def names(self) -> list[str]:
        """The recorded names, in the order in which the layers ran."""
        return list(dict.fromkeys(name for name, _ in self._values))

    @property
    def nbytes(self) -> int:
        """Bytes of memory that the values keep alive."""
        values = (value if isinstance(value, list) else [value] for value in self._values.values())
        return kept_bytes(tensor for tensors in values for tensor in tensors)

    def has(self, key: Key) -> bool:
        """Whether a key has a value."""
        return key in self._values

    def hand_out(self, key: Key) -> Tensor | list[Tensor]:
        """The value of a key; KeyError when it has none."""
        return self._values[key]

    def clear(self) -> None:
        """Let go of everything."""
        self._values.clear()
