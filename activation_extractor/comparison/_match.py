"""Which values of two sides belong together."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from difflib import get_close_matches
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from activation_extractor._display import examples
from activation_extractor._format._entries import Key
from activation_extractor.errors import ActivationNotFoundError, ArgumentError, ArgumentTypeError, MatchError
from activation_extractor.layers._patterns import count_wildcards, fill, glob
from activation_extractor.store import Store

_SAME_ROWS = "Compare stores of the same data set."

Pair = tuple[Key | None, Key | None]
Match = Mapping[str, str] | Callable[[str], str | None] | Literal["order"] | None

_SIDE_AND_CALL = re.compile(r"(?::input|:gradient)?(?:#\d+)?$")


def paired(left: Sequence[Key], right: Sequence[Key], match: Match) -> list[Pair]:
    """The pairs to compare, in the order of `left`; None stands for what one side lacks.

    Args:
        left: what there is on the left, in order.
        right: likewise.
        match: see `compare`.

    Raises:
        ArgumentError: `match` does not fit.
        MatchError: there is no pair, or two for one.
    """
    names, others = _names(left), _names(right)
    matched = _matched(names, others, match)
    if names and not matched:
        raise MatchError("have layers that match names", "none", "Let match return a name of right for some of left.")
    pairs: list[Pair] = [(key, _partner(key, matched[key[0]], right)) for key in left if key[0] in matched]
    taken = {other for _, other in pairs}
    wanted = others if match is None else matched.values()
    pairs += [(None, key) for key in right if key[0] in wanted and key not in taken]
    if not any(one and other for one, other in pairs):
        there = f"{_shown(left)} on the left and {_shown(right)} on the right"
        advice = "Capture the same layers with the same reducers, or say with match= which belong together."
        raise MatchError("share a layer and reducer", there, advice)
    return pairs


def _matched(names: Sequence[str], others: Sequence[str], match: Match) -> dict[str, str]:
    """The right name of each left one that is to be compared."""
    if match is None:
        return {name: name for name in names}
    if match == "order":
        if len(names) != len(others):
            got = f"{len(names)} and {len(others)}"
            raise MatchError("have equally many layers for match='order'", got, "Match them by name, with a dict.")
        return dict(zip(names, others, strict=True))
    if isinstance(match, Mapping):
        found = dict(_by_patterns(names, others, match))
    elif callable(match):
        found = {name: other for name in names if (other := _with_ending(name, match)) is not None}
    else:
        raise ArgumentTypeError("match", "be a dict, a callable, 'order' or None", match)
    _check(found, others)
    return found


def _by_patterns(names: Sequence[str], others: Sequence[str], match: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """The right name of each left one that a pattern names; the first pattern counts, and a name is no pattern."""
    seen: set[str] = set()
    for pattern, template in match.items():
        if not isinstance(pattern, str) or not isinstance(template, str):
            raise ArgumentTypeError("match", "map names to names", {pattern: template})
        is_filled = template not in others and count_wildcards(template) > 0
        if is_filled and (pattern in names or count_wildcards(template) != count_wildcards(pattern)):
            raise ArgumentError("match", "have equally many wildcards on both sides", {pattern: template})
        fits = re.compile(re.escape(pattern)) if pattern in names else glob(pattern)
        fitted, hits = partial(_fitted, fits, template, is_filled=is_filled), 0
        for name in names:
            other = _with_ending(name, fitted)
            hits += other is not None
            if other is not None and name not in seen:
                seen.add(name)
                yield name, other
        if not hits:
            raise ArgumentError("match", "name layers of left", pattern, _close(pattern, names))


def _fitted(fits: re.Pattern[str], template: str, name: str, *, is_filled: bool) -> str | None:
    found = fits.fullmatch(name)
    if found is None or not is_filled:
        return found and template
    return fill(template, found.groups())


def _with_ending(name: str, match: Callable[[str], str | None]) -> str | None:
    """What a name is mapped to: as it is, else without what tells the side and the call, which is put back."""
    other = match(name)
    ending = _SIDE_AND_CALL.search(name)
    if other is None and ending is not None and ending[0]:
        other = match(name[: ending.start()])
        other = None if other is None else other + ending[0]
    if other is not None and not isinstance(other, str):
        raise ArgumentTypeError("what match returns", "be a name or None", other)
    return other


def _check(found: Mapping[str, str], others: Sequence[str]) -> None:
    """See that each left name has a right one of its own that is there."""
    owners: dict[str, str] = {}
    for name, other in found.items():
        if other not in others:
            raise ArgumentError("match", f"map {name!r} to a layer of right", other, _close(other, others))
        if owners.setdefault(other, name) != name:
            got = f"{owners[other]!r} and {name!r} for {other!r}"
            raise MatchError("be matched one to one", got, "Let match leave one of them out.")


def _partner(key: Key, other: str, right: Sequence[Key]) -> Key | None:
    """The right key of this name and the same reducer, or of the only one where a side does not tell it."""
    there = [one for one in right if one[0] == other]
    same = [one for one in there if one[1] == key[1]]
    is_untold = key[1] is None or None in [one[1] for one in there]
    return same[0] if same else there[0] if is_untold and len(there) == 1 else None


def _names(keys: Iterable[Key]) -> list[str]:
    return list(dict.fromkeys(name for name, _ in keys))


def _shown(keys: Iterable[Key]) -> str:
    return examples(name if reducer is None else (name, reducer) for name, reducer in keys) or "nothing"


def _close(name: str, names: Sequence[str]) -> str:
    close = get_close_matches(name, names, n=3)
    return f"Close matches: {examples(close)}." if close else f"There is {examples(names)}."


def row_order(left: Store | None, right: Store | None) -> Tensor | None:
    """Where in `right` the rows of `left` stand, by their ids; None where both have the same order, or no ids.

    Raises:
        MatchError: they have not the same ids.
    """
    if left is None or right is None or left.manifest["ids"] is None or right.manifest["ids"] is None:
        return None
    ids, others = left.ids, right.ids
    if ids == others:
        return None
    try:
        order = right.rows_of(ids)
    except ActivationNotFoundError as error:
        missing = error.key
        raise MatchError("be the same rows", f"{missing!r}, which right lacks", _SAME_ROWS) from error
    if len(others) > len(ids):
        known = set(ids)
        extra = next(one for one in others if one not in known)
        raise MatchError("be the same rows", f"{len(others) - len(ids)} that left lacks, such as {extra!r}", _SAME_ROWS)
    return torch.tensor(order, dtype=torch.int64)


def matched_rows(left: Store, right: Store, key: Key, other: Key, order: Tensor | None) -> Tensor | None:
    """Which rows of right's column belong to those of left's, one by one; None where they are in the same order.

    Args:
        left: a store, and its column `key`, which may be short of rows.
        right: another one, and its column `other`, likewise.
        key: see `left`.
        other: see `right`.
        order: see `row_order`.

    Raises:
        LookupError: one column has rows that the other lacks.
    """
    column, twin = left[key], right[other]
    if order is None and len(column) == left.rows and len(twin) == right.rows:
        return None
    rows, others = column.rows, twin.rows
    wanted = rows if order is None else order[rows]
    places = torch.searchsorted(others, wanted)
    if len(rows) != len(others) or not torch.equal(others[places.clamp_max(len(others) - 1)], wanted):
        raise LookupError
    return None if order is None else places
