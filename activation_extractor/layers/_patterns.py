"""Patterns of names, segment by segment: of layers, of tolerances, of masks."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache

from activation_extractor.errors import ArgumentError

_TOKEN = re.compile(
    r"(?P<lead>(?<![^.])\*\*\.)|(?P<any>\*\*)|(?P<star>\*)|(?P<one>\?)|\[(?P<set>!?[^\]]+)\]|(?P<char>.)"
)
_WILDCARDS = {"lead": r"((?:.+\.)?)", "any": "(.+)", "star": r"([^.]*)", "one": r"([^.])"}


@lru_cache  # it takes as long as to hook two layers
def glob(pattern: str) -> re.Pattern[str]:
    """A layer pattern as a regex: ``*`` and ``?`` within a dotted segment, ``**`` across them, ``[0-3]``.

    A leading or inner ``**`` stands for any number of segments, none included; a trailing one for at least one. What
    each wildcard stands for is a group.

    Raises:
        ArgumentError: the pattern is not well formed.
    """
    parts = []
    for match in _TOKEN.finditer(pattern):
        if match["char"]:
            parts.append(re.escape(match["char"]))
        elif characters := match["set"]:
            escaped = re.sub(r"([\\\[\]^&~|])", r"\\\1", characters.removeprefix("!"))
            parts.append(f"([^.{escaped}])" if characters.startswith("!") else f"([{escaped}])")
        else:
            parts.append(_WILDCARDS[str(match.lastgroup)])
    try:
        return re.compile("".join(parts))
    except re.error as error:
        raise ArgumentError("a pattern in layers", "be well formed", pattern, f"In it: {error}.") from error


def fill(pattern: str, wildcards: Sequence[str]) -> str:
    """A name of this pattern: its wildcards replaced, in their order, by the first of these texts."""
    texts = iter(wildcards)
    return _TOKEN.sub(lambda match: match["char"] or next(texts), pattern)


def count_wildcards(pattern: str) -> int:
    """How many wildcards a pattern has."""
    return sum(match["char"] is None for match in _TOKEN.finditer(pattern))
