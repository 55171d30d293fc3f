"""Which values of two sides belong together."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from activation_extractor._display import close_matches, examples, plural
from activation_extractor._format._entry_names import Key
from activation_extractor.errors import ArgumentError, ArgumentTypeError, MatchError
from activation_extractor.layers._patterns import count_wildcards, fill, glob
from activation_extractor.store import Store

Pair = tuple[Key | None, Key | None]
Match = Mapping[str, str] | Callable[[str], str | None] | Literal["order"] | None

_SIDE_AND_CALL = re.compile(r"(?::input|:gradient)?(?:#\d+)?$")


def paired(left: Sequence[Key], right: Sequence[Key], match: Match) -> list[Pair]:
    """The pairs of keys to compare, in the order of `left`; None stands for what one side lacks.

    Raises:
        ArgumentError: `match` does not fit.
        MatchError: there is no pair, or two for one.
    """
    names, others = (list(dict.fromkeys(name for name, _ in keys)) for keys in (left, right))
    matched = _matched(names, others, match)
    if names and not matched:
        advice = "Let match return a name of right for some layer of left."
        raise MatchError("share a layer", "no name from match=", advice)
    by_name: dict[str, list[Key]] = {}
    for key in right:
        by_name.setdefault(key[0], []).append(key)
    pairs: list[Pair] = [(key, _partner(key, by_name.get(matched[key[0]], ()))) for key in left if key[0] in matched]
    taken = {other_key for _, other_key in pairs}
    wanted = set(others if match is None else matched.values())
    pairs += [(None, key) for key in right if key[0] in wanted and key not in taken]
    if not any(key and other_key for key, other_key in pairs):
        got = f"{_shown(left)} on the left and {_shown(right)} on the right"
        advice = "Capture the same layers with the same reducers, or say with match= which belong together."
        raise MatchError("share a layer and reducer", got, advice)
    return pairs


def _matched(names: Sequence[str], others: Sequence[str], match: Match) -> dict[str, str]:
    """The name on the right of each name on the left that is to be compared."""
    if match is None:
        return {name: name for name in names}
    if match == "order":
        if len(names) != len(others):
            got = f"{len(names)} and {len(others)}"
            raise MatchError("have equally many layers for match='order'", got, "Match them by name, with a dict.")
        return dict(zip(names, others, strict=True))
    if isinstance(match, Mapping):
        matched = dict(_by_patterns(names, others, match))
    elif callable(match):
        matched = {name: other for name in names if (other := _with_ending(name, match)) is not None}
    else:
        raise ArgumentTypeError("match", "be a dict, a callable, 'order' or None", match)
    _check_one_to_one(matched, others)
    return matched


def _check_one_to_one(matched: Mapping[str, str], others: Sequence[str]) -> None:
    owners: dict[str, str] = {}
    known = set(others)
    for name, other in matched.items():
        if other not in known:
            raise ArgumentError("match", f"map {name!r} to a layer of right", other, _close(other, others))
        if owners.setdefault(other, name) != name:
            got = f"{owners[other]!r} and {name!r} for {other!r}"
            raise MatchError("be matched one to one", got, "Let match leave one of them out.")


def _by_patterns(names: Sequence[str], others: Sequence[str], match: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """Pairs of names, of which the first that has a name on the left counts; a key that is a name is no pattern."""
    matched: set[str] = set()
    known, taken = set(names), set(others)
    by_base: dict[str, list[str]] = {}  # a pattern without wildcards can fit these names alone
    for name in names:
        for base in dict.fromkeys([name, _SIDE_AND_CALL.sub("", name)]):
            by_base.setdefault(base, []).append(name)
    for pattern, template in match.items():
        if not isinstance(pattern, str) or not isinstance(template, str):
            raise ArgumentTypeError("match", "map names to names", {pattern: template})
        is_filled = template not in taken and count_wildcards(template) > 0
        if is_filled and (pattern in known or count_wildcards(template) != count_wildcards(pattern)):
            raise ArgumentError("match", "have equally many wildcards on both sides", {pattern: template})
        regex = re.compile(re.escape(pattern)) if pattern in known else glob(pattern)
        fitted = partial(_fitted, regex, template, is_filled=is_filled)
        is_plain = pattern in known or not count_wildcards(pattern)
        candidates = by_base.get(pattern, ()) if is_plain else names
        fits = [(name, other) for name in candidates if (other := _with_ending(name, fitted)) is not None]
        if not fits:
            raise ArgumentError("match", "name layers of left", pattern, _close(pattern, names))
        yield from (pair for pair in fits if pair[0] not in matched)
        matched.update(name for name, _ in fits)


def _fitted(regex: re.Pattern[str], template: str, name: str, *, is_filled: bool) -> str | None:
    """The template for a name that fits, its wildcards filled in."""
    fit = regex.fullmatch(name)
    return fit and (fill(template, fit.groups()) if is_filled else template)


def _with_ending(name: str, match: Callable[[str], str | None]) -> str | None:
    """What `match` returns for a name, or else for the name without its side and call, which are put back."""
    other, ending = match(name), _SIDE_AND_CALL.search(name)
    if other is None and ending is not None and ending[0]:
        other = match(name[: ending.start()])
        other = None if other is None else other + ending[0]
    if other is not None and not isinstance(other, str):
        raise ArgumentTypeError("what match returns", "be a name or None", other)
    return other


def _partner(key: Key, candidates: Sequence[Key]) -> Key | None:
    """The one of some keys that has the same reducer, or the only one when a side does not name any."""
    same = [candidate for candidate in candidates if candidate[1] == key[1]]
    is_unnamed = key[1] is None or any(reducer is None for _, reducer in candidates)
    return same[0] if same else candidates[0] if is_unnamed and len(candidates) == 1 else None


def _shown(keys: Iterable[Key]) -> str:
    return examples(name if reducer is None else (name, reducer) for name, reducer in keys) or "nothing"


def _close(name: str, names: Sequence[str]) -> str:
    return close_matches(name, names, f"There is {examples(names)}.")


def row_order(left: Store | None, right: Store | None) -> Tensor | None:
    """Where in `right` the rows of `left` are, by their ids; None where both have the same order, or no ids.

    Raises:
        MatchError: they have not the same ids.
    """
    if left is None or right is None or left.manifest["ids"] is None or right.manifest["ids"] is None:
        return None
    ids, others = left.ids, right.ids
    if ids == others:
        return None
    for side, row_ids, known in (("left", ids, set(others)), ("right", others, set(ids))):
        alone = [row_id for row_id in row_ids if row_id not in known]
        if alone:
            got = f"{plural(len(alone), 'id')} on the {side} alone, such as {alone[0]!r}"
            raise MatchError("have the same row ids on both sides", got, "Compare stores of the same data set.")
    return torch.tensor(right.rows_of(ids), dtype=torch.int64)


def matched_rows(left: Store, right: Store, key: Key, other_key: Key, order: Tensor | None) -> Tensor | None:
    """Which rows of a column of `right` belong to those of a column of `left`; None where they are in the same order.

    The rows are indices into the column of `right`, ``(rows,)`` int64. Both columns may be short of rows; `order` is
    what `row_order` returns.

    Raises:
        LookupError: one column has rows that the other lacks.
    """
    column, other = left[key], right[other_key]
    if order is None and len(column) == left.rows and len(other) == right.rows:
        return None
    rows, other_rows = column.rows, other.rows
    wanted = rows if order is None else order[rows]
    places = torch.searchsorted(other_rows, wanted)
    if len(rows) != len(other_rows) or not torch.equal(other_rows[places.clamp_max(len(other_rows) - 1)], wanted):
        raise LookupError
    return None if order is None else places
