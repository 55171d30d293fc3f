"""Which values of two sides belong together."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from difflib import get_close_matches
from functools import partial
from typing import Literal

from activation_extractor._entries import Key
from activation_extractor._layers import count_wildcards, fill, glob
from activation_extractor._wording import examples
from activation_extractor.errors import ArgumentError, ArgumentTypeError, MatchError

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
