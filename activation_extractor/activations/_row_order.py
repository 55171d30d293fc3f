"""Whether the rows and positions of one forward go on in the next, as joining their values needs."""

from __future__ import annotations

from collections.abc import Mapping
from operator import or_
from typing import Any, NamedTuple

import torch
from torch import Tensor

from activation_extractor.reducers._calls import CallArguments


class Break(NamedTuple):
    """Why the values of a step's forwards are no sequence: what joining needs, what was found, and what to do."""

    condition: str
    got: str
    advice: str


_INSTEAD = "or pass calls='all' and join what belongs together."
_REORDERED = Break(
    "keep its rows in order when calls are joined",
    "rows of {!r} that beam search reordered",
    f"Generate with num_beams=1, {_INSTEAD}",
)
_DROPPED = Break(
    "keep all positions when calls are joined",
    "positions of {!r} that the cache has dropped since, as speculative decoding drops guesses",
    f"Generate without it, {_INSTEAD}",
)


class RowOrder:
    """Compares the cache that a forward is given with what the forward before it left there.

    Beam search reorders the rows of the cache between forwards, so that row 0 of the next forward may go on from
    another row. It makes new tensors of them: as long as a tensor is the same one, nothing is compared. Speculative
    decoding takes the positions of guesses that were wrong out of it, also behind the last forward.
    """

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """Begin anew: what comes need not go on from what was."""
        self._left: Tensor | None = None
        self._part: Any = None
        self._length = self._added = 0

    def broken(self, call: CallArguments) -> Break | None:
        """Why a forward that begins does not go on from the last one; None where it does, or has no cache of it."""
        part = _first_part(call.cache)
        left, given, length = self._left, _keys(part), _length(part)
        self._added = -length
        if left is None or given is None or given is left or given.dim() < 3:
            return None
        if 0 < length < self._length:
            return _DROPPED
        shared = min(left.shape[-2], given.shape[-2])  # (batch, heads, seq, features)
        before, now = left[..., :shared, :], given[..., :shared, :]
        is_kept = before.shape == now.shape and torch.equal(before, now.to(before.device))
        return None if is_kept else _REORDERED

    def end(self, call: CallArguments) -> None:
        """The forward has ended."""
        self._part = _first_part(call.cache)
        self._left, self._length = _keys(self._part), _length(self._part)
        self._added += self._length

    def broken_since(self) -> Break | None:
        """Why the last forward is not whole: some of its positions were dropped; who drops more cuts a whole cache."""
        return _DROPPED if 0 < self._length - _length(self._part) < self._added else None


def goes_on(before: Mapping[int | str, Tensor], now: Mapping[int | str, Tensor]) -> bool:
    """Whether the tokens of a forward are those of the one before and one more, as in a generation without a cache.

    Beam search may have reordered the rows. What is no longer than before has to be the same.
    """
    pairs = [(before[key], tokens) for key, tokens in now.items() if key in before]
    longer = [(old.shape[0], old.shape[1] + 1) == new.shape for old, new in pairs]
    same = [old.shape == new.shape for old, new in pairs]
    return (
        any(longer)
        and all(map(or_, longer, same))
        and all(set(_rows(new[:, : old.shape[1]])) <= set(_rows(old)) for old, new in pairs)
    )


def has_nothing(cache: Any) -> bool:
    """Whether a cache says that it is empty, as that of a generation which begins; a recurrent state says nothing."""
    try:
        length = cache.get_seq_length()
    except Exception:  # it has no such method, or none for its layers
        return False
    is_near = not isinstance(length, Tensor) or length.device.type == "cpu"  # else a device would be waited for
    return is_near and bool(length == 0)


def _rows(tokens: Tensor) -> list[bytes]:
    return [row.tobytes() for row in tokens.cpu().numpy()]


def _first_part(cache: Any) -> Any:
    """What has the keys of the first layer in a cache of attention, of whatever make; None where there are none."""
    cache = getattr(cache, "self_attention_cache", cache)
    for attribute in ("layers", "key_cache"):
        cache = getattr(cache, attribute, cache)
    if isinstance(cache, tuple | list):
        found = (_first_part(member) for member in cache if not isinstance(member, dict))
        return next((part for part in found if part is not None), None)
    return cache if _keys(cache) is not None else None


def _keys(part: Any) -> Tensor | None:
    keys = getattr(part, "keys", part)
    return keys if isinstance(keys, Tensor) else None


def _length(part: Any) -> int:
    """How many positions it holds, or has held where it keeps those in a window alone."""
    keys = _keys(part)
    if keys is None or keys.dim() < 3:
        return 0
    length = part.get_seq_length() if hasattr(part, "get_seq_length") else keys.shape[-2]
    return length if isinstance(length, int) else keys.shape[-2]
