"""Patterns of names, segment by segment: of layers, of tolerances, of masks."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache

from activation_extractor.errors import ArgumentError

_TOKEN = re.compile(
    r"(?P<lead>(?<![^.])\*\*\.)|(?P<any>\*\*)|(?P<star>\*)|(?P<one>\?)|\[(?P<set>!?[^\]]+)\]|(?P<char>.)"
)
_WILDCARDS = {"lead": r"((?:.+\.)?)", "any": "(.+)", "star": r"([^.]*)", "one": r"([^.])"}
_NUMBERS = re.compile(" *{0}( *, *{0})* *".format("[0-9]{1,18}( *- *[0-9]{1,18})?"))
_MEANS_NUMBERS = re.compile("[0-9]{2} *-|- *[0-9]{2}|^[-0-9 ]*,[-0-9, ]*$")


@lru_cache  # it takes as long as to hook two layers
def glob(pattern: str) -> re.Pattern[str]:
    """A layer pattern as a regex: ``*`` and ``?`` within a dotted segment, ``**`` across them, ``[0-3]``, ``[10-15]``.

    A leading or inner ``**`` stands for any number of segments, none included; a trailing one for at least one. A
    bracket with a comma, or with a range that has a number of several digits, stands for whole numbers, any other one
    for one character. What each wildcard stands for is a group.

    Raises:
        ArgumentError: the pattern is not well formed.
    """
    parts = []
    try:
        for match in _TOKEN.finditer(pattern):
            if match["char"]:
                parts.append(re.escape(match["char"]))
            elif match["set"]:
                content = match["set"].removeprefix("!")
                parts.append(_bracket(content, is_negated=content != match["set"]))
            else:
                parts.append(_WILDCARDS[str(match.lastgroup)])
        return re.compile("".join(parts))
    except (re.error, ValueError) as error:
        raise ArgumentError("a pattern", "be well formed", pattern, f"In it: {error}.") from error


def _bracket(content: str, *, is_negated: bool) -> str:
    """A bracket as a group of a regex; ValueError where it is neither numbers nor characters."""
    if not _NUMBERS.fullmatch(content):
        if _MEANS_NUMBERS.search(content):
            raise ValueError(f"[{content}] is neither numbers such as [0-3,10-15] nor single characters")
        escaped = re.sub(r"([\\\[\]^&~|])", r"\\\1", content)
        return f"([^.{escaped}])" if is_negated else f"([{escaped}])"
    ranges = [[int(number) for number in part.split("-")] for part in content.split(",")]
    for first, last in ((part[0], part[-1]) for part in ranges):
        if first > last:
            raise ValueError(f"{first}-{last} runs backwards, write {last}-{first}")
    if not _MEANS_NUMBERS.search(content):
        return f"([^.{content}])" if is_negated else f"([{content}])"
    numbers = "|".join(regex for part in ranges for regex in _between(part[0], part[-1]))
    numbers = f"0*(?:{numbers})(?![0-9])"  # a whole number, leading zeros or not
    return f"((?<![0-9]){f'(?!{numbers})[0-9]+(?![0-9])' if is_negated else numbers})"


def _between(first: int, last: int) -> Iterator[str]:
    """Regexes of the numbers from `first` to `last`, each for numbers that have all but their end in common."""
    while first <= last:
        free = 0  # how many digits at the end may be anything
        while first and first % 10 ** (free + 1) == 0 and first + 10 ** (free + 1) - 1 <= last:
            free += 1
        head, low = divmod(first // 10**free, 10)
        high = min(9, (last + 1) // 10**free - 1 - 10 * head)
        yield f"{head or ''}[{low}-{high}]" + "[0-9]" * free
        first = (10 * head + high + 1) * 10**free


class Patterns:
    """Patterns of which the first that fits a name counts; those without wildcards are looked up, and cost nothing."""

    def __init__(self, patterns: Iterable[str]) -> None:
        numbered = list(enumerate(patterns))
        self._names = {pattern: place for place, pattern in numbered if not count_wildcards(pattern)}
        self._globs = [(place, glob(pattern)) for place, pattern in numbered if pattern not in self._names]

    def first(self, name: str) -> int | None:
        """The place of the first pattern that fits; None where none does."""
        place = self._names.get(name)
        fits = (before for before, regex in self._globs if (place is None or before < place) and regex.fullmatch(name))
        return next(fits, place)


def fill(pattern: str, wildcards: Sequence[str]) -> str:
    """A name of this pattern: its wildcards replaced, in their order, by the first of these texts."""
    texts = iter(wildcards)
    return _TOKEN.sub(lambda match: match["char"] or next(texts), pattern)


def count_wildcards(pattern: str) -> int:
    """How many wildcards a pattern has."""
    return sum(match["char"] is None for match in _TOKEN.finditer(pattern))
