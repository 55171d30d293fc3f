"""Patterns of names, segment by segment: of layers, of tolerances, of masks."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache

from activation_extractor.errors import ArgumentError

_TOKEN = re.compile(
    r"(?P<lead>(?<![^.])\*\*\.)|(?P<any>\*\*)|(?P<star>\*)|(?P<one>\?)|\[(?P<set>!?[^\]]+)\]|(?P<char>.)"
)


@lru_cache  # it takes as long as to hook two layers
def glob(pattern: str) -> re.Pattern[str]:
    """A layer pattern as a regex: ``*`` and ``?`` within a dotted segment, ``**`` across them, ``[0-3]``.

    A leading or inner ``**`` stands for any number of segments, none included; a trailing one for at least one. What
    each wildcard stands for is a group.
    """
    parts = []
    for match in _TOKEN.finditer(pattern):
        if match["lead"]:
            parts.append(r"((?:.+\.)?)")
        elif match["any"]:
            parts.append("(.+)")
        elif match["star"]:
            parts.append(r"([^.]*)")
        elif match["one"]:
            parts.append(r"([^.])")
        elif match["set"]:
            parts.append(f"({_character_set(match['set'])})")
        else:
            parts.append(re.escape(match["char"]))
    try:
        return re.compile("".join(parts))
    except re.error as error:
        raise ArgumentError("a pattern in layers", "be well formed", pattern, f"In it: {error}.") from error


def fill(pattern: str, wildcards: Sequence[str]) -> str:
    """A name of this pattern: its wildcards replaced, one by one, by at least as many texts."""
    left = iter(wildcards)
    return _TOKEN.sub(lambda match: match["char"] or next(left), pattern)


def count_wildcards(pattern: str) -> int:
    """How many wildcards a pattern has."""
    return sum(match["char"] is None for match in _TOKEN.finditer(pattern))


def _character_set(inside: str) -> str:
    escaped = re.sub(r"([\\\[\]^&~|])", r"\\\1", inside.removeprefix("!"))
    return f"[^.{escaped}]" if inside.startswith("!") else f"[{escaped}]"
